"""A result in short: a title, numbers, rows, lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of a result, with text in every cell.

    Attributes:
        columns: Headings; a number stands in the columns after the first.
        rows: As many cells each.
        title: What they are; a long table is folded behind it.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""


@dataclass(frozen=True)
class Summary:
    """A result in short.

    Attributes:
        title: What it is.
        facts: Numbers by what they are of.
        tables: Rows of it.
        notes: Lines of text.
        changes: Diffs by what they are of.
    """

    title: str
    facts: Mapping[str, str]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    changes: Mapping[str, str] = field(default_factory=dict)
