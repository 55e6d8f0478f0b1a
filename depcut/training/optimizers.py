"""The optimizer of a retraining: a default by a stated rule, or a copy of the caller's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from depcut.errors import InputError
from depcut.rewrite.optimizer import check_optimizer
from depcut.support.failures import first_line, reraise_fatal

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def default_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum for convolutional nets, AdamW for all others.

    A net is convolutional if most of its parameters are in tensors of three and more dimensions.

    Args:
        groups: Parameter groups with their rates.
    """
    if _is_convolutional([p for group in groups for p in group["params"]]):
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)


def groups_of(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices and kernels decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            "the model has no parameter that requires a gradient",
            where=type(model).__name__,
            remedy="call model.requires_grad_(True)",
        )
    wide, narrow = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [(wide, 1e-4 if _is_convolutional(trained) else 1e-2), (narrow, 0.0)]
    return [{"params": p, "lr": lr, "weight_decay": decay} for p, decay in groups if p]


def _is_convolutional(parameters: list[nn.Parameter]) -> bool:
    kernels = sum(p.numel() for p in parameters if p.ndim > 2)
    return 2 * kernels > sum(p.numel() for p in parameters)


def optimizer_for(given: Any, model: nn.Module, new: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer of the training copy of a model.

    Args:
        given: The caller's, which trains `model` and is copied with its state; a function of
            parameter groups; None for the default.
        model: The caller's model.
        new: The copy to train.
        lr: The rate to make an optimizer with.

    Raises:
        InputError: It is neither, or holds other parameters.
    """
    if given is None:
        return default_optimizer(groups_of(new, lr))
    if not isinstance(given, torch.optim.Optimizer):
        if not callable(given):
            check_optimizer(given, model)
        optimizer: torch.optim.Optimizer = made_by(given, groups_of(new, lr))
        check_optimizer(optimizer, new)
        return optimizer
    check_optimizer(given, model)
    twins = {id(old): twin for old, twin in zip(model.parameters(), new.parameters(), strict=True)}
    held = [p for group in given.param_groups for p in group["params"]]
    strange = [p for p in held if id(p) not in twins]
    if strange:
        raise InputError(
            f"the optimizer holds {len(strange)} of {len(held)} parameters that are not the "
            "model's",
            where="optimizer=",
            remedy="pass the optimizer that trains this very model and nothing else",
        )
    twin_optimizer: torch.optim.Optimizer = copy.deepcopy(given, dict(twins))
    return twin_optimizer


def made_by(function: Callable[[Any], Any], given: Any) -> Any:
    """What a user's function makes of a model or of parameter groups.

    Raises:
        InputError: It fails.
    """
    try:
        return function(given)
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the function that makes the optimizer failed: {first_line(error)}",
            where="optimizer=",
            remedy="pass e.g. lambda params: torch.optim.SGD(params, 0.1)",
        ) from error


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters in the optimizer's own order."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def named_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Any]:
    """An optimizer's state with names in place of numbers."""
    state = optimizer.state_dict()
    return {
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]],
        "state": {names[i]: values for i, values in state["state"].items()},
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, names: list[str], saved: dict[str, Any]
) -> None:
    """Put back what `named_state` gave."""
    numbers = {name: i for i, name in enumerate(names)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {
            "state": {numbers[n]: values for n, values in saved["state"].items()},
            "param_groups": [
                {**old, "params": g["params"]}
                for old, g in zip(saved["groups"], groups, strict=True)
            ],
        }
    )
