"""The model inside of wrappers that run it otherwise: torch.compile, data parallelism."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from depcut.support.torch_private import compiled_module

T = TypeVar("T")


def _inner(model: object) -> Any:
    """What a wrapper holds; None for what is none."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return compiled_module(model)


def unwrapped(model: T) -> T:
    """The model itself, where wrappers hold it; anything else as it is.

    Args:
        model: What a user passed as a model.
    """
    inner = _inner(model)
    while inner is not None:
        model, inner = inner, _inner(inner)
    return model


def unwrapping_note(model: nn.Module) -> tuple[str, ...]:
    """That a model was in a wrapper and the result is not, for the report.

    Args:
        model: What a user passed as a model.
    """
    if unwrapped(model) is model:
        return ()
    what = type(model).__name__ if compiled_module(model) is None else "torch.compile"
    return (f"the model was wrapped by {what}; the result is a plain module, to be wrapped anew",)
