"""Budget to kept counts: which share of each group goes, met exactly.

Every group offers its removals as a sequence of steps (one unit, or one alignment block). An
allocation is an order of all steps of all groups; the budget is met by bisection over the length
of the prefix that is carried out, since the cost falls with every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from depcut import axes
from depcut.axes import Axis, Term
from depcut.cost import Cost
from depcut.coupling import Coupling
from depcut.errors import BudgetError, InputError

Counts = NDArray[np.int64]
Scores = list[NDArray[np.float64]]

_CONVEXITY = 8
_LAST = 1e30
_LAST_SHARE = 0.1  # of a group's units; removed only when the budget cannot be met otherwise


@dataclass(frozen=True)
class Space:
    """What may be removed, in steps, per class of groups that keep equal counts.

    Attributes:
        class_of: Class number of each group.
        sizes: Dense count of each class.
        steps: Units a step of each class removes.
        held: Whether a class must keep all its units.
        floors: Least number of units that a class must keep.
    """

    class_of: NDArray[np.int64]
    sizes: Counts
    steps: Counts
    held: NDArray[np.bool_]
    floors: Counts

    def kept(self, taken: Counts) -> Counts:
        """Kept count of each group after so many steps of each class."""
        return np.asarray((self.sizes - taken * self.steps)[self.class_of])

    @property
    def available(self) -> Counts:
        """Steps that each class can give up: one step (at least one unit) always stays."""
        free = (self.sizes - self.floors) // self.steps
        return np.where(self.held, 0, free)


def space(
    coupling: Coupling, align: int, held: set[int], ties: Iterable[tuple[int, int]] = ()
) -> Space:
    """The steps that respect ties and alignment.

    Args:
        coupling: The groups.
        align: Kept widths are multiples of it where they can be; 1: any width.
        held: Numbers of groups that keep everything.
        ties: Further pairs of groups that keep equal counts.
    """
    equal = nx.Graph()
    equal.add_nodes_from(g.index for g in coupling.groups)
    representative: dict[int, int] = {}
    for group in coupling.groups:
        if group.tied is not None:
            equal.add_edge(group.index, representative.setdefault(group.tied, group.index))
    equal.add_edges_from(ties)
    classes = [sorted(c) for c in nx.connected_components(equal)]
    natural = _steps(coupling, align)
    class_of = np.zeros(len(coupling.groups), dtype=np.int64)
    sizes, steps, frozen, floors = [], [], [], []
    for number, members in enumerate(classes):
        class_of[members] = number
        size = coupling.groups[members[0]].size
        step = math.lcm(*(int(natural[m]) for m in members))
        sizes.append(size)
        steps.append(step if size % step == 0 else int(natural[members].max()))
        floors.append(max(coupling.groups[m].floor for m in members))
        uneven = any(coupling.groups[m].size != size for m in members)
        frozen.append(uneven or any(m in held for m in members))
    held_mask = np.array(frozen, dtype=np.bool_)
    return Space(class_of, np.array(sizes), np.array(steps), held_mask, np.array(floors))


def _steps(coupling: Coupling, align: int) -> Counts:
    """Units a step of each group, so that every width it occurs in stays a multiple of `align`."""
    out = np.ones(len(coupling.groups), dtype=np.int64)
    if align <= 1:
        return out
    for dims in coupling.dims.values():
        for term in dims:
            for leaf, cofactor in _cofactors(term, 1):
                group = coupling.group_of.get(leaf)
                if group is not None:
                    step = align // math.gcd(align, cofactor)
                    while step > 1 and (group.size % step or group.size < 2 * step):
                        step = step // 2 if step % 2 == 0 else 1
                    out[group.index] = max(out[group.index], step)
    return out


def _cofactors(term: Term, cofactor: int) -> list[tuple[Axis, int]]:
    """Each axis of a term with the number of indices that one of its indices stands for."""
    if isinstance(term, Axis):
        return [(term, cofactor)]
    children = term.factors if isinstance(term, axes.Product) else term.parts
    out = []
    for child in children:
        own = term.size // child.size if isinstance(term, axes.Product) else 1
        out += _cofactors(child, cofactor * own)
    return out


def order(allocation: str, where: Space, scores: Scores, cost: Cost) -> Counts:
    """The classes in the order in which they give up a step.

    Args:
        allocation: "uniform" (every class loses the same share at a time) or "global" (least
            loss of score per cost first, the loss of a group growing steeply with the share of its
            score that is gone; its last tenth goes only after all else).
        where: The steps.
        scores: One vector a group.
        cost: The budgeted quantity.

    Raises:
        InputError: Unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise InputError(
            f"unknown allocation {allocation!r}",
            where="allocation=",
            remedy=f"use one of {', '.join(ALLOCATIONS)}",
        )
    available, keys, classes = where.available, [], []
    losses = _losses(where, scores) if allocation == "global" else []
    price = np.bincount(where.class_of, weights=cost.gradient(cost.dense), minlength=len(available))
    for number, (size, step, n) in enumerate(zip(where.sizes, where.steps, available, strict=True)):
        share = np.arange(1, n + 1) * step / size
        if allocation == "uniform":
            key = share
        else:
            key = _marginal(losses[number], int(n), int(step)) / max(price[number] * size, 1e-12)
            key = np.where(share > 1 - _LAST_SHARE, key + _LAST * share, key)
        keys.append(key)
        classes.append(np.full(n, number))
    if not classes:
        return np.zeros(0, dtype=np.int64)
    ranking = np.argsort(np.concatenate(keys), kind="stable")
    return np.asarray(np.concatenate(classes)[ranking])


