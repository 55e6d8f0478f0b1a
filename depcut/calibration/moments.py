"""Second moments of what a weight reads and of what it should give, in two folds."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from depcut.support.processes import Processes

FOLDS = 2


@dataclass
class Moments:
    """Sums over vectors x (in) and targets y (out), for each of several independent blocks.

    Accumulated in double precision: (blocks, ...).

    Attributes:
        count: Number of vectors.
        xx: Sum of x x^T.
        x: Sum of x.
        yx: Sum of y x^T.
        y: Sum of y.
        yy: Sum of y squared, by output.
    """

    count: int
    xx: torch.Tensor
    x: torch.Tensor
    yx: torch.Tensor
    y: torch.Tensor
    yy: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Of x (blocks, vectors, in) and y (blocks, vectors, out)."""
        x, y = x.double(), y.double()
        turned = x.transpose(1, 2)
        return Moments(
            x.shape[1],
            turned @ x,
            x.sum(1),
            y.transpose(1, 2) @ x,
            y.sum(1),
            y.square().sum(1),
        )

    def __add__(self, other: Moments) -> Moments:
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

    def centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Covariance sums of x with itself and of y with x."""
        mean = self.x / self.count
        xx = self.xx - self.x[:, :, None] * mean[:, None, :]
        return xx, self.yx - self.y[:, :, None] * mean[:, None, :]

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Sum of |y - W x - b|^2 by block and output, for W (blocks, out, in), b (blocks, out)."""
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
