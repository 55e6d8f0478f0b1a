"""What is still to be seen before a group can be scored, and what no group needs any more."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Pending(Generic[Item]):
    """Groups that wait for items, and items that groups still need; linear in their pairs.

    Args:
        needs: The items that each group waits for, by its number.
    """

    def __init__(self, needs: Mapping[int, Iterable[Item]]) -> None:
        self._needs = {number: dict.fromkeys(items) for number, items in needs.items()}
        self._waiting = {number: set(items) for number, items in self._needs.items()}
        self._open: dict[Item, set[int]] = {}
        for number, items in self._needs.items():
            for item in items:
                self._open.setdefault(item, set()).add(number)

    def ready(self, seen: Iterable[Item]) -> list[int]:
        """Numbers of the groups that wait for nothing any more, once items have been seen."""
        out = []
        for item in seen:
            for number in sorted(self._open.get(item, ())):
                if item in self._waiting[number]:
                    self._waiting[number].remove(item)
                    if not self._waiting[number]:
                        out.append(number)
        return out

    def done(self, number: int) -> list[Item]:
        """The items that nothing needs any more, once a group is scored."""
        out = []
        for item in self._needs[number]:
            self._open[item].discard(number)
            if not self._open[item]:
                out.append(item)
        return out
