"""Greedy elimination: the units that cost least go first, what is left is re-solved each time.

Units may be chosen row by row (head_dim of each head, inputs of each convolution group): every
round then takes equally many from each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
        cost = float(_block(self.gram, units, units).sum() + 2 * self.extra.gather(1, units).sum())
        self.extra = self.extra.gather(1, left) + _block(self.gram, units, left).sum(1)
        self.gram = _block(self.gram, left, left)
        return cost


@dataclass
class Weight:
    """One weight that reads a group, for the units that are left.

    Attributes:
        inverse: Inverse of the damped covariance of its inputs, (blocks, in, in); written to.
        gram: W^T W over the outputs, (blocks, in, in); written to.
        columns: Columns of each unit, (rows, units, columns of a unit).
        blockwise: Whether each row is a block of its own; else all blocks lose the same columns.
        gone: Columns that went and still take part as zeros, by block.
    """

    inverse: torch.Tensor
    gram: torch.Tensor
    columns: torch.Tensor
    blockwise: bool = False
    gone: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.int64))

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs, (rows, units)."""
        blocks, (rows, units, wide) = len(self.inverse), self.columns.shape
        at = self.columns.reshape(rows if self.blockwise else 1, -1)
        at = at.expand(blocks, -1).reshape(blocks, -1, wide)
        own = [
            m[torch.arange(blocks)[:, None, None, None], at[..., :, None], at[..., None, :]]
            for m in (self.inverse, self.gram)
        ]
        cost = _trace(own[0], own[1])
        return cost if self.blockwise else cost.sum(0).reshape(rows, units)

    def remove(self, units: torch.Tensor) -> float:
        """Remove units (rows, any number) together and re-solve what is left; the cost."""
        rows, _, wide = self.columns.shape
        picked = self.columns.gather(1, units[:, :, None].expand(-1, -1, wide))
        gone = picked.reshape(rows if self.blockwise else 1, -1).expand(len(self.inverse), -1)
        self.gone = torch.cat([self.gone.expand(len(gone), -1), gone], 1)
        batch = torch.arange(len(gone))[:, None]
        within, square = _block(self.inverse, gone, gone), _block(self.gram, gone, gone)
        cost = float(_trace(within, square).sum())
        # With T = (H^-1)_SS^-1 (H^-1)_S: the new gram is (I - E T)^T G (I - E T), E picks S.
        across = self.inverse[batch, gone]
        through = torch.linalg.solve(within, across)
        turned = through.transpose(1, 2)
        half = self.gram[batch, gone].transpose(1, 2) - 0.5 * turned @ square
        self.inverse.baddbmm_(across.transpose(1, 2), through, alpha=-1)
        self.gram.baddbmm_(half, through, alpha=-1)
        self.gram.baddbmm_(turned, half.transpose(1, 2), alpha=-1)
        stay = _others(units, self.columns.shape[1])
        self.columns = self.columns.gather(1, stay[:, :, None].expand(-1, -1, wide))
        if self.gone.shape[1] >= _SPARSE * self.inverse.shape[-1]:
            self._compact()
        return cost

    def _compact(self) -> None:
        """Drop rows and columns of what is gone, which are zeros, all at once."""
        left = _others(self.gone, self.inverse.shape[-1])
        self.inverse, self.gram = (_block(m, left, left) for m in (self.inverse, self.gram))
        rows = len(self.columns) if self.blockwise else 1
        places = torch.searchsorted(left[:rows], self.columns.reshape(rows, -1))
        self.columns = places.reshape(self.columns.shape)
        self.gone = self.gone[:, :0]


def _block(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows and columns (batch, any number each) of a batch of matrices."""
    batch = torch.arange(len(matrix))[:, None, None]
    return matrix[batch, rows[:, :, None], columns[:, None, :]]


def _others(gone: torch.Tensor, size: int) -> torch.Tensor:
    """All other indices below `size`, ascending, by row."""
    mask = torch.ones(len(gone), size, dtype=torch.bool).scatter(1, gone, False)
    return mask.nonzero()[:, 1].reshape(len(gone), -1)


def _trace(inverse: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """tr(inverse^-1 gram) over the last two dimensions, never negative."""
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
