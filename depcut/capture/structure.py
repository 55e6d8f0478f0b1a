"""What a model's modules are and hold, as plain data: to see whether it has changed."""

from __future__ import annotations

import types
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from depcut.capture.references import ATOMS
from depcut.support.torch_private import buffers_of, parameters_of

# By module name: class and forward, shapes of parameters and buffers, and every other attribute.
Structure = Mapping[str, Mapping[str, Any]]

_ITEMS = 1000  # of a container that are looked at
_LEVELS = 8  # of containers and objects in each other
_OTHERS = frozenset(("_parameters", "_buffers", "_modules", "training"))


def structure_of(model: nn.Module) -> Structure:
    """The structure of a model; weights count by their shapes alone, and modes not at all.

    Args:
        model: The model; it is only read.
    """
    memo: dict[int, Any] = {}
    return {name: _described(module, memo) for name, module in model.named_modules()}


def _described(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    kind = type(module)
    shapes = {
        name: tuple(tensor.shape)
        for held in (parameters_of(module), buffers_of(module))
        for name, tensor in held.items()
        if tensor is not None and not nn.parameter.is_lazy(tensor)
    }
    fields = {k: v for k, v in dict(vars(module)).items() if k not in _OTHERS}
    attributes = {k: _token(v, memo, _LEVELS) for k, v in fields.items()}
    return {"its class": (kind, kind.forward), "its tensors": shapes, **attributes}


def _token(value: Any, memo: dict[int, Any], levels: int) -> Any:
    """A value that equals another one as long as nothing has changed."""
    kind = type(value)
    if kind in ATOMS:
        return kind, repr(value)
    if isinstance(value, torch.Tensor):
        return kind, tuple(value.shape)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return value
    if isinstance(value, nn.Module) or not levels:
        return kind, id(value)
    if id(value) not in memo:
        memo[id(value)] = (kind, "in itself")
        memo[id(value)] = kind, _parts(value, memo, levels - 1)
    return memo[id(value)]


def _parts(value: Any, memo: dict[int, Any], levels: int) -> Any:
    if isinstance(value, types.MethodType):
        return id(value.__self__), value.__func__
    if isinstance(value, dict):
        items = islice(value.copy().items(), _ITEMS)
        return len(value), [(_token(k, memo, levels), _token(v, memo, levels)) for k, v in items]
    if isinstance(value, list | tuple):
        return len(value), [_token(v, memo, levels) for v in value[:_ITEMS]]
    if isinstance(value, set | frozenset):
        return len(value)
    fields = dict(getattr(value, "__dict__", ()))
    return [(k, _token(v, memo, levels)) for k, v in fields.items()]


def changes(before: Structure, after: Structure) -> list[str]:
    """What has changed, in words.

    Args:
        before: The structure as it was.
        after: As it is.
    """
    out = []
    for name in {**before, **after}:
        place = f"layer {name!r}" if name else "the model"
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            out.append(f"{place} is {'new' if was is None else 'gone'}")
            continue
        odd = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        if "its class" in odd and was["its class"][0] is not now["its class"][0]:
            kinds = (described["its class"][0].__name__ for described in (was, now))
            out.append("{} was a {}, is a {}".format(place, *kinds))
        else:
            out += [f"{key} of {place}" for key in odd]
    return out
