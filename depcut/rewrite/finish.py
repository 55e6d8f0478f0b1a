"""A rewritten model's other attributes: what no forward reads and a library's functions do."""

from __future__ import annotations

from torch import nn

from depcut.plan.keep import Keep
from depcut.support.conventions import adapters


def finish(slim: nn.Module, dense: nn.Module, keep: Keep) -> tuple[str, ...]:
    """Have the adapters of the model's libraries bring its other attributes up to date.

    Each adapter may have a function `finish(slim, dense, keep)` that changes attributes (never a
    tensor) of the smaller model and returns notes for the report.

    Args:
        slim: The smaller model, verified and repaired.
        dense: The model that it was made from; it is only read.
        keep: What stays of it.

    Returns:
        What could not be brought up to date, in words.
    """
    notes: list[str] = []
    for adapter in adapters(dense):
        if hasattr(adapter, "finish"):
            notes += adapter.finish(slim, dense, keep)
    return tuple(notes)
