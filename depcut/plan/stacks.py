"""Repeated layers that a number of a config counts, and those of them that stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REBUILD = "rebuild"  # the entry of a plan's settings that says what the class is built anew with
LAYERS = "layers"  # what it says of layers

Path = tuple[str | int, ...]  # of a number or a list in nested fields and lists


@dataclass(frozen=True)
class Stack:
    """Repeated layers that one number of a config counts.

    Attributes:
        number: Path of that number.
        lists: Paths of lists of the config that have one entry a layer.
        holders: Names of the lists of modules that hold the layers, entry by entry.
        count: How many layers there are in the dense model.
        kept: Which of them stay, ascending.
    """

    number: Path
    lists: tuple[Path, ...]
    holders: tuple[str, ...]
    count: int
    kept: tuple[int, ...]

    @property
    def cuts(self) -> dict[Path, tuple[int, ...]]:
        """Entries that stay, by the path of a list, or of the number of its entries."""
        return dict.fromkeys((self.number, *self.lists), self.kept)

    @property
    def gone(self) -> tuple[int, ...]:
        """Which layers go."""
        return tuple(i for i in range(self.count) if i not in self.kept)

    @property
    def line(self) -> str:
        """In words."""
        name = ".".join(map(str, self.number))
        stay = ", ".join(map(str, self.kept))
        return f"{name} {self.count} -> {len(self.kept)} ({stay} stay)"

    def record(self) -> dict[str, Any]:
        """It as JSON."""
        return {
            "number": list(self.number),
            "lists": [list(path) for path in self.lists],
            "holders": list(self.holders),
            "count": self.count,
            "kept": list(self.kept),
        }


def stacks_of(settings: Mapping[str, Any]) -> tuple[Stack, ...]:
    """The layers that stay, as a plan's settings say it; () where no layer goes as a whole.

    Args:
        settings: Of the plan.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: They are damaged.
    """
    found = tuple(
        Stack(
            tuple(each["number"]),
            tuple(map(tuple, each["lists"])),
            tuple(each["holders"]),
            each["count"],
            tuple(each["kept"]),
        )
        for each in settings.get(REBUILD, {}).get(LAYERS, ())
    )
    for stack in found:
        if not stack.kept or not {*stack.kept} <= {*range(stack.count)}:
            raise ValueError(f"of {stack.count} layers, {list(stack.kept)} stay")
    return found


def name_now(name: str, stacks: Iterable[Stack]) -> str | None:
    """The name that a module or tensor has once layers before it are gone; None: it is gone.

    Args:
        name: Its name in the dense model.
        stacks: The layers that stay.
    """
    for stack, holder, number, rest in _places(name, stacks):
        return f"{holder}.{stack.kept.index(number)}{rest}" if number in stack.kept else None
    return name


def name_then(name: str, stacks: Iterable[Stack]) -> str:
    """The name that a module or tensor of the smaller model has in the dense one.

    Args:
        name: Its name in the smaller model.
        stacks: The layers that stay.
    """
    for stack, holder, number, rest in _places(name, stacks):
        return f"{holder}.{stack.kept[number]}{rest}"
    return name


def _places(name: str, stacks: Iterable[Stack]) -> Iterator[tuple[Stack, str, int, str]]:
    """The list of layers that a name is in, its name, the layer's number, and what follows."""
    for stack in stacks:
        for holder in stack.holders:
            if name.startswith(f"{holder}."):
                number, dot, rest = name[len(holder) + 1 :].partition(".")
                yield stack, holder, int(number), f"{dot}{rest}"
