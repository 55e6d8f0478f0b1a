"""Least squares from second moments, regularised towards the given weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from depcut.calibration.held_out import ridges_of
from depcut.calibration.moments import Fold
from depcut.support.processes import Processes

# Of the mean variance of the inputs; infinite: the weights stay, the bias alone moves.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


@dataclass(frozen=True)
class LeastSquares:
    """Weights with the least squared error to the targets, and how they were chosen.

    Attributes:
        weight: (blocks, out, in).
        bias: (blocks, out); zeros where no bias was asked for.
        ridge: The chosen regularisation, relative to the mean variance of the inputs.
        before: Share of the targets' variance that the given weights miss, held out.
        after: The same of the solved ones.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    before: float
    after: float


def of_first_process(label: str, found: LeastSquares, everyone: Processes) -> LeastSquares:
    """The solution of the first process, which rounding on unlike machines cannot change.

    Args:
        label: What it is of.
        found: The solution of this one, from the same moments.
        everyone: The processes.
    """
    if everyone.size == 1:
        return found
    told = torch.tensor([found.ridge, found.before, found.after], dtype=torch.float64)
    weight, bias, told = everyone.of_first(f"solution of {label}", [found.weight, found.bias, told])
    return LeastSquares(weight, bias, *map(float, told))


def solve(folds: Sequence[Fold], weight: torch.Tensor, bias: torch.Tensor | None) -> LeastSquares:
    """Minimise |y - W x - b|^2 + ridge |W - W0|^2.

    The ridge is the one of `RIDGES` whose solution on one fold has the least error on the other,
    both ways, found by descent from the middle one (towards larger ones if the next one is no
    worse, else towards smaller ones), since every other one costs two factorisations; ties go to
    the larger one. Where there is only one fold, nothing tells a fit from chance, and the weights
    stay.

    Args:
        folds: Disjoint data, one or two of a kind.
        weight: W0 (blocks, out, in).
        bias: b0 (blocks, out); None: no bias may be added.
    """
    start = weight.double()
    fixed = torch.zeros_like(folds[0].y) if bias is None else bias.double()
    free = bias is not None
    count, total = sum(f.count for f in folds), [sum(getattr(f, k) for f in folds) for k in "xy"]
    spread = float((sum(f.yy for f in folds) - total[1].square() / count).sum())
    if len(folds) > 1:
        ridges = ridges_of(folds, start, free)
        missed = cache(ridges.missed)
        best, before = descended(missed), ridges.given(fixed)
        after, solved = missed(best), ridges.fitted(best)
    else:
        best, solved = RIDGES[-1], start
        before = float(folds[0].error(start, fixed).sum())
        after = float(folds[0].error(start, _intercept(folds[0], start, fixed, free)).sum())
    shift = fixed
    if free:
        shift = (total[1] - (solved @ total[0][:, :, None])[..., 0]) / count
    scale = max(spread, 1e-30)
    return LeastSquares(solved, shift, best, before / scale, after / scale)


def descended(missed: Callable[[float], float]) -> float:
    """The ridge at which the error stops falling: larger ones are tried first, then smaller."""
    at = len(RIDGES) // 2
    step = 1 if missed(RIDGES[at + 1]) <= missed(RIDGES[at]) else -1
    while 0 <= at + step < len(RIDGES):
        here, there = missed(RIDGES[at]), missed(RIDGES[at + step])
        if there > here or (there == here and step < 0):
            break
        at += step
    return RIDGES[at]


def _intercept(data: Fold, weight: torch.Tensor, fixed: torch.Tensor, free: bool) -> torch.Tensor:
    if not free:
        return fixed
    return (data.y - (weight @ data.x[:, :, None])[..., 0]) / data.count
