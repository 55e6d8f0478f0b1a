"""A deep copy of a module tree, at a fraction of the cost of `copy.deepcopy`.

Only plain modules are copied by hand; a class with a protocol of its own (`__deepcopy__`,
`__getstate__`, `__setstate__`, `__reduce__`) is left to `copy.deepcopy`, with the same memo.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

from depcut.capture.provenance import is_result

_SHARED = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    torch.dtype,
    torch.device,
    torch.memory_format,
    types.FunctionType,
    types.BuiltinFunctionType,
    range,
)
_PROTOCOL = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that reuses what the memo holds and adds to it.

    Args:
        value: A module, or anything that hangs from one.
        memo: As of `copy.deepcopy`: copies by the id of their original.
    """
    found = memo.get(id(value))
    if found is not None:
        return found
    if isinstance(value, nn.Module) and _is_plain(type(value)):
        return _module(value, memo)
    if isinstance(value, _SHARED) or (type(value) is tuple and _is_flat(value)):
        return value
    if isinstance(value, nn.Parameter) and type(value).__deepcopy__ is nn.Parameter.__deepcopy__:
        memo[id(value)] = like(value, value.detach().clone())
        return memo[id(value)]
    if isinstance(value, dict) and not value and type(value).__module__ in _DICTS:
        return type(value)()
    if type(value) is dict and any(map(is_result, value.values())):
        # A cache of an earlier forward, of dense sizes: the copy fills its own.
        value = {k: v for k, v in value.items() if not is_result(v)}
    return copy.deepcopy(value, memo)


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """New values with the class, the gradient flag and the attributes of an old tensor."""
    if isinstance(old, nn.Parameter):
        out: torch.Tensor = torch.Tensor._make_subclass(type(old), new, old.requires_grad)
    else:
        out = new.requires_grad_(old.requires_grad) if old.is_floating_point() else new
    for key, value in vars(old).items():
        if not key.startswith("_"):
            setattr(out, key, copy.copy(value))
    return out


_DICTS = ("builtins", "collections")


def _is_flat(value: tuple[Any, ...]) -> bool:
    return all(isinstance(item, _SHARED) for item in value)


# These only add attributes that checkpoints of old versions lack.
_HARMLESS = (nn.modules.conv._ConvNd.__setstate__, nn.MultiheadAttention.__setstate__)


def _is_plain(kind: type[nn.Module]) -> bool:
    own = (getattr(kind, name, None) for name in _PROTOCOL)
    usual = (getattr(nn.Module, name, None) for name in _PROTOCOL)
    return all(a is b or a in _HARMLESS for a, b in zip(own, usual, strict=True))


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new: nn.Module = type(module).__new__(type(module))
    memo[id(module)] = new
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules") and type(value) is dict:
            new.__dict__[key] = {name: copied(item, memo) for name, item in value.items()}
        else:
            new.__dict__[key] = copied(value, memo)
    return new
