"""Unification: two terms made to denote the same indices, by refining both."""

from __future__ import annotations

from math import gcd, prod

from depcut.axes.terms import (
    Axis,
    Concat,
    Product,
    Reason,
    Term,
    axis,
    cut,
    freeze,
    is_frozen,
    leaves,
    product,
    reason_of,
    resolve,
)

_WORK_LIMIT = 4096


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
        elif (shared := gcd(x.size, y.size)) > 1:
            (head, tail, owed), (other, rest, due) = _split(x, shared), _split(y, shared)
            pairs += [*owed, *due, (head, other)]
            left.append(tail)
            right.append(rest)
        else:
            ours, theirs = [x], [y]
            while _size(ours) != _size(theirs):
                shorter = _size(ours) < _size(theirs)
                (ours if shorter else theirs).append((left if shorter else right).pop())
            pairs += _align_innermost(ours, theirs)
            _clash([*ours, *theirs], f"factors {x.size} and {y.size} cannot be aligned", where)
    return pairs


def _size(factors: list[Term]) -> int:
    return prod(factor.size for factor in factors)


def _align_innermost(ours: list[Term], theirs: list[Term]) -> list[tuple[Term, Term]]:
    """Take what the innermost factors of two lists have in common off both of them."""
    pairs: list[tuple[Term, Term]] = []
    while ours and theirs and (shared := gcd(ours[-1].size, theirs[-1].size)) > 1:
        inner = []
        for factors in (ours, theirs):
            last = resolve(factors.pop())
            if last.size == shared:
                inner.append(last)
                continue
            head, tail, owed = _split(last, last.size // shared)
            pairs += owed
            factors.append(head)
            inner.append(tail)
        pairs.append((inner[0], inner[1]))
    return pairs


def _split(term: Term, outer: int) -> tuple[Term, Term, list[tuple[Term, Term]]]:
    """Refine a factor to outer x inner; returns both, and pairs that remain to be unified."""
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
