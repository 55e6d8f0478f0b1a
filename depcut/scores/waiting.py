"""A reader of a group whose matrices wait in a store while those of others are at work."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from depcut.calibration.store import Store
from depcut.scores.elimination import Weight


class Waiting:
    """A reader that has its two matrices in memory only while units are removed from it.

    A group that all layers read (the width of a stream) has as many readers as there are layers:
    what they take in memory is what the store may hold, at any depth.

    Args:
        reader: It; its matrices go to the store.
        store: Where they wait.
        key: What they are kept by there.
    """

    def __init__(self, reader: Weight, store: Store, key: Hashable) -> None:
        self._reader, self._store, self._key = reader, store, key
        self._losses = reader.losses()
        self._put_away()

    def losses(self) -> torch.Tensor:
        """What removing each unit alone costs, (rows, units)."""
        return self._losses

    def remove(self, units: torch.Tensor) -> float:
        """Remove units (rows, any number) together; the cost."""
        held = self._store.take(self._key)
        for matrix, values in zip(self._matrices(), held, strict=True):
            matrix.update(values)
        del held
        cost = self._reader.remove(units)
        if self._reader.columns.shape[1]:
            self._losses = self._reader.losses()
            self._put_away()
        return cost

    def _matrices(self) -> list[dict[str, torch.Tensor]]:
        """What the two matrices are made of, by name."""
        return [vars(self._reader.inverse), vars(self._reader.gram)]

    def _put_away(self) -> None:
        self._store.put(self._key, [dict(matrix) for matrix in self._matrices()])
        for matrix in self._matrices():
            matrix.clear()
