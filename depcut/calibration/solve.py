"""Least squares from second moments, regularised towards the given weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

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
    both ways, found by descent from the middle one, since every other one costs two factorisations;
    ties go to the larger one. Where there is only one fold, nothing tells a fit from chance, and
    the weights stay.

    Args:
        folds: Disjoint data, one or two of a kind.
        weight: W0 (blocks, out, in).
        bias: b0 (blocks, out); None: no bias may be added.
    """
    start = weight.double()
    fixed = torch.zeros_like(folds[0].y) if bias is None else bias.double()
    whole = folds[0] if len(folds) == 1 else folds[0] + folds[1]
    free = bias is not None
    pairs = [(folds[0], folds[1]), (folds[1], folds[0])] if len(folds) > 1 else [(whole, whole)]
    spread = float((whole.yy - whole.y.square() / whole.count).sum())

    @cache
    def missed(ridge: float) -> float:
        total = 0.0
        for fit, test in pairs:
            w = _fitted(fit, start, ridge, free)
            total += float(test.error(w, _intercept(fit, w, fixed, free)).sum())
        return total

    best = descended(missed) if len(folds) > 1 else RIDGES[-1]
    solved = _fitted(whole, start, best, free)
    before = sum(float(test.error(start, fixed).sum()) for _, test in pairs)
    scale = max(spread, 1e-30)
    return LeastSquares(
        solved, _intercept(whole, solved, fixed, free), best, before / scale, missed(best) / scale
    )


def descended(missed: Callable[[float], float]) -> float:
    """The ridge at which the error stops falling on either side."""
    at = len(RIDGES) // 2
    while True:
        near = [i for i in (at + 1, at, at - 1) if 0 <= i < len(RIDGES)]
        best = min(near, key=lambda i: missed(RIDGES[i]))
        if best == at:
            return RIDGES[at]
        at = best


def _fitted(data: Fold, start: torch.Tensor, ridge: float, free: bool) -> torch.Tensor:
    return start if ridge == float("inf") else data.fitted(start, ridge, free)


def _intercept(data: Fold, weight: torch.Tensor, fixed: torch.Tensor, free: bool) -> torch.Tensor:
    if not free:
        return fixed
    return (data.y - (weight @ data.x[:, :, None])[..., 0]) / data.count
