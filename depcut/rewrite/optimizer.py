"""Optimizer state follows its parameters: momenta are sliced like the weights they belong to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from depcut.errors import InputError
from depcut.plan.keep import Keep
from depcut.plan.stacks import Stack, name_then
from depcut.reference.slices import take
from depcut.support.sharded import is_sharded, sharded_like, shards_of, whole


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse what is no optimizer of the model.

    Raises:
        InputError: It is none, or holds no parameter of the model.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer",
            where="optimizer=",
            remedy="pass the optimizer that trains this very model",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in _parameters(model).values()}:
        raise InputError(
            "the optimizer holds no parameter of the model",
            where="optimizer=",
            remedy="pass the optimizer that trains this very model",
        )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by all of their names; of those that are gathered, the shards."""
    shards = shards_of(model)
    held = model.named_parameters(remove_duplicate=False)
    return {name: shards.get(id(p), p) for name, p in held}


def narrow_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    slim: nn.Module,
    keep: Keep,
    stacks: Collection[Stack] = (),
) -> None:
    """Point an optimizer at the smaller model: parameters exchanged, their state sliced.

    Args:
        optimizer: Any optimizer whose per-parameter state has the parameter's shape or is scalar
            (SGD, Adam, AdamW, RMSprop, ...); changed in place.
        model: The dense model, whose parameters it holds.
        slim: The smaller model. State is sharded as its parameters are.
        keep: What stays.
        stacks: Repeated layers of which some are gone: those that stay have other numbers.

    Raises:
        InputError: It holds state of another shape.
    """
    old = _parameters(model)
    new = {name_then(name, stacks): p for name, p in slim.named_parameters(remove_duplicate=False)}
    dense = {id(p) for p in old.values()}
    names = {id(p): n for n, p in reversed(list(old.items())) if n in new}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[torch.Tensor, Any] = {}
    for parameter in held:
        state = optimizer.state.get(parameter, {})
        name = names.get(id(parameter))
        if name is None and id(parameter) in dense:
            continue  # of a branch that is dropped
        if name is None:
            states[parameter] = state
        elif state:
            states[new[name]] = _sliced(state, parameter, name, keep, new[name])
    for group in optimizer.param_groups:
        group["params"] = [
            new[names[id(p)]] if id(p) in names else p
            for p in group["params"]
            if id(p) in names or id(p) not in dense
        ]
    optimizer.state.clear()
    optimizer.state.update(states)


def _sliced(
    state: dict[str, Any], parameter: torch.Tensor, name: str, keep: Keep, slim: torch.Tensor
) -> Any:
    picked = keep.tensors.get(name)
    out = {}
    for key, held in state.items():
        value = whole(held).cpu() if is_sharded(held) else held
        if not isinstance(value, torch.Tensor):
            out[key] = value
        elif value.shape == parameter.shape:
            kept = take(value, picked) if picked else value.clone()
            out[key] = sharded_like(kept, slim) if is_sharded(held) else kept
        elif value.numel() == 1 or picked is None:
            out[key] = value.clone()
        else:
            raise InputError(
                f"state {key!r} of shape {tuple(value.shape)} does not follow its parameter of "
                f"shape {tuple(parameter.shape)}",
                where=name,
                remedy="shrink without optimizer= and make a new optimizer for the slim model",
            )
    return out