def _marginal(ascending: NDArray[np.float64], n: int, step: int) -> NDArray[np.float64]:
    """Loss of each step for -d/dk of R^(1 - p), where R is the share of the score that is left.

    A loss linear in R would empty the most expensive group before it touches the next.
    """
    gone = ascending[: n * step].reshape(n, step).sum(axis=1)
    total = max(float(ascending.sum()), 1e-12)
    left = np.maximum(1 - np.cumsum(gone) / total, 1e-3)
    return np.maximum.accumulate(gone / total / left**_CONVEXITY)


ALLOCATIONS = ("uniform", "global")


def _losses(where: Space, scores: Scores) -> Scores:
    """Scores of each class's units, the k-th cheapest of its groups averaged, ascending."""
    sums = [np.zeros(n) for n in where.sizes]
    members = np.bincount(where.class_of, minlength=len(sums))
    for group, values in enumerate(scores):
        sums[where.class_of[group]] += np.sort(values)
    return [s / n for s, n in zip(sums, members, strict=True)]


def meet(where: Space, sequence: Counts, cost: Cost, target: float, of: str) -> Counts:
    """Kept counts whose cost is as close to the target as steps allow.

    Args:
        where: The steps.
        sequence: Classes in the order in which they give up a step.
        cost: The budgeted quantity.
        target: Its value to reach.
        of: Name of the quantity, for messages.

    Raises:
        BudgetError: Even the smallest widths cost more than the target.
    """
    classes = len(where.sizes)

    def taken(length: int) -> Counts:
        return np.bincount(sequence[:length], minlength=classes).astype(np.int64)

    floor = cost(where.kept(taken(len(sequence))))
    if floor > target * (1 + 1e-9) and floor - target > 0.005 * cost.total:
        reachable = 1 - floor / cost.total
        raise BudgetError(
            f"{of} cannot be reduced by {1 - target / cost.total:.4g}: "
            f"at the smallest widths {floor / cost.total:.2%} of them are left",
            where=f"of={of!r}",
            remedy=f"ask for a ratio of at most {math.floor(reachable * 1e4) / 1e4:.4g}, "
            "or let more layers shrink (keep=, ratios=, align=1)",
        )
    low, high = 0, len(sequence)
    while low < high:
        middle = (low + high) // 2
        if cost(where.kept(taken(middle))) <= target:
            high = middle
        else:
            low = middle + 1
    before = taken(max(low - 1, 0))
    return where.kept(_closest(where, before, taken(low), cost, target))


def _closest(where: Space, before: Counts, after: Counts, cost: Cost, target: float) -> Counts:
    """Of the states one step away from just above the target, the closest to it."""
    best, error = after, abs(cost(where.kept(after)) - target)
    base = before
    for _ in range(4):
        excess = cost(where.kept(base)) - target
        if abs(excess) < error:
            best, error = base, abs(excess)
        sign = 1 if excess > 0 else -1
        prices = np.bincount(
            where.class_of, weights=cost.gradient(where.kept(base)), minlength=len(base)
        )
        change = prices * where.steps
        open_ = (base < where.available) if sign > 0 else (base > 0) & ~where.held
        usable = np.flatnonzero(open_ & (change > 0) & (change < 2 * abs(excess)))
        if not len(usable):
            break
        pick = usable[np.argmin(np.abs(change[usable] - abs(excess)))]
        base = base.copy()
        base[pick] += sign
        if abs(cost(where.kept(base)) - target) < error:
            best, error = base, abs(cost(where.kept(base)) - target)
    return best
