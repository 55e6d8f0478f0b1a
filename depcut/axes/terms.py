"""Dimensions as terms. Pure Python, no torch.

A term denotes an ordered set of indices:

    Axis(n)          n indices that can be kept or removed one by one
    Product(t, ...)  row-major factors: 768 = heads(12) x head_dim(64)
    Concat(t, ...)   terms laid end to end: 256 = a(64) ++ b(192)

An axis is a variable: unification binds it to a term of its size wherever it occurs. Binding only
refines, so inference terminates (occurs check, plus a bound on the work of one unification).
A frozen axis keeps all of its indices and knows why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

_serial = itertools.count()


@dataclass(frozen=True)
class Reason:
    """Why an axis is frozen: what stopped it, and the graph node where that happened."""

    why: str
    node: str | None = None


@dataclass(eq=False, slots=True)
class Axis:
    """A variable of `size` indices; it may be frozen for a reason, or bound to a finer term."""

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
Dims = tuple[Term, ...]  # of a tensor, one term a dimension

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
    """The first reason among the axes of a frozen term."""
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
