"""Element saliencies summed to scores of units: over slices, members and groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from depcut import axes
from depcut.axes import Axis, Term
from depcut.scores.context import Context, Scores
from depcut.scores.rows import row_sums

Values = NDArray[np.float64]
Sums = Callable[[str, tuple[int, ...]], torch.Tensor]
"""(parameter, dimensions) -> sums of its elements' saliency over all but these, in their order."""


def by_element(elements: Mapping[str, torch.Tensor]) -> Sums:
    """Sums of one saliency an element, accumulated in double precision.

    Args:
        elements: A tensor of the parameter's shape, by canonical parameter name.
    """

    def sums(name: str, kept: tuple[int, ...]) -> torch.Tensor:
        values = elements[name]
        others = [d for d in range(values.ndim) if d not in kept]
        left = values.sum(dim=others, dtype=torch.float64) if others else values.double()
        return left.permute([sorted(kept).index(d) for d in kept])

    return sums


def unit_sums(term: Term, values: Values) -> Iterator[tuple[Axis, Values]]:
    """Sum per-index values of a dimension onto the units of every axis in it.

    The one place where elements become units.
    """
    return axes.project(term, values)


def totals(
    context: Context, sums: Sums, names: Collection[str] | None = None, *, rows: bool = False
) -> Scores:
    """One vector a group: sums over a unit's slice of each member, aggregated over the members.

    Args:
        context: Groups, and the options "members" and "aggregate".
        sums: The elements' saliency, signed or not.
        names: Only these parameters; a group that none of them narrows with gets zeros.
        rows: Whether groups with an outer axis get an array [rows, size] in place of a vector.
    """
    coupling = context.coupling
    chosen = members(context, names)
    maximum = context.score.aggregate == "max"
    out: list[Values | None] = [None] * len(coupling.groups)
    for (name, dim), wanted in chosen.items():
        values = sums(name, (dim,)).double().cpu().numpy()
        for number, flat in _onto_groups(context, name, dim, values).items():
            before = out[number]
            if number not in wanted:
                continue
            part = _by_row(context, sums, name, dim, number) if rows else None
            part = flat if part is None else part
            if before is None:
                out[number] = part
            else:
                out[number] = np.maximum(before, part) if maximum else before + part
    if context.score.aggregate == "mean":
        counts = np.bincount([n for wanted in chosen.values() for n in wanted], minlength=len(out))
        out = [None if v is None else v / n for v, n in zip(out, counts, strict=True)]
    return [np.zeros(g.size) if v is None else v for g, v in zip(coupling.groups, out, strict=True)]


def _by_row(context: Context, sums: Sums, name: str, dim: int, number: int) -> Values | None:
    """Sums of a member by row of a group's outer axis, None where it has none."""
    group = context.coupling.groups[number]
    if group.row_axis is None:
        return None

    def summed(kept: tuple[int, ...]) -> Values:
        return np.asarray(sums(name, kept).double().cpu().numpy())

    return row_sums(summed, context.coupling.dims[name], group, dim)


def _onto_groups(context: Context, name: str, dim: int, values: Values) -> dict[int, Values]:
    """Values of a dimension by group number; where a group occurs twice in it, both."""
    by_group: dict[int, Values] = {}
    for axis, part in unit_sums(context.coupling.dims[name][dim], values):
        group = context.coupling.group_of.get(axis)
        if group is not None:
            by_group[group.index] = (
                by_group[group.index] + part if group.index in by_group else part
            )
    return by_group


def members(
    context: Context, names: Collection[str] | None = None
) -> dict[tuple[str, int], set[int]]:
    """(parameter, dimension) -> groups of which it is a member that counts.

    Shared parameters count once, under their canonical name and with the roles of all their names.
    A group that has no member of the wanted role has all of its members.

    Args:
        context: Groups, and the option "members".
        names: Only these parameters.
    """
    role = (context.score.members or "all").removesuffix("s")
    out: dict[tuple[str, int], set[int]] = {}
    for group in context.coupling.groups:
        roles: dict[tuple[str, int], set[str]] = {}
        for member in group.members:
            name = context.canonical.get(member.tensor)
            if name in context.weights and (names is None or name in names):
                roles.setdefault((name, member.dim), set()).add(member.role)
        of_role = [place for place, present in roles.items() if role in present]
        for place in of_role or roles:
            out.setdefault(place, set()).add(group.index)
    return out


def compared(context: Context, scores: Scores) -> Scores:
    """Scores made comparable across groups; negative ones are shifted, all by the same number.

    Args:
        context: The option "normalize".
        scores: One vector a group.
    """
    how = context.score.normalize
    if how == "mean":
        scores = [_over(s, float(np.abs(s).mean())) for s in scores]
    elif how == "zscore":
        scores = [_over(s - s.mean(), float(s.std()), 0.0) for s in scores]
    elif how == "size":
        shapes = {name: tensor.shape for name, tensor in context.weights.items()}

        def ones(name: str, kept: tuple[int, ...]) -> torch.Tensor:
            sizes = [shapes[name][d] for d in kept]
            return torch.full(sizes, float(math.prod(shapes[name]) // math.prod(sizes)))

        sizes = [totals(context, ones, rows=rows) for rows in (False, True)]
        scores = [
            s / np.maximum(by_row if s.ndim > 1 else flat, 1)
            for s, flat, by_row in zip(scores, *sizes, strict=True)
        ]
    lowest = min((float(s.min()) for s in scores), default=0.0)
    # An allocation reads scores as what is lost: a share of a sum, which must be positive.
    return [s - lowest for s in scores] if lowest < 0 else scores


def _over(values: Values, scale: float, otherwise: float = 1.0) -> Values:
    return values / scale if scale > 0 else np.full_like(values, otherwise)
