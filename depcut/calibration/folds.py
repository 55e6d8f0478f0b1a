"""Second moments of the batches in two folds, one of which tells a fit of the other from chance."""

from __future__ import annotations

import torch

from depcut.calibration.moments import FOLDS, Moments, over_processes
from depcut.support.processes import Processes


class Folds:
    """Moments of two folds that share no batch, or halves of the only batch.

    Args:
        batches: How many there are, in all processes.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._folds: dict[int, Moments] = {}

    def add(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            number: Of the batch, among those of all processes.
            x: Vectors (blocks, vectors, in).
            y: Targets (blocks, vectors, out).
        """
        fold = number % FOLDS
        half = x.shape[1] // 2
        if self.batches == 1 and half:
            self._folds = {
                0: Moments.of(x[:, :half], y[:, :half]),
                1: Moments.of(x[:, half:], y[:, half:]),
            }
        elif fold in self._folds:
            self._folds[fold] += Moments.of(x, y)
        else:
            self._folds[fold] = Moments.of(x, y)

    def moments(self, label: str, everyone: Processes) -> list[Moments]:
        """Of each fold, over all processes; a single one where the only batch has one vector.

        Args:
            label: What they are of.
            everyone: The processes.
        """
        known = next(iter(self._folds.values()))
        count = FOLDS if self.batches > 1 else len(self._folds)
        folds = [self._folds.get(fold) or known.none() for fold in range(count)]
        return [over_processes(fold, f"moments of {label}", everyone) for fold in folds]
