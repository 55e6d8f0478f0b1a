"""Kept units as a user or a file gives them: checked, sorted, one list or one for each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from depcut.axes import Indices
from depcut.coupling.groups import Coupling, Group
from depcut.errors import PlanError, listed
from depcut.support.failures import reraise_fatal, shown


def units_of(name: str, sizes: Mapping[str, int], kept: Any) -> Indices:
    """Ascending kept units of a group.

    Args:
        name: The group.
        sizes: Sizes of all groups, by name.
        kept: Its units in any order: one list, or one for each row of its outer axis.

    Returns:
        Of shape [count] or [rows, count].

    Raises:
        PlanError: Unknown group, or impossible units.
    """
    if name not in sizes:
        raise PlanError(f"unknown group {name!r}", remedy="the file is no plan of this depcut")
    try:
        units = np.asarray(kept)
    except ValueError:  # numpy's word for rows of unequal lengths
        raise _uneven(name, kept) from None
    except Exception as error:
        reraise_fatal(error)
        raise PlanError(
            f"the kept units are {shown(kept)}",
            where=f"group {name!r}",
            remedy="keep one list of units",
        ) from error
    problem = ""
    if not units.size:
        problem = "none are kept"
    elif units.ndim not in (1, 2):
        problem = "they are no flat list, nor one for each row"
    elif units.dtype.kind not in "iu":
        problem = f"{listed([shown(u) for u in units.reshape(-1).tolist()[:9]])} are not integers"
    else:
        ordered = np.sort(units, axis=-1)
        wrong = ordered[(ordered < 0) | (ordered >= sizes[name])]
        again = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        if len(wrong):
            problem = f"{listed([str(u) for u in np.unique(wrong)])} is out of range"
        elif len(again):
            row = next(r for r in np.atleast_2d(ordered) if again[0] in r[1:][r[1:] == r[:-1]])
            problem = f"{again[0]} occurs {(row == again[0]).sum()} times"
    if problem:
        raise PlanError(
            f"the kept units of a group of {sizes[name]} are impossible: {problem}",
            where=f"group {name!r}",
            remedy=f"keep at least one unit, each once, numbered 0 to {sizes[name] - 1}",
        )
    return ordered.astype(np.int64)


def others(kept: Indices, size: int) -> Indices:
    """The units that are not kept, in the kept ones' form: [gone], or [rows, gone].

    Args:
        kept: Of shape [count] or [rows, count].
        size: Units of the group.
    """
    gone = np.ones((*kept.shape[:-1], size), dtype=bool)
    np.put_along_axis(gone, kept, values=False, axis=-1)
    return np.nonzero(gone)[-1].reshape(*kept.shape[:-1], size - kept.shape[-1])


def _uneven(name: str, kept: Any) -> PlanError:
    """The error for rows that keep different numbers of units."""
    lengths = [len(row) if isinstance(row, list | tuple | np.ndarray) else 0 for row in kept]
    other = next((i for i, n in enumerate(lengths) if n != lengths[0]), 0)
    return PlanError(
        f"row 0 keeps {lengths[0]} units and row {other} keeps {lengths[other]}",
        where=f"group {name!r}",
        remedy="keep equally many units in every row: they become one dense dimension",
    )


def check_rows(coupling: Coupling, units: Mapping[str, Indices]) -> None:
    """Refuse rows that a group does not have.

    Args:
        coupling: The groups.
        units: Kept units of some of them, by name.

    Raises:
        PlanError: A group has no outer axis, or one of another size.
    """
    for group in coupling.groups:
        kept = units.get(group.name)
        if kept is None or kept.ndim == 1:
            continue
        if group.row_axis is None:
            raise PlanError(
                f"{len(kept)} rows of units are kept, and the group must keep the same units "
                f"everywhere: {group.alone}",
                where=f"group {group.name!r}",
                remedy="keep one list of units",
            )
        if len(kept) != group.rows:
            raise PlanError(
                f"{len(kept)} rows of units are kept, and there are {group.rows} rows: "
                f"{_outer(coupling, group)}",
                where=f"group {group.name!r}",
                remedy=f"keep one list of units, or {group.rows}, those of removed rows, too",
            )


def _outer(coupling: Coupling, group: Group) -> str:
    """What the rows of a group stand for, in words."""
    outer = None if group.row_axis is None else coupling.group_of.get(group.row_axis)
    return f"the units of {outer.name!r}" if outer else "a dimension of the model's output"


def check_ties(coupling: Coupling, counts: Mapping[str, int]) -> None:
    """Refuse unequal counts of groups that the model cuts evenly.

    Args:
        coupling: The groups.
        counts: Kept count of each, by name.

    Raises:
        PlanError: Tied groups keep different counts.
    """
    tied: dict[int, tuple[str, int]] = {}
    for group in coupling.groups:
        if group.tied is None:
            continue
        count = counts[group.name]
        name, expected = tied.setdefault(group.tied, (group.name, count))
        if count != expected:
            raise PlanError(
                f"{group.name!r} keeps {count} units and {name!r} keeps {expected}, but the model "
                "cuts them evenly",
                where=f"groups {name!r} and {group.name!r}",
                remedy="keep equally many units of both",
            )
