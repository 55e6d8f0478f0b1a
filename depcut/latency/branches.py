"""Which residual branches go where time is budgeted: chosen by the model of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from depcut.allocate.choose import Chooser
from depcut.allocate.depth import plan_with_depth, refuse_several_calls
from depcut.allocate.judges import Names, judge_of
from depcut.allocate.savings import Savings
from depcut.allocate.space import Counts
from depcut.branches.branch import Residuals, bypass
from depcut.graph.liveness import gone
from depcut.plan.cost import Cost
from depcut.plan.data import PlanData
from depcut.plan.keep import Keep


@dataclass(frozen=True)
class Widths:
    """What is left to be chosen once some branches, perhaps none, are gone.

    Attributes:
        chooser: A request, resolved; it chooses among the groups that are left.
        cost: Seconds as a function of their kept counts.
        dropped: Names of the branches.
    """

    chooser: Chooser
    cost: Cost
    dropped: Names = ()

    def plan(self, counts: Counts, settings: Mapping[str, Any]) -> PlanData:
        """The plan that keeps the best units of each group, without the branches.

        Args:
            counts: Kept count of each group.
            settings: What the plan records beside the request.
        """
        plan = self.chooser.plan(counts, settings)
        return replace(plan, dropped=tuple(sorted(self.dropped))) if self.dropped else plan


def widths_without_branches(
    chooser: Chooser, residuals: Residuals, cost: Cost, seconds: float, aside: float = 0.0
) -> Widths:
    """What is left where the branches go whose plan costs least, see `depth_and_width`.

    A branch is taken to save the kernels whose sizes follow its own widths. What lies in front of
    and behind it (a norm, the addition) has the sizes of the residual stream, which stays: what
    the model of time knows nothing of is measured, see `aside`.

    Args:
        chooser: A request, resolved.
        residuals: Branches and blocks.
        cost: Seconds as a function of the kept counts.
        seconds: To come to.
        aside: Seconds that each branch saves beside the kernels of its own widths.

    Raises:
        InputError: The model was captured by several example calls.
        BudgetError: No number of branches and no widths are fast enough.
    """
    coupling = chooser.coupling
    refuse_several_calls(coupling)

    def plan_for(names: Names) -> PlanData | None:
        widths = without(chooser, residuals, cost, names, aside)
        if widths.cost.total < seconds:
            return None
        counts = widths.chooser.meet(widths.cost, seconds, "latency")
        return widths.plan(counts, {})

    def saved_at(keep: Keep) -> _SavedTime:
        return _SavedTime(cost, Savings(coupling, allowed, "channels"), keep, aside)

    allowed = residuals.sparing(chooser.spares)
    judge = judge_of(chooser, allowed, saved_at, plan_for)
    orders = [judge.ranked(kind) for kind in (allowed.branches, allowed.blocks)]
    dropped = plan_with_depth(plan_for, orders, judge).dropped
    return without(chooser, residuals, cost, dropped, aside)


def without(
    chooser: Chooser, residuals: Residuals, cost: Cost, names: Names, aside: float = 0.0
) -> Widths:
    """What is left to be chosen without these branches.

    Args:
        chooser: A request, resolved.
        residuals: Branches and blocks.
        cost: Seconds as a function of the kept counts.
        names: Of the branches and blocks that go.
        aside: Seconds that each branch saves beside the kernels of its own widths.
    """
    branches = residuals.named(names)
    narrowed = chooser.without(gone(chooser.coupling.program, bypass(branches)).tensors)
    absent = np.array(sorted(narrowed.absent), dtype=np.int64)
    left = cost.at(absent, np.zeros(len(absent))).less(aside * len(branches))
    return Widths(narrowed, replace(left, total=left(left.dense)), names)


class _SavedTime:
    """Seconds of the kernels that go with branches, see `depcut.allocate.judges.Saved`.

    Args:
        cost: Seconds as a function of the kept counts.
        savings: Knows which groups are there for which branches.
        keep: The widths at which they go.
        aside: Seconds that each branch saves beside these kernels.
    """

    def __init__(self, cost: Cost, savings: Savings, keep: Keep, aside: float) -> None:
        self.own_groups, self.aside = savings.own_groups, aside
        self.seconds = cost.summands(keep.counts[None])[0]
        self.summands: dict[int, list[int]] = {}
        slots = np.append(cost.starts, len(cost.monomials))
        in_slot = [cost.monomials[a:b].ravel() for a, b in pairwise(slots)]
        for number, row in enumerate(cost.items):
            for group in np.unique(np.concatenate([in_slot[slot] for slot in row])):
                self.summands.setdefault(int(group), []).append(number)

    def __call__(self, names: Sequence[str]) -> float:
        """What goes with these branches together."""
        rows = {n for i in self.own_groups(names) for n in self.summands.get(i, ())}
        return float(sum(self.seconds[n] for n in rows)) + self.aside * len(names)
