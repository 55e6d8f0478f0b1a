"""Kept counts and indices of a term, and values spread over its axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from depcut.axes.terms import Axis, Product, Term

Indices = NDArray[np.int64]


def count(term: Term, kept: Callable[[Axis], int]) -> int:
    """How many indices of a resolved term stay, given how many of each axis do."""
    if isinstance(term, Axis):
        return term.size if term.reason else kept(term)
    if isinstance(term, Product):
        return math.prod(count(f, kept) for f in term.factors)
    return sum(count(p, kept) for p in term.parts)


def indices(term: Term, kept: Mapping[Axis, Indices]) -> Indices:
    """The kept indices of a resolved term, ascending, given those of its axes (absent: all)."""
    if isinstance(term, Axis):
        given = kept.get(term)
        return np.arange(term.size, dtype=np.int64) if given is None else given
    if isinstance(term, Product):
        out = np.zeros(1, dtype=np.int64)
        for factor in term.factors:
            out = (out[:, None] * factor.size + indices(factor, kept)).reshape(-1)
        return out
    starts = itertools.accumulate((p.size for p in term.parts), initial=0)
    return np.concatenate([s + indices(p, kept) for s, p in zip(starts, term.parts, strict=False)])


def units(term: Term, axis: Axis) -> Indices:
    """Which index of `axis` each index of a resolved term belongs to; -1: it does not occur."""
    if isinstance(term, Axis):
        return np.arange(term.size) if term is axis else np.full(term.size, -1, dtype=np.int64)
    if isinstance(term, Product):
        out = np.full(1, -1, dtype=np.int64)
        for factor in term.factors:
            inner = units(factor, axis)
            out = np.maximum(out[:, None], inner).reshape(-1)
        return out
    return np.concatenate([units(part, axis) for part in term.parts])


def project(term: Term, values: NDArray[np.float64]) -> Iterator[tuple[Axis, NDArray[np.float64]]]:
    """Sum per-index values of a resolved term onto the indices of each of its axes."""
    if isinstance(term, Axis):
        yield term, values
    elif isinstance(term, Product):
        grid = values.reshape([f.size for f in term.factors])
        for i, factor in enumerate(term.factors):
            others = tuple(j for j in range(grid.ndim) if j != i)
            yield from project(factor, grid.sum(axis=others))
    else:
        start = 0
        for part in term.parts:
            yield from project(part, values[start : start + part.size])
            start += part.size
