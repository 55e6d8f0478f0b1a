"""What batches show of one least-squares problem, in two folds: one tells a fit from chance."""

from __future__ import annotations

import torch

from depcut.calibration.moments import FOLDS, Fold, Moments, Vectors

Part = tuple[int, torch.Tensor, torch.Tensor]


class Folds:
    """Two folds that share no batch, or halves of the only batch.

    Vectors are kept as they are while they are fewer than they are long, which takes less memory
    than their moments.

    Args:
        batches: How many there are.
    """

    def __init__(self, batches: int) -> None:
        self.batches, self.count = batches, 0
        self._seen = 0
        self._few: list[Part] | None = []
        self._folds: dict[int, Moments] = {}

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in the next batch: x (blocks, vectors, in), y (blocks, vectors, out)."""
        half = x.shape[1] // 2
        parts = [(self._seen % FOLDS, x, y)]
        if self.batches == 1 and half:
            parts = [(0, x[:, :half], y[:, :half]), (1, x[:, half:], y[:, half:])]
        self._seen += 1
        self.count += x.shape[1]
        if self._few is not None:
            self._few += parts
            if self.count < x.shape[2]:
                return
            parts, self._few = self._few, None
        for fold, given, wanted in parts:
            moments = Moments.of(given, wanted)
            self._folds[fold] = self._folds[fold] + moments if fold in self._folds else moments

    def moments(self) -> list[Fold]:
        """Each fold; a single one where the only batch has one vector."""
        if self._few is None:
            return [self._folds[fold] for fold in sorted(self._folds)]
        out: list[Fold] = []
        for number in sorted({fold for fold, _, _ in self._few}):
            given = torch.cat([x for fold, x, _ in self._few if fold == number], 1)
            wanted = torch.cat([y for fold, _, y in self._few if fold == number], 1)
            out.append(Vectors(given, wanted))
        return out
