"""Kept indices of whole tensors, where a choice may differ from row to row of an outer axis.

Where outer and inner axis are factors of one dimension, its kept indices are a list as ever. Where
they are dimensions of their own (a grouped convolution's weight: groups x out, in), the indices
along the inner one vary along the outer one: an array with the tensor's rank, of size 1 along all
other dimensions, as numpy's `ix_` gives them.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from depcut import axes
from depcut.axes import Axis, Concat, Dims, Indices, Product, Term


@dataclass(frozen=True, eq=False)
class Rows:
    """Kept indices of an inner axis for each index of its outer one.

    Attributes:
        outer: The outer axis.
        kept: Ascending kept indices, of shape [outer.size, count].
    """

    outer: Axis
    kept: Indices


@dataclass(frozen=True, eq=False)
class Selection:
    """Kept indices of axes: the same everywhere, or row by row of an outer axis."""

    units: Mapping[Axis, Indices]
    rows: Mapping[Axis, Rows]

    def __contains__(self, axis: object) -> bool:
        return axis in self.units or axis in self.rows

    def narrows(self, term: Term) -> bool:
        """Whether an index of a resolved term goes."""
        return any(leaf in self for leaf in axes.leaves(term))

    def count(self, axis: Axis) -> int:
        """How many indices of an axis stay."""
        if axis in self.rows:
            return int(self.rows[axis].kept.shape[1])
        return len(self.units[axis]) if axis in self.units else axis.size

    def at(self, inner: list[Axis], row: int) -> Selection:
        """The selection within one row of the outer axis of some axes."""
        here = {a: self.rows[a].kept[row] for a in inner}
        units = ChainMap(here, cast(dict[Axis, Indices], self.units))
        return Selection(units, {a: r for a, r in self.rows.items() if a not in inner})

    def indices(self, term: Term) -> Indices:
        """Kept indices of a resolved term in the order in which they stay."""
        inner = [leaf for leaf in axes.leaves(term) if leaf in self.rows]
        if not inner:
            return axes.indices(term, self.units)
        if isinstance(term, Concat):
            starts = itertools.accumulate((p.size for p in term.parts), initial=0)
            return np.concatenate(
                [s + self.indices(p) for s, p in zip(starts, term.parts, strict=False)]
            )
        assert isinstance(term, Product), f"{term} varies along another dimension"
        head, tail = term.factors[0], axes.product(*term.factors[1:])
        own = self.indices(head) * tail.size
        bound = [a for a in dict.fromkeys(inner) if self.rows[a].outer is head]
        if not bound:
            return np.asarray((own[:, None] + self.indices(tail)).reshape(-1))
        rows = [self.at(bound, row).indices(tail) for row in own // tail.size]
        return np.asarray((own[:, None] + np.stack(rows)).reshape(-1))


def indices_by_dim(dims: Dims, chosen: Selection) -> tuple[Indices | None, ...]:
    """Kept indices of each dimension of a tensor.

    Args:
        dims: Resolved terms of its dimensions.
        chosen: What stays.

    Returns:
        For each dimension None (all stay), a list, or an array with the tensor's rank that varies
        along other dimensions, too, counted in what stays of those.
    """
    return tuple(indices_along(dims, i, chosen) for i in range(len(dims)))


def indices_along(
    dims: Dims, dim: int, chosen: Selection, *, dense: bool = False
) -> Indices | None:
    """Kept indices of one dimension of a tensor, see `indices_by_dim`.

    Args:
        dims: Resolved terms of its dimensions.
        dim: Which of them.
        chosen: What stays.
        dense: Take the other dimensions to be whole.
    """
    term = dims[dim]
    if not chosen.narrows(term):
        return None
    inner = _open(term, chosen)
    if not inner:
        return chosen.indices(term)
    outers = list(dict.fromkeys(chosen.rows[a].outer for a in inner))
    places = [_place(dims, dim, outer) for outer in outers]
    others = Selection({}, {}) if dense else chosen
    at = [_rows_along(dims[p], o, others) for p, o in zip(places, outers, strict=True)]
    table = _table(term, list(zip(outers, at, strict=True)), inner, chosen)
    order = np.argsort([*places, dim])
    shape = np.ones(len(dims), dtype=np.int64)
    shape[[*places, dim]] = table.shape
    return np.asarray(table.transpose(order).reshape(shape))


def _open(term: Term, chosen: Selection) -> list[Axis]:
    """Axes of a term with kept rows whose outer axis lies in another dimension."""
    if isinstance(term, Axis):
        return [term] if term in chosen.rows else []
    children = term.factors if isinstance(term, Product) else term.parts
    separated = list(dict.fromkeys(a for child in children for a in _open(child, chosen)))
    if isinstance(term, Concat):
        return separated
    return [a for a in separated if not any(chosen.rows[a].outer is f for f in term.factors)]


def _place(dims: Dims, dim: int, outer: Axis) -> int:
    """The other dimension in which the outer axis is (a factor)."""
    return next(
        j
        for j, term in enumerate(dims)
        if j != dim
        and any(f is outer for f in (term.factors if isinstance(term, Product) else (term,)))
    )


def _rows_along(term: Term, outer: Axis, chosen: Selection) -> Indices:
    """The index of the outer axis at every index that stays of its dimension."""
    inner = _open(term, chosen)  # which index stays does not matter: the rows keep equally many
    kept = chosen.at(inner, 0).indices(term)
    if isinstance(term, Axis):
        return kept
    assert isinstance(term, Product)
    number = next(i for i, f in enumerate(term.factors) if f is outer)
    return np.asarray(kept // axes.product(*term.factors[number + 1 :]).size % outer.size)


def _table(
    term: Term, at: list[tuple[Axis, Indices]], inner: list[Axis], chosen: Selection
) -> Indices:
    """Kept indices of a term for every combination of rows, one dimension an outer axis."""
    if not at:
        return chosen.indices(term)
    (outer, rows), *rest = at
    bound = [a for a in inner if chosen.rows[a].outer is outer]
    left = [a for a in inner if a not in bound]
    distinct, back = np.unique(rows, return_inverse=True)
    return np.stack([_table(term, rest, left, chosen.at(bound, int(r))) for r in distinct])[back]


def broadcastable(kept: Indices | None, size: int, dim: int, rank: int) -> Indices:
    """Kept indices of a dimension as an array of the tensor's rank.

    Args:
        kept: All if None, a list, or an array of that rank already.
        size: Of the dimension.
        dim: Its number.
        rank: Of the tensor.
    """
    whole = np.arange(size) if kept is None else kept
    if whole.ndim == rank:
        return whole
    return whole.reshape([-1 if i == dim else 1 for i in range(rank)])


def fitted(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """The terms for a batch of another size or length than the captured one.

    What varies are the first factors: the batch, and a length that is laid behind it.

    Args:
        dims: Resolved terms of a tensor's dimensions.
        shape: The sizes that it has.
    """
    return tuple(
        term if term.size == size else _resized(term, size)
        for term, size in zip(dims, shape, strict=True)
    )


def _resized(term: Term, size: int) -> Term:
    """The term with its outermost, frozen factors resized; unchanged where it has none."""
    factors = term.factors if isinstance(term, Product) else (term,)
    head = 1
    for number, factor in enumerate(factors, start=1):
        if not isinstance(factor, Axis) or factor.reason is None:
            return term
        head *= factor.size
        whole, left = divmod(size * head, term.size)
        if not left:
            return axes.product(axes.axis(whole, factor.reason), *factors[number:])
    return term
