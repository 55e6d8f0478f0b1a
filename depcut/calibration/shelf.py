"""Tensors of a model that live elsewhere, each read once while a stretch of the walk needs it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping

import torch


class Shelf(Mapping[str, torch.Tensor]):
    """Tensors by name, held from when they are first asked for until the shelf is cleared.

    Args:
        source: What they are read from; `source[name]` may read a file. It takes items where
            tensors are handed back.

    Attributes:
        changed: Names of the tensors that were handed back.
    """

    def __init__(self, source: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._held: dict[str, torch.Tensor] = {}
        self.changed: set[str] = set()

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

    def hand_back(self, name: str) -> None:
        """Give the source, which takes items then, a tensor that was changed.

        Args:
            name: Of a tensor that was asked for since the shelf was cleared.
        """
        assert isinstance(self._source, MutableMapping)
        self._source[name] = self._held[name]
        self.changed.add(name)

    def clear(self, but: Collection[str] = ()) -> None:
        """Let go of everything; what was handed back is asked for again, as the source has it.

        Args:
            but: Names of what to hold on to.
        """
        for name in [name for name in self._held if name not in but or name in self.changed]:
            del self._held[name]
