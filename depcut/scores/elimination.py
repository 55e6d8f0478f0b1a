"""Greedy elimination: the units that cost least go first, what is left is re-solved each time.

Units may be chosen row by row (head_dim of each head, inputs of each convolution group): every
round then takes equally many from each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from depcut.scores.quadratic import Gram, Inverse, block, columns_of

_ROUNDS = 64  # in which the units of a group are eliminated, at most
_SPARSE = 1 / 8  # of the columns, which are dropped when so many are gone
_TINY = 1e-30


class Reads(Protocol):
    """A reader of a group, restricted to the units that are left."""

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs, (rows, units)."""

    def remove(self, units: torch.Tensor) -> float:
        """Remove units (rows, any number) together; the cost."""


@dataclass
class Terms:
    """A product of two activations that sums over a group.

    Attributes:
        gram: Inner products of its terms, (rows, units, units).
        extra: What the terms that are gone already add to the cost of each unit, (rows, units).
    """

    gram: torch.Tensor
    extra: torch.Tensor

    @staticmethod
    def of(gram: NDArray[np.float64], scale: float, rows: int) -> Terms:
        """Of the inner products of its terms; all together cost `scale`.

        Args:
            gram: (rows or 1, units, units); a single one stands for all rows alike.
            scale: Cost of all terms.
            rows: Rows in which units are chosen.
        """
        if len(gram) != rows:
            gram = np.repeat(gram.sum(0, keepdims=True), rows, axis=0) / rows
        # Terms may cancel to nothing; their own energy then sets the scale.
        own = float(np.trace(gram, axis1=1, axis2=2).sum())
        energy = max(float(gram.sum()), 1e-6 * own, _TINY)
        matrix = torch.from_numpy(gram * (scale / energy))
        return Terms(matrix, torch.zeros(matrix.shape[:2], dtype=matrix.dtype))

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs, (rows, units)."""
        return self.gram.diagonal(dim1=1, dim2=2) + 2 * self.extra

    def remove(self, units: torch.Tensor) -> float:
        """Remove units (rows, any number) together; the cost."""
        left = _others(units, self.gram.shape[-1])
        cost = float(block(self.gram, units, units).sum() + 2 * self.extra.gather(1, units).sum())
        self.extra = self.extra.gather(1, left) + block(self.gram, units, left).sum(1)
        self.gram = block(self.gram, left, left)
        return cost


@dataclass
class Weight:
    """What reads a group: weights that are multiplied with the same inputs, for the units left.

    Attributes:
        inverse: Inverse of the damped covariance of the inputs.
        gram: W^T W over the outputs.
        size: Length of the inputs.
        columns: Columns of each unit, (rows, units, columns of a unit).
        blocks: Blocks of either matrix.
        blockwise: Whether each row is a block of its own; else all blocks lose the same columns.
        scale: What the costs have to be multiplied with, by block (blocks, 1); None: nothing.
    """

    inverse: Inverse
    gram: Gram
    size: int
    columns: torch.Tensor
    blocks: int = 1
    blockwise: bool = False
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # Columns that went and have not been dropped yet, by block.
        self.gone = torch.zeros(self.blocks, 0, dtype=torch.int64)
        self.own = self.inverse.own(self._at())

    def _at(self) -> torch.Tensor:
        """Columns of the units of each block, (blocks, units, columns of a unit)."""
        rows, _, wide = self.columns.shape
        at = self.columns.reshape(rows if self.blockwise else 1, -1)
        return at.expand(self.blocks, -1).reshape(self.blocks, -1, wide)

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs, (rows, units)."""
        cost = self._scaled(_trace(self.own, self.gram.own(self._at())))
        return cost if self.blockwise else cost.sum(0).reshape(self.columns.shape[:2])

    def remove(self, units: torch.Tensor) -> float:
        """Remove units (rows, any number) together and re-solve what is left; the cost."""
        rows, _, wide = self.columns.shape
        picked = self.columns.gather(1, units[:, :, None].expand(-1, -1, wide))
        gone = picked.reshape(rows if self.blockwise else 1, -1).expand(self.blocks, -1)
        self.gone = torch.cat([self.gone, gone], 1)
        across = self.inverse.rows(gone)
        within = across.gather(2, gone[:, None, :].expand(-1, gone.shape[1], -1))
        through = torch.linalg.solve(within, across)
        square = self.gram.remove(gone, through)
        self.inverse.remove(gone, across, through)
        self._keep(_others(units, self.columns.shape[1]))
        at = self._at()
        lost, by = (
            columns_of(m, at.flatten(1)).unflatten(2, at.shape[1:]) for m in (across, through)
        )
        self.own -= lost.permute(0, 2, 3, 1) @ by.transpose(1, 2)
        if self.gone.shape[1] >= _SPARSE * self.size:
            self._compact()
        return float(self._scaled(_trace(within, square)[:, None]).sum())

    def _scaled(self, cost: torch.Tensor) -> torch.Tensor:
        """Costs (blocks, any number) in double precision, in their own unit."""
        return cost.double() if self.scale is None else cost.double() * self.scale

    def _keep(self, stay: torch.Tensor) -> None:
        """Go on with units (rows, any number) alone."""
        rows, units, wide = self.columns.shape
        self.columns = self.columns.gather(1, stay[:, :, None].expand(-1, -1, wide))
        if self.blockwise:
            self.own = self.own[torch.arange(self.blocks)[:, None], stay]
        else:
            self.own = self.own[:, (torch.arange(rows)[:, None] * units + stay).flatten()]

    def _compact(self) -> None:
        """Drop the columns of what is gone, all at once."""
        left = _others(self.gone, self.size)
        self.inverse.compact(left)
        self.gram.compact(left)
        rows = len(self.columns) if self.blockwise else 1
        places = torch.searchsorted(left[:rows], self.columns.reshape(rows, -1))
        self.columns = places.reshape(self.columns.shape)
        self.gone, self.size = self.gone[:, :0], left.shape[1]


