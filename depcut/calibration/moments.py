"""Second moments of what a weight reads and of what it should give, in two folds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch

from depcut.calibration.products import Runs
from depcut.support.processes import Processes

FOLDS = 2
# Of the mean square of the inputs: what rounding leaves of their variance.
NOISE = 1e-12
TINY = 1e-30


class Fold(Protocol):
    """Vectors x (in) and targets y (out), for each of several independent blocks.

    Attributes:
        count: Number of vectors.
        x: Sum of x, (blocks, in).
        y: Sum of y, (blocks, out).
        yy: Sum of y squared, by output.
    """

    @property
    def count(self) -> int:
        """Number of vectors."""

    @property
    def x(self) -> torch.Tensor:
        """Sum of x, (blocks, in)."""

    @property
    def y(self) -> torch.Tensor:
        """Sum of y, (blocks, out)."""

    @property
    def yy(self) -> torch.Tensor:
        """Sum of y squared, (blocks, out)."""

    def __add__(self, other: Any) -> Fold:
        """This and another of the same kind."""

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Sum of |y - W x - b|^2 by block and output, for W (blocks, out, in), b (blocks, out)."""

    def fitted(self, start: torch.Tensor, ridge: float, free: bool) -> torch.Tensor:
        """W with the least |y - W x - b|^2 + ridge |W - start|^2, W (blocks, out, in).

        Args:
            start: W where it is pulled to; returned where the problem cannot be solved.
            ridge: Relative to the mean variance of the inputs.
            free: Whether there is a b, the best one; else it is zero.
        """


class _Last:
    """What was computed for one W where it is pulled to, which all ridges have in common."""

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor, bool, torch.Tensor] | None = None

    def of(
        self, start: torch.Tensor, free: bool, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if self._known is None or self._known[0] is not start or self._known[1] != free:
            self._known = start, free, compute()
        return self._known[2]


@dataclass
class Moments:
    """Sums over vectors x (in) and targets y (out), in double precision; see `Fold`.

    Attributes:
        count: Number of vectors.
        xx: Sum of x x^T, (blocks, in, in).
        x: Sum of x.
        yx: Sum of y x^T, (blocks, out, in).
        y: Sum of y.
        yy: Sum of y squared, by output.
    """

    count: int
    xx: torch.Tensor
    x: torch.Tensor
    yx: torch.Tensor
    y: torch.Tensor
    yy: torch.Tensor

    def __post_init__(self) -> None:
        self._missing = _Last()

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Of x (blocks, vectors, in) and y (blocks, vectors, out); see `Runs` for the error."""
        read, wanted = Runs(x), Runs(y)
        return Moments(
            x.shape[1],
            read.gram(),
            read.total(),
            wanted.cross(read),
            wanted.total(),
            wanted.squares(),
        )

    def __add__(self, other: Moments) -> Moments:
        """Of both together."""
        return Moments(
            self.count + other.count,
            self.xx + other.xx,
            self.x + other.x,
            self.yx + other.yx,
            self.y + other.y,
            self.yy + other.yy,
        )

    def none(self) -> Moments:
        """Those of no vectors, of the same shapes."""
        return Moments(0, *(torch.zeros_like(v) for v in tensors_of(self)))

    @cached_property
    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Covariance sums of x with itself and of y with x."""
        mean = self.x / self.count
        xx = self.xx - self.x[:, :, None] * mean[:, None, :]
        return xx, self.yx - self.y[:, :, None] * mean[:, None, :]

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `Fold`."""
        quadratic = ((weight @ self.xx) * weight).sum(-1)
        cross = (weight * self.yx).sum(-1)
        through = (weight @ self.x[:, :, None])[..., 0]
        return (
            self.yy
            - 2 * cross
            + quadratic
            + 2 * bias * (through - self.y)
            + self.count * bias.square()
        )

    def fitted(self, start: torch.Tensor, ridge: float, free: bool) -> torch.Tensor:
        """See `Fold`: the normal equations, by a Cholesky factorisation."""
        xx, yx = self._centred if free else (self.xx, self.yx)
        level = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0)
        noise = NOISE * self.xx.diagonal(dim1=1, dim2=2).mean(1)
        system = xx.clone()
        system.diagonal(dim1=1, dim2=2).add_((ridge * level + noise + TINY)[:, None])
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            return start
        missing = self._missing.of(start, free, lambda: (yx - start @ xx).transpose(1, 2))
        return start + torch.cholesky_solve(missing, factor).transpose(1, 2)


@dataclass
class Vectors:
    """Vectors x and targets y as they are, where they are fewer than x is long; see `Fold`.

    Attributes:
        inputs: x, (blocks, vectors, in).
        targets: y, (blocks, vectors, out).
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        self.inputs, self.targets = self.inputs.double(), self.targets.double()
        self._missing = _Last()

    def __add__(self, other: Vectors) -> Vectors:
        """Both together."""
        return Vectors(
            torch.cat([self.inputs, other.inputs], 1), torch.cat([self.targets, other.targets], 1)
        )

    @property
    def count(self) -> int:
        """Number of vectors."""
        return self.inputs.shape[1]

    @cached_property
    def x(self) -> torch.Tensor:
        """Sum of x, (blocks, in)."""
        return self.inputs.sum(1)

    @cached_property
    def y(self) -> torch.Tensor:
        """Sum of y, (blocks, out)."""
        return self.targets.sum(1)

    @cached_property
    def yy(self) -> torch.Tensor:
        """Sum of y squared, (blocks, out)."""
        return self.targets.square().sum(1)

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `Fold`."""
        missed = self.targets - self.inputs @ weight.transpose(1, 2) - bias[:, None, :]
        return missed.square().sum(1)

    @cached_property
    def _centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs less their mean, and their inner products (blocks, vectors, vectors)."""
        inputs = self.inputs - self.x[:, None, :] / self.count
        return inputs, inputs @ inputs.transpose(1, 2)

    @cached_property
    def _plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs, self.inputs @ self.inputs.transpose(1, 2)

    def fitted(self, start: torch.Tensor, ridge: float, free: bool) -> torch.Tensor:
        """See `Fold`: W - start is a combination of the vectors (push-through identity).

        X^T (X X^T + c I)^-1 = (X^T X + c I)^-1 X^T for X (vectors, in): the same solution from a
        system as large as there are vectors.
        """
        inputs, gram = self._centred if free else self._plain
        level = gram.diagonal(dim1=1, dim2=2).sum(1) / inputs.shape[2]
        noise = NOISE * self.inputs.square().sum(1).mean(1)
        system = gram.clone()
        system.diagonal(dim1=1, dim2=2).add_((ridge * level + noise + TINY)[:, None])
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            return start
        missing = self._missing.of(
            start, free, lambda: self.targets - self.inputs @ start.transpose(1, 2)
        )
        if free:
            # The inputs are centred, so that a constant makes no difference.
            missing = missing - missing.mean(1, keepdim=True)
        return start + torch.cholesky_solve(missing, factor).transpose(1, 2) @ inputs


def tensors_of(moments: Moments) -> list[torch.Tensor]:
    """The sums, in the order of the attributes."""
    return [getattr(moments, f.name) for f in fields(moments) if f.name != "count"]


def over_processes(moments: Moments, label: str, everyone: Processes) -> Moments:
    """Moments of the vectors of all processes.

    Args:
        moments: Of those of this one.
        label: What they are.
        everyone: The processes.
    """
    if everyone.size == 1:
        return moments
    count, *sums = everyone.summed(label, [torch.tensor(moments.count), *tensors_of(moments)])
    return Moments(int(count), *sums)
