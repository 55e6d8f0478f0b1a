"""Sums of element scores onto units: one number a unit, or one for each row of its outer axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from depcut import axes
from depcut.axes import Axis, Concat, Dims, Product, Term
from depcut.coupling.groups import Group

Values = NDArray[np.float64]

# Sums over all dimensions of a tensor but those named, which stay in the order named.
Summed = Callable[[tuple[int, ...]], Values]


def unit_sums(values: torch.Tensor, dims: Dims, group: Group) -> Values:
    """Sum what each element of a tensor scores onto the units of a group.

    Args:
        values: One score an element.
        dims: Terms of the tensor's dimensions.
        group: Its group; every place in which it occurs counts.

    Returns:
        Of shape [size], or [rows, size] where the group has an outer axis.
    """

    def summed(kept: tuple[int, ...]) -> Values:
        others = [i for i in range(values.ndim) if i not in kept]
        sums = values.sum(dim=others) if others else values
        order = [sorted(kept).index(i) for i in kept]
        return np.asarray(sums.permute(order).double().cpu().numpy())

    return row_sums(summed, dims, group)


def row_sums(summed: Summed, dims: Dims, group: Group, dim: int | None = None) -> Values:
    """The sums of `unit_sums`, from a function that reduces a tensor's dimensions.

    Args:
        summed: Sums over all dimensions but some.
        dims: Terms of the tensor's dimensions.
        group: The group.
        dim: Only where it occurs in this dimension; None: wherever it does.

    Returns:
        Of shape [size], or [rows, size] where the group has an outer axis.
    """
    terms = tuple(map(axes.resolve, dims))
    inner, outer = group.axis, group.row_axis
    total = np.zeros((group.rows, group.size))
    for i, term in enumerate(terms):
        if inner not in axes.leaves(term) or dim not in (None, i):
            continue
        if outer is None:
            parts = axes.project(term, summed((i,)))
            total += sum(part for leaf, part in parts if leaf is inner)
            continue
        place = next((j for j, t in enumerate(terms) if j != i and outer in _factors(t)), None)
        if place is None or _within(term, inner, outer):
            total += _by_row(term, summed((i,)), inner, outer)
        else:
            by_row = _onto(terms[place], summed((i, place)), outer)
            total += _onto(term, by_row.T, inner)
    return total if outer is not None else total[0]


def _factors(term: Term) -> tuple[Term, ...]:
    return term.factors if isinstance(term, Product) else (term,)


def _within(term: Term, inner: Axis, outer: Axis) -> bool:
    """Whether a product in the term has the outer axis as a factor beside the inner one."""
    if isinstance(term, Axis):
        return False
    if isinstance(term, Product) and outer in term.factors:
        return any(leaf is inner for leaf in axes.leaves(term))
    children = term.factors if isinstance(term, Product) else term.parts
    return any(_within(child, inner, outer) for child in children)


def _onto(term: Term, values: Values, axis: Axis) -> Values:
    """Sum values [..., term.size] onto the indices of an axis: [..., axis.size]."""
    if term is axis:
        return values
    out = np.zeros((*values.shape[:-1], axis.size))
    if isinstance(term, Product):
        for factor, part in _unfolded(term, values):
            out += _onto(factor, part, axis)
    elif isinstance(term, Concat):
        for piece, part in _pieces(term, values):
            out += _onto(piece, part, axis)
    return out


def _by_row(term: Term, values: Values, inner: Axis, outer: Axis) -> Values:
    """Sum values [term.size] onto [outer.size, inner.size] wherever both are in one product."""
    out = np.zeros((outer.size, inner.size))
    if isinstance(term, Product) and outer in term.factors:
        at = term.factors.index(outer)
        tail = axes.product(*term.factors[at + 1 :])
        grid = values.reshape(-1, outer.size, tail.size).sum(axis=0)
        return _onto(tail, grid, inner)
    if isinstance(term, Product):
        for factor, part in _unfolded(term, values):
            out += _by_row(factor, part, inner, outer)
    elif isinstance(term, Concat):
        for piece, part in _pieces(term, values):
            out += _by_row(piece, part, inner, outer)
    return out


def _unfolded(term: Product, values: Values) -> list[tuple[Term, Values]]:
    """Each factor with the sums over all the others."""
    lead = values.ndim - 1
    grid = values.reshape(*values.shape[:-1], *(f.size for f in term.factors))
    places = range(lead, grid.ndim)
    return [
        (factor, grid.sum(axis=tuple(j for j in places if j != lead + i)))
        for i, factor in enumerate(term.factors)
    ]


def _pieces(term: Concat, values: Values) -> list[tuple[Term, Values]]:
    """Each part with its values."""
    ends = np.cumsum([part.size for part in term.parts])[:-1]
    return list(zip(term.parts, np.split(values, ends, axis=-1), strict=True))
