"""What an allocation leaves of a budget, spent on the finest steps that fit.

An allocation ends with the step that meets the budget. Where that step is coarse (a head, an
expert, a width that all layers share), it may come far below, or stay above. Then a class of groups
is moved by some steps and another one takes up the difference, as far as it fits: the pair that
loses least of those that come near, again and again while none does and the gap shrinks. Which
units of a group go is not touched: only how many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depcut.allocate.space import Counts, Scores, Space
from depcut.plan.cost import Cost

NEAR = 0.005  # of the budget; what is so close to it meets it

_ROUNDS = 6
_REACH = 128  # steps of a class that are looked at on either side
_MOVES = 256  # of all classes, the finest
_FINEST = 6  # classes that take up what a move leaves
_LAST_SHARE = 0.1  # of a class; it is not given up for the sake of a rest


def is_met(value: float, target: float) -> bool:
    """Whether a quantity is as close to its budget as one asks for.

    Args:
        value: The quantity.
        target: The budget.
    """
    return abs(value - target) <= NEAR * target


def spent(where: Space, counts: Counts, losses: Scores, cost: Cost, target: float) -> Counts:
    """Kept counts that meet a budget by a few steps more or less than some others.

    Args:
        where: The steps.
        counts: Kept count of each group, somewhere near the budget.
        losses: Of each step of each class, not decreasing.
        cost: The budgeted quantity.
        target: The budget.

    Returns:
        `counts` themselves where they meet it, or where nothing comes closer. Else others, [groups],
        which cost at most the budget, or no more than `NEAR` of it beyond where only those meet it.
    """
    error = cost(counts) - target
    if is_met(target + error, target):
        return counts
    exchange = _Exchange(where, losses, cost, target)
    best = _Found(where.taken(counts), error, 0.0)
    closest, gap = best, np.inf
    for _ in range(_ROUNDS):
        found = min(exchange.around(best.taken, best.error), key=exchange.key, default=None)
        if found is None or abs(found.error) >= gap:
            break
        best, gap = found, abs(found.error)
        closest = min(closest, found, key=lambda each: abs(each.error))
        if is_met(target + found.error, target):
            break
    return where.kept(closest.taken)


def nearby(
    where: Space, counts: Counts, losses: Scores, cost: Cost, target: float
) -> Iterator[Counts]:
    """Other counts, [groups], that meet a budget by a few steps more or less; of little loss first.

    Args:
        where: The steps.
        counts: Kept count of each group, somewhere near the budget.
        losses: Of each step of each class, not decreasing.
        cost: The budgeted quantity.
        target: The budget.
    """
    exchange = _Exchange(where, losses, cost, target)
    found = exchange.around(where.taken(counts), cost(counts) - target)
    met = [each for each in found if is_met(target + each.error, target)]
    for each in sorted(met, key=lambda each: each.loss):
        yield where.kept(each.taken)


@dataclass(frozen=True)
class _Found:
    """Steps taken of each class, [classes]; by how much their cost differs from the budget."""

    taken: Counts
    error: float
    loss: float


class _Exchange:
    """Steps of one class against those of another.

    Args:
        where: The steps.
        losses: Of each step of each class.
        cost: The budgeted quantity.
        target: The budget.
    """

    def __init__(self, where: Space, losses: Scores, cost: Cost, target: float) -> None:
        self.where, self.cost, self.target = where, cost, target
        self.lost = [np.append(0.0, np.cumsum(lost)) for lost in losses]
        self.members = [np.flatnonzero(where.class_of == c) for c in range(len(where.sizes))]
        prices = where.per_class(cost.gradient(cost.dense)) * where.steps
        free = np.flatnonzero((where.available > 0) & (prices > 0))
        # The finest first; of equals, in the order of the model.
        self.free = [int(c) for c in free[np.argsort(prices[free], kind="stable")]]
        self.parts = {c: cost.within(self.members[c]) for c in self.free}
        self.most = np.minimum(
            where.available, np.floor((1 - _LAST_SHARE) * where.sizes / where.steps)
        ).astype(np.int64)

    def around(self, taken: Counts, error: float) -> Iterator[_Found]:
        """Exchanges of one class against another that end at the budget, or a step beyond it.

        Args:
            taken: Steps of each class, [classes].
            error: Their cost beyond the budget.
        """
        most = np.maximum(self.most, taken)
        rows, errors = self._moved(taken, error, most)
        for place, number in enumerate(self.free):
            some = slice(None) if place < _FINEST else slice(1)
            yield from self._absorbed(number, rows[some], errors[some], most)

    def key(self, found: _Found) -> tuple[int, float, float]:
        """Orders exchanges: those that meet the budget, within it and by loss first."""
        left = abs(found.error)
        if left > NEAR * self.target:
            return (2 if found.error <= 0 else 3, left, found.loss)
        return (0, found.loss, left) if found.error <= 0 else (1, left, found.loss)

    def _moved(
        self, taken: Counts, error: float, most: Counts
    ) -> tuple[Counts, NDArray[np.float64]]:
        """Moves of one class each: steps taken [moves, classes], cost beyond the budget [moves].

        The first is none at all; of moves of about the same cost, the one of least loss is there.
        """
        rows, errors, losses = [taken[None]], [np.array([error])], [np.zeros(1)]
        for number in self.free:
            now = int(taken[number])
            choices = np.arange(max(0, now - _REACH), min(int(most[number]), now + _REACH) + 1)
            choices = choices[choices != now]
            moved = np.repeat(taken[None], len(choices), axis=0)
            moved[:, number] = choices
            rows.append(moved)
            errors.append(error + self._part(number, moved) - self._part(number, taken[None]))
            losses.append(self.lost[number][choices] - self.lost[number][now])
        table, beyond, loss = np.concatenate(rows), np.concatenate(errors), np.concatenate(losses)
        alike = np.round((beyond - error) / (0.1 * NEAR * self.target))
        order = np.lexsort((loss, alike))
        first = np.append(True, alike[order][1:] != alike[order][:-1])
        chosen = order[first]
        fine = chosen[np.argsort(np.abs(beyond[chosen] - error), kind="stable")][:_MOVES]
        fine = np.append(0, fine[fine != 0])
        return table[fine], beyond[fine]

    def _absorbed(
        self, number: int, rows: Counts, errors: NDArray[np.float64], most: Counts
    ) -> Iterator[_Found]:
        """Each of the moves, with as many steps of a class as it takes to come within the budget.

        And with one step less, where that meets the budget as well.

        Args:
            number: The class.
            rows: Steps taken, [moves, classes].
            errors: Their cost beyond the budget, [moves].
            most: Steps that each class may give up.
        """
        before = self._part(number, rows)

        def beyond(choices: Counts) -> NDArray[np.float64]:
            moved = rows.copy()
            moved[:, number] = choices
            return np.asarray(errors + self._part(number, moved) - before)

        low = np.zeros(len(rows), dtype=np.int64)
        high = np.maximum(rows[:, number], most[number])
        fits = beyond(high) <= NEAR * self.target
        while (low < high).any():
            middle = (low + high) // 2
            within = beyond(middle) <= 0
            high = np.where(within, middle, high)
            low = np.where(within, low, np.minimum(middle + 1, high))
        for choices in (high, np.maximum(high - 1, 0)):
            errors_left = beyond(choices)
            for i in np.flatnonzero((errors_left <= NEAR * self.target) & fits):
                moved = rows[i].copy()
                moved[number] = choices[i]
                yield _Found(moved, float(errors_left[i]), self._loss(moved))

    def _loss(self, taken: Counts) -> float:
        return float(sum(self.lost[c][taken[c]] for c in self.free))

    def _part(self, number: int, rows: Counts) -> NDArray[np.float64]:
        """Cost of what depends on a class, [rows]."""
        where = self.where
        kept = (where.sizes - rows * where.steps)[:, where.class_of] * where.units
        return self.parts[number].many(kept)
