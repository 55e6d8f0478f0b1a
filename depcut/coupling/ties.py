"""Terms that must keep equally many indices: refined until the counts agree axis by axis."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from depcut import axes
from depcut.axes import Axis, Product, Reason, Term

DIFFERENT = Reason("cut evenly, but its pieces are built differently")

# More products of axes than a term has in practice: it is a product of long concatenations.
_MOST_ADDENDS = 4096


@dataclass(frozen=True)
class Addend:
    """Part of a term's count: `times` the product of the counts of some free axes.

    Attributes:
        times: How often it occurs; the sizes of frozen factors are in it.
        axes: The free axes multiplied; none: a constant.
    """

    times: int
    axes: tuple[Axis, ...] = ()

    @property
    def size(self) -> int:
        """The product of the axes' sizes."""
        return math.prod(a.size for a in self.axes)

    @property
    def kind(self) -> tuple[int, ...]:
        """Sizes of the axes; addends of one kind can be tied axis by axis."""
        return tuple(sorted(a.size for a in self.axes))


def settle_ties(ties: Iterable[list[Term]]) -> dict[Axis, Axis]:
    """Which free axes must keep equal counts: a representative for each (union-find).

    Args:
        ties: Lists of terms of equal size that must keep equally many indices each. Their axes are
            refined, or frozen, where the counts could not agree otherwise.
    """
    pairs = [(tie[0], other) for tie in ties for other in tie[1:]]
    waiting, queued = deque(range(len(pairs))), [True] * len(pairs)
    holders: dict[Axis, set[int]] = defaultdict(set)
    while waiting:
        number = waiting.popleft()
        queued[number] = False
        changed = _match(*pairs[number], {})
        for term in pairs[number]:
            for leaf in axes.leaves(axes.resolve(term)):
                holders[leaf].add(number)
        again = {number, *(n for a in changed for n in holders.pop(a, ()))} if changed else set()
        for n in sorted(again):
            if not queued[n]:
                queued[n] = True
                waiting.append(n)
    parent: dict[Axis, Axis] = {}
    for a, b in pairs:
        _match(a, b, parent)
    return parent


def find(parent: dict[Axis, Axis], item: Axis) -> Axis:
    """The representative of an axis."""
    while parent.get(item, item) is not item:
        item = parent[item]
    return item


def _match(a: Term, b: Term, parent: dict[Axis, Axis]) -> list[Axis]:
    """Tie the counts of two terms axis by axis; axes that were refined or frozen for it first."""
    a, b = axes.resolve(a), axes.resolve(b)
    if a is b or (axes.is_frozen(a) and axes.is_frozen(b)):
        return []
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Axis) and not x.reason and not isinstance(y, Axis):
            x.bound = _copy(y)
            return [x]
    ours, theirs = _addends(a), _addends(b)
    if max(len(ours), len(theirs)) > _MOST_ADDENDS:
        return _freeze(axes.leaves(a), axes.leaves(b))
    ours, theirs = _cancelled(ours, theirs), _cancelled(theirs, ours)
    left, right = _paired(ours, theirs, parent)
    return _refined(left, right) if left or right else []


def _copy(term: Term) -> Term:
    """A term of the same structure with fresh axes."""
    if isinstance(term, Axis):
        return axes.axis(term.size, term.reason)
    build = axes.product if isinstance(term, Product) else axes.concat
    children = term.factors if isinstance(term, Product) else term.parts
    return build(*map(_copy, children))


def _addends(term: Term) -> list[Addend]:
    """A term's count as a sum of products, in index order; frozen axes are numbers."""
    if isinstance(term, Axis):
        return [Addend(term.size)] if term.reason else [Addend(1, (term,))]
    if not isinstance(term, Product):
        return [addend for part in term.parts for addend in _addends(part)]
    out = [Addend(1)]
    for factor in term.factors:
        inner = _addends(factor)
        if len(out) * len(inner) > _MOST_ADDENDS:
            return [Addend(1)] * (_MOST_ADDENDS + 1)
        out = [Addend(x.times * y.times, x.axes + y.axes) for x in out for y in inner]
    return out


