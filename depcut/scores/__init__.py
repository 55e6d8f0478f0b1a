"""How much each unit matters: one vector a group, by name or by a user's own function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from depcut.coupling import Coupling
from depcut.errors import InputError
from depcut.scores import magnitude

Scores = list[NDArray[np.float64]]
Criterion = Callable[[Coupling, nn.Module, int], Scores]

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude.l2,
    "l2": magnitude.l2,
    "l1": magnitude.l1,
    "random": magnitude.uniform_random,
}


def score(criterion: str | Criterion, coupling: Coupling, model: nn.Module, seed: int) -> Scores:
    """Scores of all units, higher is kept: one vector a group, of length `group.size`.

    For a group with an outer axis it may be an array [group.rows, group.size]: the group then keeps
    the best units of each row.

    Args:
        criterion: Name, or a function of (coupling, model, seed) with the same result.
        coupling: Groups and where they occur.
        model: Whose weights are read.
        seed: For criteria that draw.

    Raises:
        InputError: Unknown name, or the criterion returned something else than such vectors.
    """
    if not callable(criterion):
        if criterion not in CRITERIA:
            raise InputError(
                f"unknown criterion {criterion!r}",
                where="score=",
                remedy=f"use one of {', '.join(CRITERIA)}, or pass a function",
            )
        criterion = CRITERIA[criterion]
    made = criterion(coupling, model, seed)
    try:
        scores = [np.asarray(s, dtype=np.float64) for s in made]
    except (TypeError, ValueError):
        scores = []
    shapes = [((g.size,), (g.rows, g.size) if g.outer else None) for g in coupling.groups]
    if len(scores) != len(shapes) or not all(
        s.shape in known for s, known in zip(scores, shapes, strict=True)
    ):
        raise InputError(
            "the criterion returned vectors that do not match the groups",
            where=f"score={getattr(criterion, '__name__', criterion)!r}",
            remedy="return one vector of length group.size for every group, in order, or an array "
            "[group.rows, group.size] for one that has group.outer",
        )
    for group, values in zip(coupling.groups, scores, strict=True):
        if not np.isfinite(values).all():
            raise InputError(
                f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite",
                where=f"group {group.name!r}",
                remedy="look for NaN or infinite weights in its layers, or use another criterion",
            )
    return scores
