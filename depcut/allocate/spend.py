"""What an allocation leaves of a budget, spent on the finest steps that fit.

An allocation ends with the step that meets the budget. Where that step is coarse (a head, an
expert, a width that all layers share), it may come far below, or stay above. Then a class of groups
is moved by some steps and another one takes up the difference: the pair that loses least of those
that meet the budget, else the one that comes closest, and so on from there. Where there are few
combinations of steps, all of them are looked at. Which units of a group go is not touched: only how
many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from depcut.allocate.space import Counts, Scores, Space
from depcut.plan.budget import NEAR, is_met
from depcut.plan.cost import Cost

_ROUNDS = 6
_ALL = 2**16  # combinations of steps that are looked at one by one
_TOGETHER = 2**21  # numbers that are held for costs of several rows at once
_CLASSES = 256  # that are moved, the finest
_REACH = 4096  # steps on either side that are looked at, all classes together
_MOVES = 256  # of all classes, the finest
_FINEST = 6  # classes that take up what a move leaves
_LAST_SHARE = 0.1  # of a class; it is given up only where the budget cannot be met otherwise

_Errors = NDArray[np.float64]


def spent(where: Space, counts: Counts, losses: Scores, cost: Cost, target: float) -> Counts:
    """Kept counts that meet a budget by some steps more or less than others.

    Args:
        where: The steps.
        counts: Kept count of each group, somewhere near the budget.
        losses: Of each step of each class, not decreasing.
        cost: The budgeted quantity.
        target: The budget.

    Returns:
        `counts` themselves where they meet it, or where nothing comes closer. Else others,
        [groups], that cost no more than the budget; or up to `NEAR` more, where only those meet it.
    """
    value = cost(counts)
    if is_met(value, target):
        return counts
    exchange = _Exchange(where, losses, cost, target)
    start, best, gap = where.taken(counts), counts, abs(value - target)
    for most in (np.maximum(exchange.most, start), where.available):
        taken, error, left = start, value - target, math.inf
        for _ in range(_ROUNDS):
            rows, errors = exchange.around(taken, error, most)
            if not len(rows):
                break
            first = exchange.order(rows, errors)[0]
            if abs(errors[first]) >= left:
                break
            taken, error, left = rows[first], float(errors[first]), abs(errors[first])
            if left < gap:
                best, gap = where.kept(taken), left
            if is_met(target + error, target):
                return best
    return best


def nearby(
    where: Space, counts: Counts, losses: Scores, cost: Cost, target: float
) -> Iterator[Counts]:
    """Other counts, [groups], that meet a budget by some steps more or less; of little loss first.

    Args:
        where: The steps.
        counts: Kept count of each group, somewhere near the budget.
        losses: Of each step of each class, not decreasing.
        cost: The budgeted quantity.
        target: The budget.
    """
    exchange = _Exchange(where, losses, cost, target)
    taken = where.taken(counts)
    most = np.maximum(exchange.most, taken)
    rows, errors = exchange.around(taken, cost(counts) - target, most)
    met = np.abs(errors) <= NEAR * target
    for number in exchange.order(rows[met], errors[met]):
        yield where.kept(rows[met][number])


class _Exchange:
    """Steps of one class against those of another; rows are steps taken, [rows, classes].

    Args:
        where: The steps.
        losses: Of each step of each class.
        cost: The budgeted quantity.
        target: The budget.

    Attributes:
        most: Steps that each class may give up without its last share.
    """

    def __init__(self, where: Space, losses: Scores, cost: Cost, target: float) -> None:
        self.where, self.cost, self.target = where, cost, target
        self.lost = [np.append(0.0, np.cumsum(lost)) for lost in losses]
        prices = where.per_class(cost.gradient(cost.dense)) * where.steps
        free = np.flatnonzero((where.available > 0) & (prices > 0))
        # The finest first; of equals, in the order of the model.
        self.free = [int(c) for c in free[np.argsort(prices[free], kind="stable")][:_CLASSES]]
        members = {c: np.flatnonzero(where.class_of == c) for c in self.free}
        self.parts = {c: cost.within(groups) for c, groups in members.items()}
        share = np.floor((1 - _LAST_SHARE) * where.sizes / where.steps).astype(np.int64)
        self.most = np.minimum(where.available, share)

    def around(self, taken: Counts, error: float, most: Counts) -> tuple[Counts, _Errors]:
        """Exchanges that end within the budget, or beyond it by so little that they meet it.

        Args:
            taken: Steps of each class, [classes].
            error: Their cost beyond the budget.
            most: Steps that each class may give up.

        Returns:
            The rows, and their cost beyond the budget, [rows].
        """
        if not self.free:
            return taken[None][:0], np.zeros(0)
        if math.prod(int(most[c]) + 1 for c in self.free) <= _ALL:
            rows, errors = self._all(taken, most)
        else:
            moved, beyond = self._moved(taken, error, most)
            found = [
                self._absorbed(number, moved[:several], beyond[:several], most)
                for place, number in enumerate(self.free)
                for several in (len(moved) if place < _FINEST else 1,)
            ]
            rows = np.concatenate([rows for rows, _ in found])
            errors = np.concatenate([errors for _, errors in found])
        fits = errors <= NEAR * self.target
        return rows[fits], errors[fits]

    def order(self, rows: Counts, errors: _Errors) -> Counts:
        """Numbers of the rows: those that meet the budget, within it and by loss, come first."""
        far = np.abs(errors) > NEAR * self.target
        kind = np.where(far, 2, errors > 0)
        loss = np.zeros(len(rows))
        for number in self.free:
            loss += self.lost[number][rows[:, number]]
        left = np.where(kind == 0, 0.0, np.abs(errors))
        return np.asarray(np.lexsort((loss, left, kind)))

    def _all(self, taken: Counts, most: Counts) -> tuple[Counts, _Errors]:
        """All combinations of steps, and their cost beyond the budget."""
        choices = np.indices([int(most[c]) + 1 for c in self.free]).reshape(len(self.free), -1)
        rows = np.repeat(taken[None], choices.shape[1], axis=0)
        rows[:, self.free] = choices.T
        return rows, self._costs(self.cost, rows) - self.target

    def _moved(self, taken: Counts, error: float, most: Counts) -> tuple[Counts, _Errors]:
        """Moves of one class each, and their cost beyond the budget.

        The first is none at all; of moves of about the same cost, the one of least loss is there.
        """
        rows, errors, losses = [taken[None]], [np.array([error])], [np.zeros(1)]
        reach = _REACH // len(self.free)
        for number in self.free:
            now, part = int(taken[number]), self.parts[number]
            choices = np.arange(max(0, now - reach), min(int(most[number]), now + reach) + 1)
            choices = choices[choices != now]
            moved = np.repeat(taken[None], len(choices), axis=0)
            moved[:, number] = choices
            rows.append(moved)
            errors.append(error + self._costs(part, moved) - self._costs(part, taken[None]))
            losses.append(self.lost[number][choices] - self.lost[number][now])
        table, beyond, loss = np.concatenate(rows), np.concatenate(errors), np.concatenate(losses)
        alike = np.round((beyond - error) / (0.1 * NEAR * self.target))
        order = np.lexsort((loss, alike))
        chosen = order[np.append(True, np.diff(alike[order]) != 0)]
        fine = chosen[np.argsort(np.abs(beyond[chosen] - error), kind="stable")]
        fine = np.append(0, fine[fine != 0][:_MOVES])
        return table[fine], beyond[fine]

    def _absorbed(
        self, number: int, rows: Counts, errors: _Errors, most: Counts
    ) -> tuple[Counts, _Errors]:
        """Each row with as many steps of a class as bring it within the budget, and with one less.

        Args:
            number: The class.
            rows: Steps taken.
            errors: Their cost beyond the budget, [rows].
            most: Steps that each class may give up.
        """
        part = self.parts[number]
        before = self._costs(part, rows)

        def beyond(choices: Counts) -> _Errors:
            moved = rows.copy()
            moved[:, number] = choices
            return errors + self._costs(part, moved) - before

        low = np.zeros(len(rows), dtype=np.int64)
        high = np.full(len(rows), most[number])
        while (low < high).any():
            middle = (low + high) // 2
            within = beyond(middle) <= 0
            high = np.where(within, middle, high)
            low = np.where(within, low, np.minimum(middle + 1, high))
        both = [high, np.maximum(high - 1, 0)]
        table = np.concatenate([rows, rows])
        table[:, number] = np.concatenate(both)
        return table, np.concatenate([beyond(choices) for choices in both])

    def _costs(self, cost: Cost, rows: Counts) -> _Errors:
        """A quantity, or the part of one that depends on a class, [rows]."""
        where = self.where
        several = max(1, _TOGETHER // max(cost.monomials.size, cost.items.size, 1))
        out = []
        for start in range(0, len(rows), several):
            taken = rows[start : start + several]
            kept = (where.sizes - taken * where.steps)[:, where.class_of] * where.units
            out.append(cost.many(kept))
        return np.concatenate(out) if out else np.zeros(0)
