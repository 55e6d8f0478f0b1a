"""Least loss of score within a budget, for costs that groups share: Lagrangian relaxation.

The time of a layer depends on two groups at once (what it reads and what it makes) and moves in
steps, so that neither dynamic programming for the multiple-choice knapsack, which needs a sum over
groups, nor a gradient applies. Instead, loss + price * cost is minimised for one price after the
other (Everett 1963, "Generalized Lagrange multiplier method"): each class in turn takes its best
count with the others fixed, which sees whole staircases, until none changes. The price is bisected.
What the jumps of the solution leave of the budget is then spent greedily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from depcut.allocate.space import Counts, Scores, Space, marginals
from depcut.errors import BudgetError
from depcut.plan.cost import Cost

_SWEEPS = 8
_PRICES = 40
_NEAR = 0.005  # of the whole; what is so close to a target meets it
_FAR = 0.05  # of the whole; what is so far below a target owes it to a step too large for it
_CLOSE = 1e-3  # of the budget; the search for a price ends there


def least_loss(
    where: Space,
    scores: Scores,
    cost: Cost,
    target: float,
    of: str,
    additive: bool = False,
) -> Counts:
    """Kept counts that lose least score among those found within the budget.

    Args:
        where: The steps.
        scores: One vector a group.
        cost: The budgeted quantity.
        target: Its value to stay within.
        of: Name of the quantity, for messages.
        additive: Whether scores are losses that add up, also over groups.

    Returns:
        Kept count of each group.

    Raises:
        BudgetError: Even the smallest widths cost more than the target.
    """
    return _within(where, marginals(where, scores, additive), cost, target, of)


def closest(where: Space, losses: Scores, cost: Cost, target: float, of: str) -> Counts:
    """Kept counts of little loss whose cost is as close to the target as large steps allow.

    Args:
        where: The steps.
        losses: Of each step of each class, not decreasing.
        cost: The budgeted quantity.
        target: Its value to come to.
        of: Name of the quantity, for messages.

    Returns:
        Kept count of each group.

    Raises:
        BudgetError: Even the smallest widths cost clearly more than the target.
    """
    floor = cost(where.kept(where.available))
    if floor > target and floor - target <= _NEAR * cost.total:
        return where.kept(where.available)
    found = [_within(where, losses, cost, target, of)]
    if target - cost(found[0]) > _FAR * cost.total:
        # One of the steps that were taken is too large: without it, the rest gives what it can.
        taken = where.taken(found[0])
        for number in np.flatnonzero(taken):
            floors = where.floors.copy()
            floors[number] = where.sizes[number] - (taken[number] - 1) * where.steps[number]
            less = replace(where, floors=floors)
            least = less.kept(less.available)
            short = cost(least) > target
            fewer = [own[:n] for own, n in zip(losses, less.available, strict=True)]
            found.append(least if short else _within(less, fewer, cost, target, of))
    return min(found, key=lambda counts: abs(cost(counts) - target))


def _within(where: Space, losses: Scores, cost: Cost, target: float, of: str) -> Counts:
    """Kept counts of the least loss found within the budget; `BudgetError` where there are none."""
    search = _Search(where, losses, cost)
    floor = cost(where.kept(where.available))
    if floor > target * (1 + 1e-9):
        raise BudgetError(
            f"{of} cannot be reduced to {target / cost.total:.2%}: "
            f"at the smallest widths {floor / cost.total:.2%} are left",
            where=f"of={of!r}",
            remedy=f"ask for a ratio of at most {math.floor(1e4 * (1 - floor / cost.total)) / 1e4},"
            " or let more layers shrink (ignore=, ratios=)",
        )
    return where.kept(search.fill(search.priced(target), target))


def nudged(
    where: Space, counts: Counts, cost: Cost, target: float, tried: Sequence[Counts]
) -> Counts | None:
    """Of the counts that differ in one class, those whose cost is closest to the target.

    Args:
        where: The steps.
        counts: Kept count of each group.
        cost: The budgeted quantity.
        target: Its value to come to.
        tried: Counts that are not wanted again.

    Returns:
        Kept count of each group; None if all of them were tried.
    """
    taken = where.taken(counts)
    rows = []
    for number in np.flatnonzero(where.available):
        for choice in range(where.available[number] + 1):
            row = taken.copy()
            row[number] = choice
            kept = where.kept(row)
            if not any((kept == old).all() for old in tried):
                rows.append(kept)
    if not rows:
        return None
    table = np.array(rows)
    return np.asarray(table[np.abs(cost.many(table) - target).argmin()])


class _Search:
    """Losses and costs of the choices of all classes; `taken` is steps removed, [classes].

    Args:
        where: The steps.
        losses: Of each step of each class.
        cost: The budgeted quantity.
    """

    def __init__(self, where: Space, losses: Scores, cost: Cost) -> None:
        self.where, self.cost = where, cost
        self.available = where.available
        self.lost = [np.append(0.0, np.cumsum(lost)) for lost in losses]
        members = [np.flatnonzero(where.class_of == c) for c in range(len(self.available))]
        self.members = members
        self.parts = [cost.within(groups) for groups in members]
        self.free = [c for c, n in enumerate(self.available) if n]

    def loss(self, taken: Counts) -> float:
        """Loss of all classes together."""
        return float(sum(lost[n] for lost, n in zip(self.lost, taken, strict=True)))

    def costs(self, taken: Counts, number: int) -> NDArray[np.float64]:
        """Cost of what depends on a class, the others fixed: [choices of the class]."""
        choices = np.arange(self.available[number] + 1)
        counts = np.repeat(self.where.kept(taken)[None], len(choices), axis=0)
        kept = self.where.sizes[number] - choices * self.where.steps[number]
        counts[:, self.members[number]] = kept[:, None] * self.where.units[self.members[number]]
        return self.parts[number].many(counts)

    def settled(self, taken: Counts, price: float) -> Counts:
        """A local minimum of loss + price * cost: no class alone can improve it."""
        taken = taken.copy()
        for _ in range(_SWEEPS):
            changed = False
            for number in self.free:
                best = int(np.argmin(self.lost[number] + price * self.costs(taken, number)))
                changed |= best != taken[number]
                taken[number] = best
            if not changed:
                break
        return taken

    def priced(self, target: float) -> Counts:
        """The least loss within the budget that a bisection of the price finds."""
        best = self.available.copy()
        start = np.zeros_like(best)
        if self.cost(self.where.kept(start)) <= target:
            return start
        low, high = None, None
        price = 1.0 / self.cost.total
        for _ in range(_PRICES):
            taken = self.settled(start, price)
            spent = self.cost(self.where.kept(taken))
            if spent <= target:
                high = price
                if self.loss(taken) < self.loss(best):
                    best = taken
                if spent >= target * (1 - _CLOSE):
                    break
            else:
                low, start = price, taken
            if low is None or high is None:
                price *= 16.0 if high is None else 1 / 16.0
            else:
                price = math.sqrt(low * high)
        return best

    def fill(self, taken: Counts, target: float) -> Counts:
        """Spend what is left of the budget on the choices that win most score for their cost."""
        taken = taken.copy()
        spent = self.cost(self.where.kept(taken))
        while True:
            best = (0.0, -1, 0, 0.0)
            for number in self.free:
                now = int(taken[number])
                costs = self.costs(taken, number)[:now]
                extra = costs - self.costs_at(taken, number)
                won = self.lost[number][now] - self.lost[number][:now]
                value = np.where(
                    spent + extra <= target, won / np.maximum(extra, 1e-9 * target), 0.0
                )
                if now and value.max() > best[0]:
                    choice = int(value.argmax())
                    best = (float(value[choice]), number, choice, float(extra[choice]))
            if best[1] < 0:
                return taken
            taken[best[1]] = best[2]
            spent += best[3]

    def costs_at(self, taken: Counts, number: int) -> float:
        """Cost of what depends on a class, at its present choice."""
        return self.parts[number](self.where.kept(taken))
