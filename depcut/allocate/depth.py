"""How many residual branches are dropped; widths meet the rest of the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from depcut.allocate.choose import Chooser
from depcut.allocate.influence import (
    Batch,
    cheapest_first,
    examples,
    influence,
    output_change,
    outputs_of,
)
from depcut.allocate.savings import Savings
from depcut.branches.branch import Block, Branch, Residuals, bypass
from depcut.coupling.groups import Coupling
from depcut.errors import BudgetError, InputError
from depcut.graph.liveness import Gone, gone
from depcut.plan.cost import COSTS, ITEMS, NOTHING, dense_total
from depcut.plan.data import PlanData
from depcut.plan.keep import Keep
from depcut.support.processes import ALONE, Processes

Names = tuple[str, ...]

_FIRST = 6  # lengths of a chain that are tried before the best is looked at more closely
_LATER = 6


def depth_and_width(
    chooser: Chooser,
    residuals: Residuals,
    of: str,
    ratio: float,
) -> PlanData:
    """The plan that drops as many branches as change the outputs least, and narrows the rest.

    That is judged on the request's data, or on the captured inputs, which is weaker. A branch stays
    if one of its parameters is named by ignore= or ratios=.

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
    if coupling.program.others:
        raise InputError(
            "branches are dropped from the graph of one example call, and there are "
            f"{len(coupling.program.examples)}",
            where="depth=",
            remedy="leave depth out, or pass one example call",
        )
    data = chooser.request.calibration
    batches = [data.leaves(b) for b in data.batches] if data else []
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
    saved = Savings(coupling, allowed, of)
    everyone = data.everyone if data else ALONE
    batches = batches or examples(coupling)
    kinds: list[Sequence[Branch | Block]] = [allowed.branches, allowed.blocks]
    # Scored apart, as a block may have the name of a branch of its.
    orders = [ranked(coupling, chooser.model, kind, saved, batches, everyone) for kind in kinds]
    return plan_with_depth(coupling, chooser.model, allowed, plan_for, orders, batches, everyone)


def plan_with_depth(
    coupling: Coupling,
    model: nn.Module,
    residuals: Residuals,
    plan_for: Callable[[Names], PlanData | None],
    orders: Sequence[Sequence[Branch | Block]],
    batches: Sequence[Batch],
    everyone: Processes = ALONE,
) -> PlanData:
    """The best of the plans that drop the first d branches, or blocks, of an order.

    Of each order a handful of lengths is tried, d = 0 among them, then lengths between the best and
    its neighbours; the plan whose outputs are closest to the dense model's (relative L2, before any
    training) is taken.

    Args:
        coupling: The analysed model.
        model: Its weights.
        residuals: Branches and blocks.
        plan_for: The plan that meets the budget without these branches; None where dropping them
            removes more than is asked for.
        orders: Branches or blocks, in the order in which they go.
        batches: Flat inputs.
        everyone: The processes that share them.

    Raises:
        BudgetError: None of the plans meets the budget.
    """
    dense = outputs_of(Keep(coupling, {}), model, batches)
    known: dict[Names, tuple[float, int, PlanData] | None] = {}
    problems: list[BudgetError] = []

    def judge(names: Names) -> tuple[float, int, PlanData] | None:
        if names not in known:
            try:
                plan = plan_for(names)
            except BudgetError as problem:
                problems.append(problem)
                plan = None
            known[names] = None
            if plan is not None:
                outputs = outputs_of(plan.keep(coupling, residuals), model, batches)
                change = output_change(dense, outputs, everyone)
                known[names] = (change, len(names), plan)
        return known[names]

    for order in orders:
        _search(_Chain(order), judge)
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
            fresh = [n for n in _branches(candidate) if n not in known]
            known.update(fresh)
            self.names += fresh
            self.ends.append(len(self.names))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, length: int) -> Names:
        return tuple(self.names[: self.ends[length]])


def ranked(
    coupling: Coupling,
    model: nn.Module,
    candidates: Sequence[Branch | Block],
    saved: Callable[[Names], float],
    batches: Sequence[Batch],
    everyone: Processes = ALONE,
) -> list[Branch | Block]:
    """Branches, or blocks, by their change of the stream for what they save, the least first.

    Args:
        coupling: The analysed model.
        model: Its weights.
        candidates: What can go.
        saved: What dropping these branches saves of the budget.
        batches: Flat inputs.
        everyone: The processes that share them.
    """
    scores = influence(coupling, model, candidates, batches, everyone) if candidates else {}
    gains = {c.name: saved(_branches(c)) for c in candidates}
    return cheapest_first(candidates, scores, gains)


def _branches(candidate: Branch | Block) -> Names:
    return candidate.branches if isinstance(candidate, Block) else (candidate.name,)


def _search(chain: _Chain, judge: Callable[[Names], tuple[float, int, PlanData] | None]) -> None:
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
