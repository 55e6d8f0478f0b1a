"""Budget to kept counts by an order: which share of each group goes, met exactly.

Every group offers its removals as a sequence of steps (one unit, or one alignment block). An
allocation is an order of all steps of all groups; the budget is met by bisection over the length
of the prefix that is carried out, since the cost falls with every step.
"""

from __future__ import annotations

import math

import numpy as np

from depcut.allocate.space import Counts, Scores, Space, marginals
from depcut.errors import BudgetError, InputError
from depcut.plan.cost import Cost

ALLOCATIONS = ("uniform", "global")

_LAST = 1e30
_LAST_SHARE = 0.1  # of a group's units; removed only when the budget cannot be met otherwise


def order(
    allocation: str,
    where: Space,
    scores: Scores,
    cost: Cost,
    additive: bool = False,
    nested: bool = False,
) -> Counts:
    """The classes in the order in which they give up a step.

    Args:
        allocation: "uniform" (every class loses the same share at a time) or "global" (least
            loss of score per cost first, the loss of a group growing steeply with the share of its
            score that is gone; its last tenth goes only after all else).
        where: The steps.
        scores: One vector a group.
        cost: The budgeted quantity.
        additive: Whether scores are losses that add up, also over groups.
        nested: Whether "uniform" means the share of a layer's channels, to which groups that
            number them together (heads, and the features of each) contribute alike.

    Returns:
        Class numbers, [steps of all classes].

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
    lost = marginals(where, scores, additive) if allocation == "global" else []
    price = where.per_class(cost.gradient(cost.dense))
    for number, (size, step, n) in enumerate(zip(where.sizes, where.steps, available, strict=True)):
        share = np.arange(1, n + 1) * step / size
        if allocation == "uniform":
            key = 1 - (1 - share) ** where.nested[number] if nested else share
        else:
            # What counts is the share of a group, unless losses are absolute.
            amount = step if additive else size
            key = lost[number] / max(price[number] * amount, 1e-12)
            key = np.where(share > 1 - _LAST_SHARE, key + _LAST * share, key)
        keys.append(key)
        classes.append(np.full(n, number))
    if not classes:
        return np.zeros(0, dtype=np.int64)
    ranking = np.argsort(np.concatenate(keys), kind="stable")
    return np.asarray(np.concatenate(classes)[ranking])


def step_losses(
    allocation: str, where: Space, scores: Scores, cost: Cost, additive: bool = False
) -> Scores:
    """Losses of the steps of each class whose least sum within a budget is the allocation's aim.

    "uniform" is that of shares squared by cost: where steps are small, equal shares.

    Args:
        allocation: "uniform" or "global", see `order`.
        where: The steps.
        scores: One vector a group.
        cost: The budgeted quantity.
        additive: Whether scores are losses that add up, also over groups.
    """
    if allocation != "uniform":
        return marginals(where, scores, additive)
    price = where.per_class(cost.gradient(cost.dense))
    steps = zip(where.sizes, where.steps, where.available, price, strict=True)
    return [np.arange(1, n + 1) * step**2 * each / size for size, step, n, each in steps]


def meet(where: Space, sequence: Counts, cost: Cost, target: float, of: str) -> Counts:
    """Kept counts whose cost is as close to the target as steps allow.

    Args:
        where: The steps.
        sequence: Classes in the order in which they give up a step.
        cost: The budgeted quantity.
        target: Its value to reach.
        of: Name of the quantity, for messages.

    Returns:
        Kept count of each group, [groups].

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
            "or let more layers shrink (ignore=, ratios=, align=1)",
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
    """Of `after`, and `before` with up to 4 one-step corrections, the closest to the target."""
    best, error = after, abs(cost(where.kept(after)) - target)
    base = before
    for _ in range(4):
        excess = cost(where.kept(base)) - target
        if abs(excess) < error:
            best, error = base, abs(excess)
        sign = 1 if excess > 0 else -1
        prices = where.per_class(cost.gradient(where.kept(base)))
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


def along(where: Space, counts: Counts, cost: Cost) -> Counts:
    """Counts in which classes that the budget does not see shrink as the others do on average.

    Args:
        where: The steps.
        counts: Kept count of each group.
        cost: The budgeted quantity; it does not depend on what only other example calls run.

    Returns:
        Kept count of each group, [groups].
    """
    taken = where.taken(counts)
    price = where.per_class(cost.gradient(cost.dense))
    free = where.available > 0
    seen, unseen = free & (price > 0), free & (price == 0)
    if seen.any():
        share = float((taken * where.steps)[seen].sum() / where.sizes[seen].sum())
        steps = np.minimum((share * where.sizes) // where.steps, where.available).astype(np.int64)
        taken = np.where(unseen, np.maximum(taken, steps), taken)
    return where.kept(taken)
