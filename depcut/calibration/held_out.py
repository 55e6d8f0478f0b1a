"""How much of one fold a fit to the other one misses, ridge by ridge, with what ridges share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch

from depcut.calibration.moments import NOISE, TINY, Fold, Moments, Vectors
from depcut.calibration.products import single_is_kept

_WIDE = 256  # inputs from which on single precision may do
_STIFF = 1e-3  # the least ridge for which it does


class Ridges(Protocol):
    """Least squares y = W x + b over two folds, W pulled to where it is by a ridge."""

    def given(self, bias: torch.Tensor) -> float:
        """Sum of |y - W x - b|^2 over both folds of W where it is, b (blocks, out)."""

    def missed(self, ridge: float) -> float:
        """Sum of |y - W x - b|^2 over either fold of what is fitted to the other one."""

    def fitted(self, ridge: float) -> torch.Tensor:
        """W of both folds together, see `Fold`."""


def ridges_of(folds: Sequence[Fold], start: torch.Tensor, free: bool) -> Ridges:
    """The problem of two folds.

    Args:
        folds: The two, of one kind.
        start: W where it is pulled to, (blocks, out, in).
        free: Whether there is a b, the best one of the fold that is fitted; else it is zero.
    """
    first, second = folds
    if isinstance(first, Vectors) and isinstance(second, Vectors):
        return _OfVectors((first, second), start, free)
    assert isinstance(first, Moments)
    assert isinstance(second, Moments)
    return _OfMoments((first, second), start, free)


class _OfMoments:
    """Of moments: a system as large as there are inputs, for each ridge and fold.

    From 256 inputs and a ridge of 1e-3 on, what is missed is known in single precision, which takes
    half of the time: rounding (u = 6e-8) then moves W by at most about u sqrt(in) / ridge of what
    it moves, 3e-3 for 2304 inputs, along directions of least variance, and what is missed by less
    than 1e-4 of itself. W itself is always solved in double precision.
    """

    def __init__(self, folds: tuple[Moments, Moments], start: torch.Tensor, free: bool) -> None:
        self.folds, self.start, self.free = folds, start, free
        self.sums = first, second = [_Sums(fold, start) for fold in folds]
        self.pairs = [_Pair(first, second, free), _Pair(second, first, free)]

    def given(self, bias: torch.Tensor) -> float:
        """See `Ridges`."""
        nothing = torch.zeros_like(self.folds[0].x)
        return sum(float(s.about(nothing, bias)[2].sum()) for s in self.sums)

    def missed(self, ridge: float) -> float:
        """See `Ridges`."""
        return sum(pair.missed(ridge) for pair in self.pairs)

    def fitted(self, ridge: float) -> torch.Tensor:
        """See `Ridges`."""
        self.pairs, self.sums = [], []
        return (self.folds[0] + self.folds[1]).fitted(self.start, ridge, self.free)


class _Pair:
    """Moments to fit and others to test on.

    With D = W - start, r = y - start x and both vectors less the means of the fit (if there is a
    b), D solves (sum x x^T + ridge) D^T = sum x r^T on the fit, and misses sum |r - D x|^2 on the
    test: A - 2 <D, C> + <D B, D> with A, B, C that no ridge changes.
    """

    def __init__(self, fit: _Sums, test: _Sums, free: bool) -> None:
        x, y = fit.data.x, fit.data.y
        self.means = x / fit.data.count, y / fit.data.count
        if not free:
            self.means = torch.zeros_like(x), torch.zeros_like(y)
        xx, rx, _ = fit.about(*self.means)
        self.size = xx.shape[1]
        self.lowest = torch.float32 if self.size >= _WIDE and single_is_kept() else torch.float64
        own = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)
        noise = NOISE * fit.data.xx.diagonal(dim1=1, dim2=2).mean(1)
        # In units of the mean variance, so that nothing leaves the range of single precision.
        self.level = (own + noise + TINY)[:, None, None]
        self.own, self.noise = own / self.level[:, 0, 0], (noise + TINY) / self.level[:, 0, 0]
        self.most = rx.abs().amax((1, 2), keepdim=True) + TINY
        self.missing = (rx / self.most).transpose(1, 2)
        self.system = (xx / self.level).to(self.lowest)
        self.fit = fit
        xx, self.cross, self.energy = test.about(*self.means)
        self.square = (xx / self.level).to(self.lowest)

    def missed(self, ridge: float) -> float:
        """What the test shows."""
        moved = None if ridge == float("inf") else self._moved(ridge)
        if moved is None:
            return float(self.energy.sum())
        through = (moved @ self.square).double()
        moved = moved.double() * (self.most / self.level)
        through *= self.most
        return float((self.energy + (moved * (through - 2 * self.cross)).sum((1, 2))).sum())

    def _moved(self, ridge: float) -> torch.Tensor | None:
        """D in units of most / level; None where the system cannot be solved."""
        pull = ridge * self.own + self.noise
        if ridge >= _STIFF or self.lowest == torch.float64:
            found = _solved(self.system, pull, self.missing)
            if found is not None:
                return found
        if self.lowest == torch.float64:
            return None
        xx, _, _ = self.fit.about(*self.means)
        found = _solved(xx / self.level, pull, self.missing)
        return None if found is None else found.to(self.lowest)


class _Sums:
    """Moments of x and of r = y - W x.

    Args:
        data: Of x and y.
        weight: W, (blocks, out, in).
    """

    def __init__(self, data: Moments, weight: torch.Tensor) -> None:
        self.data, self.weight = data, weight
        self.through = weight @ data.xx

    def about(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of x x^T, r x^T and by block of |r|^2, of x and y less x (blocks, in), y (.., out).

        Args:
            x: What to subtract of x.
            y: What to subtract of y.
        """
        data, weight = self.data, self.weight
        rest = data.x - data.count * x
        shift = y - (weight @ x[:, :, None])[..., 0]  # of r
        sums = data.y - (weight @ data.x[:, :, None])[..., 0]
        xx = data.xx - data.x[:, :, None] * x[:, None, :]
        xx -= x[:, :, None] * rest[:, None, :]
        rx = data.yx - self.through
        plain = data.yy.sum(1) - (weight * (data.yx + rx)).sum((1, 2))
        energy = plain + (shift * (data.count * shift - 2 * sums)).sum(1)
        rx -= sums[:, :, None] * x[:, None, :]
        rx -= shift[:, :, None] * rest[:, None, :]
        return xx, rx, energy


