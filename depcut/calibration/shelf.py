"""Tensors of a model that live elsewhere, each read once while a stretch of the walk needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


class Shelf(Mapping[str, torch.Tensor]):
    """Tensors by name, held from when they are first asked for until the shelf is cleared.

    Args:
        source: What they are read from; `source[name]` may read a file.
    """

    def __init__(self, source: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._held: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._held:
            self._held[name] = self._source[name]
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._source

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
