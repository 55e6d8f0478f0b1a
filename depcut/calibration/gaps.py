"""Least squares for the outputs of a dense matrix, however many, from a part of what it reads.

A (out, dense) read z, and W (out, in), A on the kept columns, reads x. With the gap e = z - x at
the kept places, the outputs miss A e. Hence the best weights are W + A K, K = E X^T (X X^T + c)^-1,
K being (dense, in), and what they miss on other vectors is tr(A^T A Q), Q being the second moments
of e - K x. Neither holds anything of the size of the outputs (a vocabulary, say), K and Q serve all
matrices that read the same z, and no outputs are computed: these are exact, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from depcut.calibration.moments import Fold, Moments, Vectors
from depcut.calibration.products import Runs
from depcut.calibration.solve import RIDGES, descended
from depcut.support.processes import Processes

_NOISE = 1e-12  # of the mean square of the inputs: what rounding leaves of their variance
_TINY = 1e-30
_ROWS = 2048  # of a matrix, that are looked at together


@dataclass(frozen=True)
class Target:
    """A dense matrix whose outputs are wanted.

    Attributes:
        gram: A^T A, (dense, dense).
        through: A^T (a - b), (dense,), a being the dense bias and b the narrowed one.
        constant: |a - b|^2.
    """

    gram: torch.Tensor
    through: torch.Tensor
    constant: float

    @staticmethod
    def of(matrix: torch.Tensor, shift: torch.Tensor | None) -> Target:
        """Of A (out, dense) and a - b (out), if there are biases.

        Args:
            matrix: A; see `Runs` for the error of its products.
            shift: a - b.
        """
        gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
        gram, through, constant = gram.to(matrix.device), gram.new_zeros(len(gram)), 0.0
        for start in range(0, len(matrix), _ROWS):
            rows = matrix[start : start + _ROWS]
            gram += Runs(rows[None]).gram()[0]
            if shift is not None:
                constants = shift[start : start + _ROWS].double()
                through = through.to(gram) + rows.double().T @ constants
                constant += float(constants.square().sum())
        return Target(gram, through.to(gram), constant)


@dataclass(frozen=True)
class Found:
    """What is added to weights and biases.

    Attributes:
        matrix: K, (dense, in): the weights are W + A K.
        mean: Mean of e - K x, (dense,): the bias is the dense one and A times it; None: there is
            no bias.
        ridge: See `LeastSquares`.
        before: See `LeastSquares`.
        after: See `LeastSquares`.
    """

    matrix: torch.Tensor
    mean: torch.Tensor | None
    ridge: float
    before: float
    after: float


def solve_gaps(
    folds: Sequence[Fold], kept: torch.Tensor, free: bool, targets: Sequence[Target]
) -> list[Found]:
    """Minimise |A z + a - (W + D) x - b|^2 + ridge |D|^2, for each A; see `solve` for the ridges.

    Args:
        folds: Of vectors [x, e] of length in + dense, in one block; their targets do not matter.
        kept: The places of x in z, (in,).
        free: Whether there is a b, the best one; else both a and b are zero.
        targets: Of each A.
    """
    size = len(kept)
    parts = [_part(fold, size) for fold in folds]
    whole = parts[0] if len(folds) == 1 else _part(folds[0] + folds[1], size)
    pairs = [(parts[0], parts[1]), (parts[1], parts[0])] if len(folds) > 1 else [(whole, whole)]

    @cache
    def missed(ridge: float) -> list[float]:
        totals = [0.0] * len(targets)
        for fit, test in pairs:
            left = test.left(*fit.operator(ridge, free))
            totals = [t + _traced(a.gram, left) for t, a in zip(totals, targets, strict=True)]
        return totals

    spread, plain, mean = whole.variance(kept), whole.left(None, None), whole.sums[size:]
    out = []
    operator = cache(whole.operator)
    for i, target in enumerate(targets):
        one = (lambda ridge, i=i: missed(ridge)[i]) if len(folds) > 1 else None
        best = RIDGES[-1] if one is None else descended(one)
        scale = max(_traced(target.gram, spread), 1e-30)
        before = _traced(target.gram, plain) + 2 * float(target.through @ mean)
        before += whole.count * target.constant
        matrix, shift = operator(best, free)
        if matrix is None:
            matrix = mean.new_zeros(len(mean), size)
        out.append(Found(matrix, shift, best, before / scale, missed(best)[i] / scale))
    return out


def of_first_process(label: str, found: Found, everyone: Processes) -> Found:
    """What the first process found, see `depcut.calibration.solve`.

    Args:
        label: What it is of.
        found: What this one found, from the same moments.
        everyone: The processes.
    """
    if everyone.size == 1:
        return found
    told = torch.tensor([found.ridge, found.before, found.after], dtype=torch.float64)
    given = [found.matrix, told] if found.mean is None else [found.matrix, told, found.mean]
    matrix, told, *mean = everyone.of_first(f"solution of {label}", given)
    return Found(matrix, mean[0] if mean else None, *map(float, told))


def _traced(gram: torch.Tensor, moments: torch.Tensor) -> float:
    """tr(A^T A Q), of which the symmetric part of Q alone matters."""
    return float(torch.dot(gram.flatten(), moments.flatten()))


Operator = tuple[torch.Tensor | None, torch.Tensor | None]


class _Part:
    """Some of the vectors [x, e].

    Attributes:
        count: How many.
        sums: Of them, (in + dense,).
    """

    count: int
    sums: torch.Tensor

    def __init__(self, size: int) -> None:
        self.size = size

    def operator(self, ridge: float, free: bool) -> Operator:
        """K (dense, in), None for zeros, and the mean of e - K x if there is a bias.

        Args:
            ridge: Relative to the mean variance of x.
            free: Whether there is a bias.
        """
        matrix = None if ridge == float("inf") else self._fitted(ridge, free)
        if not free:
            return matrix, None
        mean = self.sums[self.size :] / self.count
        if matrix is not None:
            mean = mean - matrix @ (self.sums[: self.size] / self.count)
        return matrix, mean

    def _fitted(self, ridge: float, free: bool) -> torch.Tensor | None:
        raise NotImplementedError

    def left(self, matrix: torch.Tensor | None, mean: torch.Tensor | None) -> torch.Tensor:
        """A matrix (dense, dense) with the symmetric part of the moments of e - K x less a mean.

        Args:
            matrix: K; None: zeros.
            mean: (dense,); None: zeros.
        """
        raise NotImplementedError

    def variance(self, kept: torch.Tensor) -> torch.Tensor:
        """Second moments (dense, dense) of z less its mean.

        Args:
            kept: The places of x in z.
        """
        raise NotImplementedError


class _Summed(_Part):
    """Vectors of which there are second moments."""

    def __init__(self, moments: Moments, size: int) -> None:
        super().__init__(size)
        self.count, self.sums = moments.count, moments.x[0]
        both = moments.xx[0]
        self.xx, self.ex, self.ee = both[:size, :size], both[size:, :size], both[size:, size:]

    def _fitted(self, ridge: float, free: bool) -> torch.Tensor | None:
        system, through = self.xx.clone(), self.ex.clone()
        noise = _NOISE * system.diagonal().mean()
        if free:
            x, e = self.sums[: self.size], self.sums[self.size :]
            system.addr_(x, x, alpha=-1 / self.count)
            through.addr_(e, x, alpha=-1 / self.count)
        system.diagonal().add_(ridge * system.diagonal().mean().clamp_min(0) + noise + _TINY)
        return _times_inverse(through, system)

    def left(self, matrix: torch.Tensor | None, mean: torch.Tensor | None) -> torch.Tensor:
        """See `_Part`."""
        out, sums = self.ee.clone(), self.sums[self.size :]
        if matrix is not None:
            half = torch.addmm(self.ex, matrix, self.xx, alpha=-0.5)
            out.addmm_(half, matrix.T, alpha=-2)  # and half of it transposed has the same part
            sums = sums - matrix @ self.sums[: self.size]
        if mean is not None:
            out.addr_(sums - self.count * mean, mean, alpha=-1)
            out.addr_(mean, sums, alpha=-1)
        return out

    def variance(self, kept: torch.Tensor) -> torch.Tensor:
        """See `_Part`."""
        out, sums = self.ee.clone(), self.sums[self.size :].clone()
        out.index_add_(1, kept, self.ex)
        out.index_add_(0, kept, self.ex.T)
        out[kept[:, None], kept] += self.xx
        sums.index_add_(0, kept, self.sums[: self.size])
        return out.addr_(sums, sums, alpha=-1 / self.count)


class _Few(_Part):
    """Vectors as they are."""

    def __init__(self, vectors: Vectors, size: int) -> None:
        super().__init__(size)
        self.both = vectors.inputs[0]
        self.count, self.sums = len(self.both), self.both.sum(0)

    def _fitted(self, ridge: float, free: bool) -> torch.Tensor | None:
        """X^T (X X^T + c)^-1 = (X^T X + c)^-1 X^T, as for `Vectors`."""
        both = self.both - self.sums / self.count if free else self.both
        x, e = both[:, : self.size], both[:, self.size :]
        system = x @ x.T
        noise = _NOISE * self.both[:, : self.size].square().sum(0).mean()
        level = system.diagonal().sum() / self.size
        system.diagonal().add_(ridge * level + noise + _TINY)
        through = _times_inverse(e.T, system)
        return None if through is None else through @ x

    def left(self, matrix: torch.Tensor | None, mean: torch.Tensor | None) -> torch.Tensor:
        """See `_Part`."""
        x, e = self.both[:, : self.size], self.both[:, self.size :]
        gap = e if matrix is None else torch.addmm(e, x, matrix.T, alpha=-1)
        if mean is not None:
            gap = gap - mean
        return gap.T @ gap

    def variance(self, kept: torch.Tensor) -> torch.Tensor:
        """See `_Part`."""
        dense = self.both[:, self.size :].clone()
        dense.index_add_(1, kept, self.both[:, : self.size])
        dense -= dense.mean(0)
        return dense.T @ dense


def _part(fold: Fold, size: int) -> _Part:
    if isinstance(fold, Moments):
        return _Summed(fold, size)
    assert isinstance(fold, Vectors)
    return _Few(fold, size)


def _times_inverse(matrix: torch.Tensor, system: torch.Tensor) -> torch.Tensor | None:
    """B S^-1 for a positive definite S, which is overwritten; None where it is not."""
    turned = system.T  # LAPACK counts by columns; a symmetric matrix turned is the same one
    failed = torch.empty((), dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(turned, out=(turned, failed))
    if bool(failed):
        return None
    return torch.cholesky_solve(matrix.T, turned).T
