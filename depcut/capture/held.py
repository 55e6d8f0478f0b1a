"""The tensors that a model holds, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depcut.support.torch_private import buffers_of, parameters_of


def attribute(model: nn.Module, name: str) -> Any:
    """The attribute at a qualified name, or None."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part, None)
        if value is None:
            return None
    return value


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and plain tensor attribute of a model, by each qualified name."""
    out: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for held in (vars(module), parameters_of(module), buffers_of(module)):
            out.update({prefix + k: v for k, v in held.items() if isinstance(v, torch.Tensor)})
    return out


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each tensor that has several, by each of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    shared = [tuple(group) for group in names.values() if len(group) > 1]
    return {name: group for group in shared for name in group}


def memory(tensor: torch.Tensor) -> Any:
    """What a tensor shares with its detached self, and with no other one."""
    at = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return (at, tensor.shape, tensor.stride(), tensor.dtype) if at else id(tensor)
