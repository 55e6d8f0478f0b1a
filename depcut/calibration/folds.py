"""What batches show of one least-squares problem, in two folds: one tells a fit from chance."""

from __future__ import annotations

import torch

from depcut.calibration.moments import FOLDS, Fold, Moments, Vectors, over_processes
from depcut.support.processes import Processes

Part = tuple[int, torch.Tensor, torch.Tensor]


class Folds:
    """Two folds that share no batch, or halves of the only batch.

    Vectors are kept as they are while they are fewer than they are long, which takes less memory
    than their moments.

    Args:
        batches: How many there are, in all processes.
        few: Whether few vectors are kept as they are; moments alone can be summed over processes.
    """

    def __init__(self, batches: int, *, few: bool = True) -> None:
        self.batches, self.count = batches, 0
        self._few: list[Part] | None = [] if few else None
        self._folds: dict[int, Moments] = {}

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            number: Of the batch, among those of all processes.
            x: Vectors (blocks, vectors, in).
            y: Targets (blocks, vectors, out).
        """
        half = x.shape[1] // 2
        parts = [(number % FOLDS, x, y)]
        if self.batches == 1 and half:
            parts = [(0, x[:, :half], y[:, :half]), (1, x[:, half:], y[:, half:])]
        self.count += x.shape[1]
        if self._few is not None:
            self._few += parts
            if self.count < x.shape[2]:
                return
            parts, self._few = self._few, None
        for fold, given, wanted in parts:
            moments = Moments.of(given, wanted)
            self._folds[fold] = self._folds[fold] + moments if fold in self._folds else moments

    def moments(self, label: str, everyone: Processes) -> list[Fold]:
        """Each fold, over all processes; a single one where the only batch has one vector.

        Args:
            label: What they are of.
            everyone: The processes.
        """
        if self._few is not None:
            return [
                Vectors(
                    torch.cat([x for fold, x, _ in self._few if fold == number], 1),
                    torch.cat([y for fold, _, y in self._few if fold == number], 1),
                )
                for number in sorted({fold for fold, _, _ in self._few})
            ]
        known = next(iter(self._folds.values()))
        count = FOLDS if self.batches > 1 else len(self._folds)
        folds = [self._folds.get(fold) or known.none() for fold in range(count)]
        return [over_processes(fold, f"moments of {label}", everyone) for fold in folds]
