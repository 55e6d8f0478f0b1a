"""What batches show of one least-squares problem, in two folds: one tells a fit from chance."""

from __future__ import annotations

import torch

from depcut.calibration.moments import FOLDS, Fold, Moments, Vectors, over_processes
from depcut.calibration.window_moments import WindowMoments
from depcut.calibration.windows import Windows
from depcut.support.processes import Processes

Part = tuple[int, torch.Tensor | Windows, torch.Tensor]


class Folds:
    """Two folds that share no batch, or halves of the only batch.

    Vectors are kept as they are while they are fewer than they are long, which takes less memory
    than their moments.

    Args:
        batches: How many there are, in all processes.
    """

    def __init__(self, batches: int) -> None:
        self.batches, self.count = batches, 0
        self._few: list[Part] | None = []
        self._folds: dict[int, Moments] = {}
        self._windows: dict[int, WindowMoments] = {}

    def add(self, number: int, x: torch.Tensor | Windows, y: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            number: Of the batch, among those of all processes.
            x: Vectors (blocks, vectors, in), or patches, whose sums may be had for less.
            y: Targets (blocks, vectors, out).
        """
        if self.batches == 1 and isinstance(x, Windows):
            x = x.vectors()
        if isinstance(x, Windows):
            self._add([(number % FOLDS, x, y)])
            return
        half = x.shape[1] // 2
        parts: list[Part] = [(number % FOLDS, x, y)]
        if self.batches == 1 and half:
            parts = [(0, x[:, :half], y[:, :half]), (1, x[:, half:], y[:, half:])]
        self._add(parts)

    def _add(self, parts: list[Part]) -> None:
        """Take in parts of a batch."""
        for _, x, _ in parts:
            count, length = (x.count, x.length) if isinstance(x, Windows) else x.shape[1:]
            self.count += count
        if self._few is None:
            self._sum(parts)
        else:
            self._few += parts
            if self.count >= length:
                self._sum_few()

    def _sum(self, parts: list[Part]) -> None:
        for fold, x, y in parts:
            if isinstance(x, Windows):
                if fold not in self._windows:
                    self._windows[fold] = WindowMoments(x)
                self._windows[fold].add(x, y)
                continue
            moments = Moments.of(x, y)
            self._add_moments(fold, moments)

    def _add_moments(self, fold: int, moments: Moments) -> None:
        self._folds[fold] = self._folds[fold] + moments if fold in self._folds else moments

    def _sum_few(self) -> None:
        """Keep the moments of what was kept as it is."""
        parts, self._few = self._few or [], None
        self._sum(parts)

    def moments(self, label: str, everyone: Processes) -> list[Fold]:
        """Each fold, over all processes; a single one where the only batch has one vector.

        Args:
            label: What they are of.
            everyone: The processes.
        """
        count = FOLDS if self.batches > 1 else len(self._folds) or len(self._few or ())
        (total,) = everyone.total(f"vectors of {label}", self.count)
        if self._few is not None:
            x = self._few[0][1]
            if total < (x.length if isinstance(x, Windows) else x.shape[2]):
                return [self._vectors(fold, label, everyone) for fold in range(count)]
            self._sum_few()
        for fold in list(self._windows):
            self._add_moments(fold, self._windows.pop(fold).moments())
        known = next(iter(self._folds.values()))
        folds = [self._folds.get(fold) or known.none() for fold in range(count)]
        return [over_processes(fold, f"moments of {label}", everyone) for fold in folds]

    def _vectors(self, number: int, label: str, everyone: Processes) -> Vectors:
        """Few vectors of a fold, those of all processes."""
        assert self._few is not None
        every = [(f, x.vectors() if isinstance(x, Windows) else x, y) for f, x, y in self._few]
        none = [(x[:, :0], y[:, :0]) for _, x, y in every[:1]]
        mine = [(x, y) for fold, x, y in every if fold == number] or none
        x, y = (torch.cat(parts, 1) for parts in zip(*mine, strict=True))
        return Vectors(
            everyone.concatenated(f"inputs of {label}", x, 1),
            everyone.concatenated(f"targets of {label}", y, 1),
        )
