"""How close what stays comes to what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEAR = 0.005  # of the budget; what is so close to it meets it


def is_met(value: float, target: float) -> bool:
    """Whether a quantity is as close to its budget as one asks for.

    Args:
        value: The quantity.
        target: The budget.
    """
    return abs(value - target) <= NEAR * target


def missed(settings: Mapping[str, Any], dense: float, now: float) -> float:
    """By which share of a budget a quantity is beyond it; negative where less is left.

    Args:
        settings: Of the plan; its ratio is the fraction that was to go.
        dense: The quantity of the dense model.
        now: What is left of it.
    """
    return now / (dense * (1 - float(settings["ratio"]))) - 1
