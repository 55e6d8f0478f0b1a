"""Counts that a class can be built with, within a budget; and what free widths would lose."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np

from depcut.allocate.choose import Chooser
from depcut.allocate.space import Counts, Scores
from depcut.errors import BudgetError
from depcut.plan.budget import is_met
from depcut.plan.cost import Cost
from depcut.plan.data import PlanData
from depcut.plan.keep import Keep
from depcut.plan.stacks import REBUILD
from depcut.rebuild.rebuilding import Rebuilding

_NEIGHBOURS = 48  # counts next to the best that are built where the class refuses these


def within(
    rebuilding: Rebuilding,
    chooser: Chooser,
    quantity: Cost,
    ratio: float,
    of: str,
    target: float | None = None,
) -> PlanData:
    """The plan that comes closest to a budget of those that the class can be built with.

    Args:
        rebuilding: What the class can express.
        chooser: A request, resolved; its groups shrink in the steps of the class.
        quantity: What is budgeted.
        ratio: Fraction of it that is removed.
        of: Its name, for messages.
        target: What is to be left of it where layers are gone already.

    Raises:
        BudgetError: No such counts meet the budget.
    """
    target = quantity.total * (1 - ratio) if target is None else target
    counts = _built(rebuilding, chooser, quantity, target, of)
    plan = chooser.plan(counts, {"ratio": ratio, "of": of})
    additive = chooser.additive
    losses = {"loss": lost_share(chooser.scores, counts, additive=additive), "free_loss": None}
    free = copy.copy(chooser)
    free.request = replace(chooser.request, together=None)
    free.held = chooser.held - rebuilding.held.keys()
    with suppress(BudgetError):
        others = free.meet(quantity, target, of)
        losses["free_loss"] = lost_share(free.scores, others, additive=additive)
    return replace(
        plan, settings={**plan.settings, REBUILD: {**rebuilding.record(counts), **losses}}
    )


def lost_share(scores: Scores, counts: Counts, *, additive: bool) -> float:
    """Share of the score that goes: of all groups together where scores add up, else on average.

    Args:
        scores: For each group [units], or [rows, units] where it chooses row by row.
        counts: Kept count of each group.
        additive: Whether scores are losses that add up, also over groups.
    """
    gone, whole = [], []
    for values, count in zip(scores, counts, strict=True):
        rows = np.sort(np.atleast_2d(values), axis=-1)
        gone.append(float(rows[:, : rows.shape[-1] - int(count)].sum()))
        whole.append(float(rows.sum()))
    if additive:
        return sum(gone) / max(sum(whole), 1e-300)
    return float(np.mean([g / max(w, 1e-300) for g, w in zip(gone, whole, strict=True)]))


def _built(
    rebuilding: Rebuilding, chooser: Chooser, quantity: Cost, target: float, of: str
) -> Counts:
    """The best counts, or those next to them, that the class can be built with."""
    with saying_why():
        first = chooser.meet(quantity, target, of)
    built = _settled_counts(rebuilding, chooser, quantity, first, target, of)
    if built is not None and is_met(quantity(built), target):
        return built
    starts = [first] if built is None else [first, built]
    for start in starts if chooser.request.align == 1 else ():
        near = chooser.nearby(quantity, start, target, of)
        for beside in itertools.islice(near, _NEIGHBOURS):
            if rebuilding.twin(beside) is not None:
                return beside
    if built is not None:
        return built
    tried = [first]
    while len(tried) <= _NEIGHBOURS:
        other = chooser.nudged(quantity, first, target, tried)
        if other is None:
            break
        if rebuilding.twin(other) is not None:
            return other
        tried.append(other)
    raise refused(rebuilding)


def _settled_counts(
    rebuilding: Rebuilding, chooser: Chooser, quantity: Cost, counts: Counts, target: float, of: str
) -> Counts | None:
    """Counts that the class can be built with, conflicts settled one by one; None without."""
    with suppress(BudgetError):
        for _ in rebuilding.moves:
            if rebuilding.twin(counts) is not None:
                return counts
            settled = _settled(rebuilding, counts)
            if not settled:
                break
            # What conflicts is settled; the rest makes up for the difference.
            chooser = chooser.fixing(settled)
            counts = chooser.meet(quantity, target, of)
        if rebuilding.twin(counts) is not None:
            return counts
    return None


def _settled(rebuilding: Rebuilding, counts: Counts) -> dict[int, int]:
    """Counts, by group, of one or two moves that the class refuses together as they are.

    The one of larger steps stays, the other one goes to the closest count that suits it.
    """
    dense = Keep(rebuilding.coupling, {}).counts
    cut = [m for m in rebuilding.moves if any(counts[i] != dense[i] for i in m.tie.groups)]
    cut.sort(key=lambda move: move.tie.steps)
    for pair in [(m, m) for m in cut] + list(itertools.combinations(cut, 2)):
        trial = dense.copy()
        for move in pair:
            trial[[*move.tie.groups]] = counts[[*move.tie.groups]]
        if rebuilding.twin(trial) is not None:
            continue
        fine = pair[1]
        groups = [*fine.tie.groups]
        unit = dense[groups] // fine.tie.steps
        now = int(counts[groups[0]] // unit[0])
        others = sorted(range(1, fine.tie.steps + 1), key=lambda t: abs(t - now))
        for steps in others[1 : _NEIGHBOURS + 1]:
            trial[groups] = unit * steps
            if rebuilding.twin(trial) is not None:
                return {int(i): int(trial[i]) for m in pair for i in m.tie.groups}
        return {}
    return {}


@contextmanager
def saying_why() -> Iterator[None]:
    """Errors about a budget say that it is the config that limits the widths."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(
            f"{error.what}, with the widths that the model's config can say",
            where=error.where,
            remedy=f"{error.remedy}; or pass rebuildable=False, which cuts every width for itself",
        ) from error


def refused(rebuilding: Rebuilding) -> BudgetError:
    """The error for counts that the class refuses.

    Args:
        rebuilding: What the class can express.
    """
    names = [".".join(map(str, p)) for move in rebuilding.moves for p, _ in move.powers]
    return BudgetError(
        "the model's class takes none of the configs that come near the budget",
        where=", ".join(dict.fromkeys(names)),
        remedy="ask for another ratio, or pass rebuildable=False, which cuts each width for itself",
    )


def checked(rebuilding: Rebuilding, plan: PlanData) -> PlanData:
    """A plan with the record of what to build its class with.

    Args:
        rebuilding: What the class can express.
        plan: Chosen in the steps of the class.

    Raises:
        BudgetError: The class cannot be built with its counts.
    """
    counts = plan.keep(rebuilding.coupling).counts
    if rebuilding.twin(counts) is None:
        raise refused(rebuilding)
    return replace(plan, settings={**plan.settings, REBUILD: rebuilding.record(counts)})