def _cancelled(addends: list[Addend], others: list[Addend]) -> list[Addend]:
    """The addends less what the other side has as well."""
    spare: dict[frozenset[tuple[Axis, int]], int] = defaultdict(int)
    for other in others:
        spare[_identity(other)] += other.times
    out = []
    for addend in addends:
        gone = min(addend.times, spare[_identity(addend)])
        spare[_identity(addend)] -= gone
        if addend.times > gone:
            out.append(Addend(addend.times - gone, addend.axes))
    return out


def _identity(addend: Addend) -> frozenset[tuple[Axis, int]]:
    return frozenset((a, addend.axes.count(a)) for a in addend.axes)


def _paired(
    ours: list[Addend], theirs: list[Addend], parent: dict[Axis, Axis]
) -> tuple[list[Addend], list[Addend]]:
    """Tie addends of one kind to each other, in their order; what is left of both sides."""
    by_kind: dict[tuple[int, ...], deque[Addend]] = defaultdict(deque)
    for addend in theirs:
        by_kind[addend.kind].append(addend)
    left = []
    for addend in ours:
        alike, times = by_kind[addend.kind], addend.times
        while alike and times:
            other = alike.popleft()
            _tie(addend, other, parent)
            if other.times > times:
                alike.appendleft(Addend(other.times - times, other.axes))
            times -= min(times, other.times)
        if times:
            left.append(Addend(times, addend.axes))
    return left, [addend for alike in by_kind.values() for addend in alike]


def _tie(a: Addend, b: Addend, parent: dict[Axis, Axis]) -> None:
    """Tie the axes of two addends of one kind, largest to largest; shared ones need no tie."""
    ours = [x for x in a.axes if x not in b.axes]
    theirs = [x for x in b.axes if x not in a.axes]
    if sorted(x.size for x in ours) != sorted(x.size for x in theirs):
        ours, theirs = list(a.axes), list(b.axes)
    for x, y in zip(_by_size(ours), _by_size(theirs), strict=True):
        parent[find(parent, x)] = find(parent, y)


def _by_size(items: list[Axis]) -> list[Axis]:
    return sorted(items, key=lambda a: a.size)


def _refined(left: list[Addend], right: list[Addend]) -> list[Axis]:
    """Refine the largest axis to parts like those of the other side; else freeze all."""
    single = [(a, others) for side, others in ((left, right), (right, left)) for a in side]
    single = [(a, others) for a, others in single if len(a.axes) == 1]
    for whole, others in sorted(single, key=lambda pair: -pair[0].size):
        finer = _built_like(whole, others)
        if finer is not None:
            whole.axes[0].bound = finer
            return [whole.axes[0]]
    return _freeze(*(addend.axes for addend in (*left, *right)))


def _built_like(whole: Addend, others: list[Addend]) -> Term | None:
    """A term of the size of one axis, of parts as the others have them, as far as they go."""
    parts: list[Term] = []
    room = whole.size
    for other in others:
        times = other.times // whole.times
        if not other.axes:
            count = min(times, room)
            parts += [axes.axis(count, DIFFERENT)] if count else []
            room -= count
        elif len(other.axes) == 1:
            copies = min(times, room // other.size)
            parts += [axes.axis(other.size) for _ in range(copies)]
            room -= copies * other.size
        elif times and other.size * times == room:
            copy = [axes.axis(a.size) for a in other.axes]
            parts.append(axes.product(axes.axis(times, DIFFERENT), *copy))
            room = 0
    return axes.concat(*parts, *([axes.axis(room)] if room else [])) if parts else None


def _freeze(*groups: Iterable[Axis]) -> list[Axis]:
    free = [a for group in groups for a in group if a.reason is None]
    for a in free:
        axes.freeze(a, DIFFERENT)
    return free
