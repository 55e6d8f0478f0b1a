"""The user's own class at the new sizes: set the attributes that its code reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from depcut.plan.attributes import Attribute
from depcut.support.torch_private import ConvNd, NormBase

# Attributes of torch's own layers that repeat a parameter's size: attribute -> (parameter, dim).
_STANDARD: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Bilinear: {
        "out_features": ("weight", 0),
        "in1_features": ("weight", 1),
        "in2_features": ("weight", 2),
    },
    nn.Embedding: {"embedding_dim": ("weight", 1)},
    NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}


def set_attributes(slim: nn.Module, values: dict[Attribute, int], narrowed: set[str]) -> None:
    """Set the solved attributes, and those of torch's own layers that repeat a width.

    Args:
        slim: The narrowed copy.
        values: New values by (module, path).
        narrowed: Modules that own a narrowed tensor.
    """
    modules = dict(slim.named_modules(remove_duplicate=False))
    for (name, path), value in values.items():
        module = modules[name]
        root = vars(module)[path[0]]
        new = _replaced(root, path[1:], value)
        if new is not root:
            module.__dict__[path[0]] = new
    for name in narrowed:
        if name in modules:
            _standard(modules[name])


def _replaced(container: Any, path: tuple[Any, ...], value: int) -> Any:
    """The container with one item exchanged; itself where nothing changes."""
    if not path:
        return container if container == value else value
    if isinstance(container, dict):
        return {**container, path[0]: _replaced(container[path[0]], path[1:], value)}
    items = list(container)
    items[path[0]] = _replaced(items[path[0]], path[1:], value)
    return type(container)(items) if items != list(container) else container


def _standard(module: nn.Module) -> None:
    if isinstance(module, ConvNd):
        weight = module.weight
        inner, outer = (1, 0) if not module.transposed else (0, 1)
        groups = module.groups
        module.out_channels = weight.shape[outer] * (groups if module.transposed else 1)
        module.in_channels = weight.shape[inner] * (1 if module.transposed else groups)
        return
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
        return
    for kind, attributes in _STANDARD.items():
        if isinstance(module, kind):
            for attribute, (parameter, dim) in attributes.items():
                tensor = getattr(module, parameter, None)
                if tensor is None and attribute == "num_features":
                    tensor = getattr(module, "running_mean", None)
                if tensor is None or not hasattr(module, attribute) or tensor.ndim <= dim:
                    continue
                if attribute != "num_parameters" or tensor.numel() > 1:
                    setattr(module, attribute, tensor.shape[dim])
            return
