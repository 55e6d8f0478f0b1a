"""Dimensions as terms, and their inference by unification. Pure Python and numpy, no torch.

A term denotes an ordered set of indices:

    Axis(n)          n indices that can be kept or removed one by one
    Product(t, ...)  row-major factors: 768 = heads(12) x head_dim(64)
    Concat(t, ...)   terms laid end to end: 256 = a(64) ++ b(192)

An axis is a cell: unification binds it to a term of its size, everywhere at once. Binding only ever
refines, so inference terminates (occurs check, plus a bound on the work of one unification).
A frozen axis keeps all of its indices and knows why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_WORK_LIMIT = 4096
_serial = itertools.count()


@dataclass(frozen=True)
class Reason:
    """Why an axis is frozen: what stopped it, and the graph node where that happened."""

    why: str
    node: str | None = None


@dataclass(eq=False, slots=True)
class Axis:
    """A cell: `size` indices, perhaps frozen for a reason, perhaps bound to a finer term."""

    size: int
    reason: Reason | None = None
    bound: Term | None = None
    serial: int = field(default_factory=lambda: next(_serial))

    def __repr__(self) -> str:
        return f"{'!' if self.reason else ''}a{self.serial}({self.size})"


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """Row-major factors; no factor of size 1, none that is itself a product."""

    factors: tuple[Term, ...]
    size: int

    def __repr__(self) -> str:
        return "(" + " x ".join(map(repr, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True, eq=False, slots=True)
class Concat:
    """At least two parts laid end to end; no part of size 0, none that is itself a concat."""

    parts: tuple[Term, ...]
    size: int

    def __repr__(self) -> str:
        return "[" + " ++ ".join(map(repr, self.parts)) + "]"


Term = Axis | Product | Concat

UNIT = Product((), 1)
SINGLE = Reason("a single index cannot be removed")


def axis(size: int, reason: Reason | None = None) -> Term:
    """A fresh axis; one index alone is the unit term."""
    return UNIT if size == 1 else Axis(size, reason)


def product(*factors: Term) -> Term:
    """The row-major product in normal form."""
    flat: list[Term] = []
    for factor in factors:
        if isinstance(factor, Product):
            flat.extend(factor.factors)
        else:
            flat.append(factor)
    if len(flat) == 1:
        return flat[0]
    return Product(tuple(flat), math.prod(f.size for f in flat)) if flat else UNIT


def concat(*parts: Term) -> Term:
    """The concatenation in normal form: flat, neighbouring frozen parts merged into one axis."""
    flat: list[Term] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Concat) else (part,):
            if piece.size == 0:
                continue
            last = flat[-1] if flat else None
            if last is not None and _merges(last) and _merges(piece):
                why = last.reason if isinstance(last, Axis) else None
                why = why or (piece.reason if isinstance(piece, Axis) else None)
                flat[-1] = Axis(last.size + piece.size, why or SINGLE)
            else:
                flat.append(piece)
    if len(flat) == 1:
        return flat[0]
    return Concat(tuple(flat), sum(p.size for p in flat)) if flat else Axis(0, SINGLE)


def _merges(term: Term) -> bool:
    return term is UNIT or (isinstance(term, Axis) and term.reason is not None)


def resolve(term: Term) -> Term:
    """The term with every bound axis replaced by what it is bound to, in normal form."""
    if isinstance(term, Axis) and term.bound is None:
        return term
    # Post-order without recursion: rotations make chains of bindings as long as an axis.
    seen: set[Axis] = set()
    stack: list[tuple[Term, bool]] = [(term, False)]
    while stack:
        item, entered = stack.pop()
        if not isinstance(item, Axis):
            stack.extend((child, False) for child in _children(item))
        elif item.bound is None:
            continue
        elif entered:
            item.bound = _normal(item.bound)
        elif item not in seen:
            seen.add(item)
            stack += [(item, True), (item.bound, False)]
    return _normal(term)


def _children(term: Product | Concat) -> tuple[Term, ...]:
    return term.factors if isinstance(term, Product) else term.parts


def _normal(term: Term) -> Term:
    """Normal form of a term whose bound axes are bound to normal forms."""
    if isinstance(term, Axis):
        return term if term.bound is None else term.bound
    if isinstance(term, Product):
        factors = tuple(map(_normal, term.factors))
        same = all(new is old for new, old in zip(factors, term.factors, strict=True))
        return term if same else product(*factors)
    parts = tuple(map(_normal, term.parts))
    same = all(new is old for new, old in zip(parts, term.parts, strict=True))
    mergeable = any(map(lambda p, q: _merges(p) and _merges(q), parts, parts[1:]))
    return term if same and not mergeable else concat(*parts)


def leaves(term: Term) -> Iterator[Axis]:
    """The unbound axes of a resolved term, in index order, repeats included."""
    if isinstance(term, Axis):
        yield term
    else:
        for child in _children(term):
            yield from leaves(child)


def is_frozen(term: Term) -> bool:
    """Whether no index of the (resolved) term can be removed."""
    if isinstance(term, Axis):
        return term.reason is not None
    return all(map(is_frozen, _children(term)))


def freeze(term: Term, reason: Reason) -> None:
    """Freeze every free axis of the term; the first reason given to an axis stays."""
    for leaf in leaves(resolve(term)):
        if leaf.reason is None:
            leaf.reason = reason


def reason_of(term: Term) -> Reason:
    """The first reason found in a frozen term."""
    return next((leaf.reason for leaf in leaves(term) if leaf.reason), SINGLE)


def cut(term: Term, at: int) -> tuple[Term, Term]:
    """Cut a term after its first `at` indices, refining axes where the cut falls inside them."""
    term = resolve(term)
    if at <= 0 or at >= term.size:
        empty = Axis(0, SINGLE)
        return (empty, term) if at <= 0 else (term, empty)
    if isinstance(term, Axis):
        left, right = axis(at, term.reason), axis(term.size - at, term.reason)
        term.bound = concat(left, right)
        return left, right
    if isinstance(term, Concat):
        for i, part in enumerate(term.parts):
            if at < part.size:
                head, tail = cut(part, at) if at else (Axis(0, SINGLE), part)
                return concat(*term.parts[:i], head), concat(tail, *term.parts[i + 1 :])
            at -= part.size
    assert isinstance(term, Product)
    outer, inner = term.factors[0], product(*term.factors[1:])
    row, rest = divmod(at, inner.size)
    above, below = cut(outer, row)
    if not rest:
        return _rows(above, inner), _rows(below, inner)
    head, tail = cut(inner, rest)
    _, below = cut(below, 1)
    return concat(_rows(above, inner), head), concat(tail, _rows(below, inner))


def _rows(outer: Term, inner: Term) -> Term:
    return Axis(0, SINGLE) if outer.size == 0 else product(outer, inner)


def pieces(term: Term, sizes: list[int]) -> list[Term]:
    """Cut a term into consecutive pieces of the given sizes."""
    out = []
    for size in sizes:
        piece, term = cut(term, size)
        out.append(piece)
    return [resolve(piece) for piece in out]


def unify(a: Term, b: Term, where: str | None = None) -> None:
    """Make two terms denote the same indices, refining both; freeze what cannot be reconciled.

    Args:
        a: A term.
        b: A term of the same size.
        where: Name of the graph node that demands it, for the reasons of what gets frozen.
    """
    work = [(a, b)]
    for _ in range(_WORK_LIMIT):
        if not work:
            return
        x, y = work.pop()
        work.extend(_step(resolve(x), resolve(y), where))
    for x, y in work:
        _clash([x, y], "its refinement does not settle", where)


def _clash(terms: list[Term], why: str, where: str | None) -> None:
    for term in terms:
        freeze(term, Reason(why, where))


def _step(a: Term, b: Term, where: str | None) -> list[tuple[Term, Term]]:
    if a is b:
        return []
    if a.size != b.size:
        _clash([a, b], f"sizes {a.size} and {b.size} meet", where)
        return []
    frozen_a, frozen_b = is_frozen(a), is_frozen(b)
    if frozen_a and frozen_b:
        return []
    if isinstance(a, Axis) and isinstance(b, Axis) and not frozen_a and not frozen_b:
        newer, older = (a, b) if a.serial > b.serial else (b, a)
        newer.bound = older
        return []
    for x, y, frozen_x in ((a, b, frozen_a), (b, a, frozen_b)):
        if frozen_x:
            freeze(y, reason_of(x))
            return []
        if isinstance(x, Axis):
            if any(leaf is x for leaf in leaves(y)):
                _clash([y], "it would contain itself", where)
            else:
                x.bound = y
            return []
    if isinstance(a, Product) and isinstance(b, Product):
        return _align_factors(a, b, where)
    return _align_parts(a, b)


def _align_parts(a: Term, b: Term) -> list[tuple[Term, Term]]:
    """Pair the stretches of two terms between the boundaries of either."""
    pairs = []
    left = list(reversed(a.parts if isinstance(a, Concat) else (a,)))
    right = list(reversed(b.parts if isinstance(b, Concat) else (b,)))
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        size = min(x.size, y.size)
        for term, rest in ((x, left), (y, right)):
            if term.size > size:
                head, tail = cut(term, size)
                rest.append(tail)
                if term is x:
                    x = head
                else:
                    y = head
        pairs.append((x, y))
    return pairs


def _align_factors(a: Product, b: Product, where: str | None) -> list[tuple[Term, Term]]:
    """Pair the factors of two products from the outermost in, splitting the larger of the two."""
    pairs: list[tuple[Term, Term]] = []
    left, right = list(reversed(a.factors)), list(reversed(b.factors))
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size == y.size:
            pairs.append((x, y))
        elif x.size % y.size == 0:
            head, tail, owed = _split(x, y.size)
            pairs += [*owed, (head, y)]
            left.append(tail)
        elif y.size % x.size == 0:
            head, tail, owed = _split(y, x.size)
            pairs += [*owed, (x, head)]
            right.append(tail)
        else:
            stuck, size_x, size_y = [x, y], x.size, y.size
            while size_x != size_y:
                side = left if size_x < size_y else right
                stuck.append(side.pop())
                size_x, size_y = (
                    (size_x * stuck[-1].size, size_y)
                    if side is left
                    else (size_x, size_y * stuck[-1].size)
                )
            _clash(stuck, f"factors {x.size} and {y.size} cannot be aligned", where)
    return pairs


def _split(term: Term, outer: int) -> tuple[Term, Term, list[tuple[Term, Term]]]:
    """Refine a factor to outer x inner; what is still owed is a unification with a concat."""
    reason = term.reason if isinstance(term, Axis) else None
    head, tail = axis(outer, reason), axis(term.size // outer, reason)
    if isinstance(term, Axis):
        term.bound = product(head, tail)
        return head, tail, []
    return head, tail, [(term, product(head, tail))]


def regroup(terms: list[Term], sizes: list[int], where: str | None = None) -> list[Term]:
    """The terms of a row-major reshape of dimensions `terms` to dimensions of the given sizes."""
    out: list[Term] = [axis(size) for size in sizes]
    unify(product(*map(resolve, terms)), product(*out), where)
    return [resolve(term) for term in out]


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
        found = kept.get(term)
        return np.arange(term.size, dtype=np.int64) if found is None else found
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
