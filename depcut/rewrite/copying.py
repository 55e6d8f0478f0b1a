"""A deep copy of a module tree, tensors included, in place of `copy.deepcopy`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from depcut.capture.copier import Copier
from depcut.capture.provenance import is_result
from depcut.rewrite.attention import SlimMultiheadAttention
from depcut.support.torch_private import ConvNd, make_subclass

_PROTOCOL = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
# These only add attributes that checkpoints of old versions lack, or name a class.
_HARMLESS = (
    ConvNd.__setstate__,
    nn.MultiheadAttention.__setstate__,
    SlimMultiheadAttention.__reduce_ex__,
)


class _Deep(Copier):
    """A copier that copies tensors, too, and follows a class's own protocol for copies."""

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """New values; a result of a forward, which `copy.deepcopy` refuses, becomes a leaf."""
        if not value.is_leaf:
            return value.detach().clone()
        if isinstance(value, nn.Parameter) and type(value).__deepcopy__ is _COPY_OF_PARAMETER:
            return like(value, value.detach().clone())
        new: torch.Tensor = copy.deepcopy(value, self.memo)
        return new

    def follows(self, value: Any) -> bool:
        """What leads to the tree; what a hook collects in, say, stays shared with the original."""
        return isinstance(value, nn.Module) or self.leads_inside(value)

    def as_its_class_says(self, kind: type) -> bool:
        """Whether the class has a protocol of its own."""
        base = nn.Module if issubclass(kind, nn.Module) else object
        own = (getattr(kind, name, None) for name in _PROTOCOL)
        usual = (getattr(base, name, None) for name in _PROTOCOL)
        return any(a is not b and a not in _HARMLESS for a, b in zip(own, usual, strict=True))

    def entries(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """All entries but results that an earlier forward cached, which have dense sizes."""
        return {k: v for k, v in value.copy().items() if not is_result(v)}


_COPY_OF_PARAMETER = nn.Parameter.__deepcopy__


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that reuses what the memo holds and adds to it.

    Args:
        value: A module, or anything that hangs from one.
        memo: As of `copy.deepcopy`: copies by the id of their original.
    """
    return _Deep(memo)(value)


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """New values with the class, the gradient flag and the attributes of an old tensor."""
    if isinstance(old, nn.Parameter):
        out: torch.Tensor = make_subclass(type(old), new, old.requires_grad)
    else:
        out = new.requires_grad_(old.requires_grad) if old.is_floating_point() else new
    for key, value in vars(old).items():
        if not key.startswith("_"):
            setattr(out, key, copy.copy(value))
    return out
