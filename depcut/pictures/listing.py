"""An analysis as text: a row for each group, or for each kind of group in repeated layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from depcut.errors import listed
from depcut.pictures.alike import Repeated, repeated_groups
from depcut.pictures.summary import Summary, Table
from depcut.support.quantities import quantity
from depcut.support.repeats import collapsed
from depcut.support.tables import rendered

Record = dict[str, Any]
COLUMNS = ("group", "units", "narrows", "read by", "tie")
_WIDTH = 110
_NAMES = 4


def group_rows(groups: list[Record], *, full: bool = False) -> list[tuple[str, ...]]:
    """The cells of a table of groups.

    Args:
        groups: See `depcut.pictures.record.group_record`.
        full: A row for each group, also in repeated layers.
    """
    if full:
        return [
            _cells(group["group"], Repeated(group["group"], (group,)), full=True)
            for group in groups
        ]
    return [_cells(f"{r.label}  {r.times}".rstrip(), r) for r in repeated_groups(groups)]


def _cells(name: str, alike: Repeated, *, full: bool = False) -> tuple[str, ...]:
    lists = [alike.records[0][n] if full else alike.all(n) for n in ("narrows", "read_by")]
    tied = alike.records[0]["tie"] is not None
    ties = collapsed(str(r["tie"]) for r in alike.records) if tied else [""]
    narrows, readers = (listed(names, len(names) if full else _NAMES) for names in lists)
    return (name, alike.span("units"), narrows, readers, ties[0])


def listing(analysis: Record, *, full: bool = False) -> str:
    """An analysis as text.

    Args:
        analysis: See `Analysis.to_dict`.
        full: A row for each group and all of its layers, also in repeated layers.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    groups = analysis["groups"]
    table = RichTable(title=f"{analysis['model']}: {len(groups)} groups")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for cells in group_rows(groups, full=full):
        table.add_row(*map(Text, cells))
    return "\n".join([rendered(table, _WIDTH), *remarks(analysis)])


def remarks(analysis: Record) -> list[str]:
    """What an analysis says besides its groups, line by line.

    Args:
        analysis: See `Analysis.to_dict`.
    """
    lines = [
        f"{analysis['macs']:,} MACs, {analysis['params']:,} parameters, "
        f"{analysis['frozen_share']:.1%} frozen"
    ]
    if analysis["calls"] > 1:
        lines.append(f"  {analysis['calls']} example calls; MACs are of the first")
    if analysis["unused"]:
        lines.append(f"  no example call uses: {listed(collapsed(analysis['unused']), _NAMES)}")
    if analysis["branches"]:
        names = collapsed(branch["name"] for branch in analysis["branches"])
        lines.append(f"  residual branches (depth=True): {listed(names, _NAMES)}")
    reasons = Counter(frozen["reason"] for frozen in analysis["frozen"])
    lines += [f"  frozen: {why} ({times} dimensions)" for why, times in reasons.most_common()]
    for target, nodes in analysis["unknown"].items():
        lines.append(f"  no working rule: {target} at {listed(nodes, 3)}")
    return lines + [f"  note: {note}" for note in analysis["notes"]]


def analysis_summary(analysis: Record) -> Summary:
    """An analysis in short, as notebooks show it.

    Args:
        analysis: See `Analysis.to_dict`.
    """
    groups = analysis["groups"]
    facts = {
        "MACs": quantity(analysis["macs"]),
        "parameters": quantity(analysis["params"]),
        "groups": str(len(groups)),
        "frozen": f"{analysis['frozen_share']:.1%}",
    }
    table = Table(COLUMNS, group_rows(groups), "groups")
    return Summary(
        f"Analysis of {analysis['model']}", facts, (table,), tuple(remarks(analysis)[1:])
    )
