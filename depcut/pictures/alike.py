"""Groups, layers and frozen dimensions that repeat from layer to layer, each kind as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from depcut.support.repeats import collapsed, label, template

Record = dict[str, Any]
_LAYER_AND_NODE = re.compile(r"^layer '[^']*', | \(node [^()]*\)$")


@dataclass(frozen=True)
class Repeated:
    """Records that differ in the indices of their names only.

    Attributes:
        label: Their names as one.
        records: All of them, at least one.
    """

    label: str
    records: tuple[Record, ...]

    @property
    def times(self) -> str:
        """How many there are, where that is more than one."""
        return f"x{len(self.records)}" if len(self.records) > 1 else ""

    def all(self, name: str) -> list[str]:
        """Names in a list that each record has, those of repeated layers as one.

        Args:
            name: Of the list.
        """
        return collapsed(dict.fromkeys(item for record in self.records for item in record[name]))

    def span(self, name: str) -> str:
        """The values of a number that each record has: one, or least and largest.

        Args:
            name: Of the number.
        """
        values = [record[name] for record in self.records]
        return span(values)


def span(values: Iterable[int]) -> str:
    """Numbers as text: one, or the least and the largest.

    Args:
        values: At least one.
    """
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}..{found[-1]:,}"


def repeated(
    records: Iterable[Record], name: str, key: Callable[[Record], Hashable]
) -> list[Repeated]:
    """Records that are alike as one, in the order of the first of each.

    Args:
        records: Any records.
        name: What holds their names.
        key: What is equal in records that are alike, their names aside.
    """
    found: dict[Hashable, list[Record]] = {}
    for record in records:
        found.setdefault((template(record[name]), key(record)), []).append(record)
    return [Repeated(label(r[name] for r in alike), tuple(alike)) for alike in found.values()]


def repeated_groups(groups: Iterable[Record]) -> list[Repeated]:
    """Groups with as many units in the same places of repeated layers, as one.

    Args:
        groups: See `depcut.pictures.record.group_record`.
    """

    def key(group: Record) -> Hashable:
        places = frozenset((template(t), dim, role) for t, dim, role in group["members"])
        return group["units"], group["rows"], group["tie"] is None, places

    return repeated(groups, "group", key)


def repeated_frozen(frozen: Iterable[Record]) -> list[Repeated]:
    """Frozen dimensions of repeated layers that one line of code freezes, as one.

    Args:
        frozen: See `depcut.pictures.record.frozen_record`.
    """
    return repeated(frozen, "tensor", lambda f: (f["dim"], f["size"], f["reason"], line_of(f)))


def line_of(frozen: Record) -> str:
    """The source line that freezes a dimension, without the layer and the node.

    Args:
        frozen: See `depcut.pictures.record.frozen_record`.
    """
    return _LAYER_AND_NODE.sub("", frozen["where"])
