"""How many residual branches are dropped; widths meet the rest of the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from depcut.allocate.choose import Chooser
from depcut.allocate.judges import Judge, Names, PlanFor, branches_of, judge_of
from depcut.allocate.savings import Savings
from depcut.branches.branch import Block, Branch, Residuals, bypass
from depcut.coupling.groups import Coupling
from depcut.errors import BudgetError, InputError
from depcut.graph.liveness import Gone, gone
from depcut.plan.cost import COSTS, ITEMS, NOTHING, dense_total
from depcut.plan.data import PlanData

_Judged = tuple[float, int, PlanData]

_FIRST = 6  # lengths of a chain that are tried before the best is looked at more closely
_LATER = 6


def depth_and_width(
    chooser: Chooser,
    residuals: Residuals,
    of: str,
    ratio: float,
) -> PlanData:
    """The plan that drops the branches that cost least, and narrows the rest.

    Where the scores are losses in shares of the outputs' variance ("obs" with data), the least sum
    of the losses of branches and of widths wins. Else the change of the outputs before any repair,
    on the request's data or on the captured inputs, which is weaker. A branch stays if one of its
    parameters is named by ignore= or ratios=.

    Args:
        chooser: A request, resolved.
        residuals: Branches and blocks.
        of: "macs", "params" or "channels".
        ratio: Fraction of it that is removed.

    Raises:
        InputError: The model was captured by several example calls.
        BudgetError: No number of branches and no widths meet the budget.
    """
    coupling = chooser.coupling
    refuse_several_calls(coupling)
    dense = dense_total(ITEMS[of](coupling, NOTHING))
    target = dense * (1 - ratio)

    def without(names: Names) -> Gone:
        return gone(coupling.program, bypass(residuals.named(names)))

    def plan_for(names: Names) -> PlanData | None:
        dead = without(names)
        quantity = COSTS[of](coupling, dead)
        if quantity.total < target:
            return None
        narrowed = chooser.without(dead.tensors)
        counts = narrowed.meet(quantity, target, of)
        plan = narrowed.plan(counts, {"ratio": float(ratio), "of": of, "depth": True})
        return replace(plan, dropped=tuple(sorted(names)))

    allowed = residuals.sparing(chooser.spares)
    judge = judge_of(chooser, allowed, partial(Savings, coupling, allowed, of), plan_for)
    # Ranked apart, as a block may have the name of a branch of its.
    orders = [judge.ranked(kind) for kind in (allowed.branches, allowed.blocks)]
    return plan_with_depth(plan_for, orders, judge)


def refuse_several_calls(coupling: Coupling) -> None:
    """Refuse to drop branches of a model that was captured by several example calls.

    Args:
        coupling: The analysed model.

    Raises:
        InputError: There are several.
    """
    if coupling.program.others:
        raise InputError(
            "branches are dropped from the graph of one example call, and there are "
            f"{len(coupling.program.examples)}",
            where="depth=",
            remedy="leave depth out, or pass one example call",
        )


def plan_with_depth(
    plan_for: PlanFor, orders: Sequence[Sequence[Branch | Block]], judge: Judge
) -> PlanData:
    """The best of the plans that drop the first d branches, or blocks, of an order.

    Of each order a handful of lengths is tried, d = 0 among them, then lengths between the best and
    its neighbours.

    Args:
        plan_for: The plan that meets the budget without these branches; None where dropping them
            removes more than is asked for.
        orders: Branches or blocks, in the order in which they go.
        judge: Of the plans.

    Raises:
        BudgetError: None of the plans meets the budget.
    """
    known: dict[Names, _Judged | None] = {}
    problems: list[BudgetError] = []

    def judged(names: Names) -> _Judged | None:
        if names not in known:
            try:
                plan = plan_for(names)
            except BudgetError as problem:
                problems.append(problem)
                plan = None
            known[names] = None if plan is None else (judge.change(plan), len(names), plan)
        return known[names]

    for order in orders:
        _search(_Chain(order), judged)
    results = [result for result in known.values() if result is not None]
    if not results:
        raise problems[0]
    return min(results, key=lambda result: result[:2])[2]


class _Chain:
    """Growing sets of branches: the first d candidates of an order, for d = 0, 1, ...

    Args:
        candidates: Branches or blocks, in the order in which they go.
    """

    def __init__(self, candidates: Sequence[Branch | Block]) -> None:
        self.names: list[str] = []
        self.ends = [0]
        known: set[str] = set()
        for candidate in candidates:
            fresh = [n for n in branches_of(candidate) if n not in known]
            known.update(fresh)
            self.names += fresh
            self.ends.append(len(self.names))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, length: int) -> Names:
        return tuple(self.names[: self.ends[length]])


def _search(chain: _Chain, judge: Callable[[Names], _Judged | None]) -> None:
    """Judge some prefixes of a chain: spread out at first, then closer to the best."""
    last = len(chain) - 1
    tried = sorted({round(i * last / (_FIRST - 1)) for i in range(_FIRST)})
    values = {d: judge(chain[d]) for d in tried}
    for _ in range(_LATER):
        good = {d: v[0] for d, v in values.items() if v is not None}
        if not good:
            return
        best = min(good, key=lambda d: good[d])
        around = [d for d in sorted(values) if d < best][-1:] + [
            d for d in sorted(values) if d > best
        ][:1]
        between = [(best + d) // 2 if d < best else (best + d + 1) // 2 for d in around]
        fresh = [d for d in between if d not in values]
        if not fresh:
            return
        for d in fresh:
            values[d] = judge(chain[d])