def _solved(system: torch.Tensor, pull: torch.Tensor, missing: torch.Tensor) -> torch.Tensor | None:
    """(system + pull)^-1 missing, turned, in the system's precision; None where that fails."""
    damped = system.clone()
    damped.diagonal(dim1=1, dim2=2).add_(pull.to(damped)[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    return torch.cholesky_solve(missing.to(factor), factor).transpose(1, 2)


class _OfVectors:
    """Of few vectors: W - start is a combination of them (see `Vectors.fitted`).

    Inner products of all vectors are made once; each ridge then costs a system as large as there
    are vectors, whatever their length.
    """

    def __init__(self, folds: tuple[Vectors, Vectors], start: torch.Tensor, free: bool) -> None:
        self.free, self.start = free, start
        self.counts = [fold.count for fold in folds]
        self.length = start.shape[2]
        self.noise = [NOISE * f.inputs.square().sum(1).mean(1) for f in folds]
        mean = (folds[0].x + folds[1].x) / sum(self.counts)
        # Less their common mean, so that a large one cancels nothing where those of folds go.
        self.vectors = [f.inputs - mean[:, None, :] if free else f.inputs for f in folds]
        self.missing = [f.targets - f.inputs @ start.transpose(1, 2) for f in folds]

    def given(self, bias: torch.Tensor) -> float:
        """See `Ridges`."""
        return sum(float((part - bias[:, None]).square().sum()) for part in self.missing)

    @cached_property
    def _products(self) -> dict[tuple[int, int], torch.Tensor]:
        """Inner products of the vectors of two folds."""
        first, second = self.vectors
        across = first @ second.transpose(1, 2)
        return {
            (0, 0): first @ first.transpose(1, 2),
            (0, 1): across,
            (1, 0): across.transpose(1, 2),
            (1, 1): second @ second.transpose(1, 2),
        }

    def missed(self, ridge: float) -> float:
        """See `Ridges`."""
        return self._missed(0, 1, ridge) + self._missed(1, 0, ridge)

    def _missed(self, fit: int, test: int, ridge: float) -> float:
        target, rest = self.missing[fit], self.missing[test]
        if self.free:
            mean = target.mean(1, keepdim=True)
            target, rest = target - mean, rest - mean
        if ridge != float("inf"):
            own, across = self._products[fit, fit], self._products[test, fit]
            if self.free:
                lost = own.mean(1, keepdim=True)
                across = across - across.mean(2, keepdim=True) - lost + lost.mean(2, keepdim=True)
            weights = self._weights(own, target, ridge, self.noise[fit])
            rest = rest if weights is None else rest - across @ weights
        return float(rest.square().sum())

    def _weights(
        self, own: torch.Tensor, target: torch.Tensor, ridge: float, noise: torch.Tensor
    ) -> torch.Tensor | None:
        """How much each vector counts in W - start; None where the system cannot be solved.

        Args:
            own: Inner products of the vectors.
            target: What the weights miss of their targets, less its mean if there is a b.
            ridge: Relative to the mean variance of the inputs.
            noise: What rounding leaves of that.
        """
        if self.free:
            lost = own.mean(1, keepdim=True)
            own = own - lost - lost.transpose(1, 2) + lost.mean(2, keepdim=True)
        level = own.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0) / self.length
        solved = _solved(own, ridge * level + noise + TINY, target)
        return None if solved is None else solved.transpose(1, 2)

    def fitted(self, ridge: float) -> torch.Tensor:
        """See `Ridges`."""
        if ridge == float("inf"):
            return self.start
        found = self._products
        own = torch.cat([torch.cat([found[i, j] for j in (0, 1)], 2) for i in (0, 1)], 1)
        target = torch.cat(self.missing, 1)
        if self.free:
            target = target - target.mean(1, keepdim=True)
        weights = self._weights(own, target, ridge, self.noise[0] + self.noise[1])
        if weights is None:
            return self.start
        first, second = (
            w.transpose(1, 2) @ v
            for w, v in zip(weights.split(self.counts, 1), self.vectors, strict=True)
        )
        moved: torch.Tensor = self.start + first + second
        return moved
