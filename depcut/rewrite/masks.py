"""Weights under a mask become plain weights: `torch.nn.utils.prune`, and parametrizations alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from depcut.rewrite.copying import copied
from depcut.support.torch_private import pruned_names


def without_masks(model: nn.Module) -> nn.Module:
    """The model with all masks applied for good: a copy, or itself where there are none.

    Args:
        model: Any module; it is not changed. What `torch.nn.utils.prune` masks loses its hook. So
            does a parametrization all of whose tensors are masks: of zeros and ones, and no larger
            than the weight. Other parametrizations stay.
    """
    if not any([*pruned_names(m), *_masked(m)] for m in model.modules()):
        return model
    plain: nn.Module = copied(model, {})
    for module in list(plain.modules()):
        for name in list(pruned_names(module)):
            prune.remove(module, name)
        for name in _masked(module):
            _own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return plain


def _own_class(module: nn.Module) -> None:
    """Give a module a class of its own, since copies share one that removal would change."""
    kind = type(module)
    kept = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, kept)


def _masked(module: nn.Module) -> list[str]:
    """Names of parameters under parametrizations that are masks."""
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    return [
        name
        for name, steps in lists.items()
        if steps.is_tensor and all(_is_mask(s, steps.original) for s in steps)
    ]


def _is_mask(step: nn.Module, weight: torch.Tensor) -> bool:
    if any(True for _ in step.parameters()):
        return False
    plain = (v for m in step.modules() for v in vars(m).values() if isinstance(v, torch.Tensor))
    tensors = [*step.buffers(), *plain]
    return bool(tensors) and all(
        t.ndim <= weight.ndim
        and all(
            n in (1, m) for n, m in zip(reversed(t.shape), reversed(weight.shape), strict=False)
        )
        and bool(((t == 0) | (t == 1)).all())
        for t in tensors
    )
