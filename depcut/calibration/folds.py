"""Second moments of the batches in two folds, one of which tells a fit of the other from chance."""

from __future__ import annotations

import torch

from depcut.calibration.moments import FOLDS, Moments


class Folds:
    """Moments of two folds that share no batch, or halves of the only batch.

    Args:
        batches: How many there are.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._folds: list[Moments] = []
        self._seen = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in the next batch: x (blocks, vectors, in), y (blocks, vectors, out)."""
        half = x.shape[1] // 2
        if self.batches == 1 and half:
            self._folds = [
                Moments.of(x[:, :half], y[:, :half]),
                Moments.of(x[:, half:], y[:, half:]),
            ]
        elif len(self._folds) < FOLDS:
            self._folds.append(Moments.of(x, y))
        else:
            self._folds[self._seen % FOLDS] += Moments.of(x, y)
        self._seen += 1

    def moments(self) -> list[Moments]:
        """Of each fold; a single one where the only batch has one vector."""
        return self._folds
