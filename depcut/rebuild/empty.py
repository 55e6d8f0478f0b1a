"""Models built without memory for their weights, though with the values of their buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# What layers make their weights with, before these are initialised in place or loaded.
_UNINITIALISED = (torch.empty, torch.randn, torch.rand, torch.empty_strided)


class _EmptyOnMeta(TorchFunctionMode):
    """Tensors without values of their own are made on the meta device; others as ever."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            tensor = given.get("tensor", args[0] if args else None)
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func in _UNINITIALISED:
            given["device"] = "meta"
        return func(*args, **given)


def empty_on_meta() -> TorchFunctionMode:
    """A context in which layers get weights on the meta device; of this thread alone."""
    return _EmptyOnMeta()