def _others(gone: torch.Tensor, size: int) -> torch.Tensor:
    """All other indices below `size`, ascending, by row."""
    mask = torch.ones(len(gone), size, dtype=torch.bool).scatter(1, gone, False)
    return mask.nonzero()[:, 1].reshape(len(gone), -1)


def _trace(inverse: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(inverse^-1 gram) over the last two dimensions, never negative."""
    if inverse.shape[-1] == 1:
        return (gram / inverse)[..., 0, 0].clamp_min(0)
    solved = torch.linalg.solve(inverse, gram)
    trace: torch.Tensor = solved.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.clamp_min(0)


def eliminated(readers: list[Reads], rows: int, size: int) -> NDArray[np.float64]:
    """Score of each unit: the loss added when it goes, not decreasing in the order of going.

    Args:
        readers: What reads the group.
        rows: Rows in which units are chosen.
        size: Units of a row.

    Returns:
        (rows, size).
    """
    alive = np.tile(np.arange(size), (rows, 1))
    at_once = math.ceil(size / _ROUNDS)
    order: list[NDArray[np.int64]] = []
    costs: list[float] = []
    while alive.shape[1]:
        losses = torch.stack([r.losses() for r in readers]).sum(0).numpy()
        next_ones = np.argsort(losses, axis=1, kind="stable")[:, :at_once]
        costs.append(sum(r.remove(torch.from_numpy(next_ones)) for r in readers))
        order.append(np.take_along_axis(alive, next_ones, 1))
        stay = np.ones(alive.shape, dtype=bool)
        np.put_along_axis(stay, next_ones, False, 1)
        alive = alive[stay].reshape(rows, -1)
    scores = np.zeros((rows, size))
    # What costs the same still goes in this order.
    later = 1 + 1e-3 * np.arange(size) / size
    each = _rising(costs, [o.shape[1] for o in order]) * later / rows
    np.put_along_axis(scores, np.concatenate(order, axis=1), np.tile(each, (rows, 1)), 1)
    return scores


def _rising(costs: list[float], counts: list[int]) -> NDArray[np.float64]:
    """Cost of each unit, where a step that costs less than those before shares with them."""
    pools: list[tuple[float, int]] = []
    for step in zip(costs, counts, strict=True):
        cost, count = step
        while pools and pools[-1][0] * count >= cost * pools[-1][1]:
            before = pools.pop()
            cost, count = cost + before[0], count + before[1]
        pools.append((cost, count))
    return np.concatenate([np.full(count, max(cost, 0.0) / count) for cost, count in pools])
