"""How many whole layers go so that the class can be built anew; widths meet the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from depcut.allocate.choose import Chooser
from depcut.allocate.depth import plan_with_depth
from depcut.allocate.judges import Names, judge_of
from depcut.allocate.savings import Savings
from depcut.branches.branch import Block, Branch, Residuals, bypass
from depcut.errors import InputError
from depcut.graph.liveness import gone
from depcut.plan.cost import COSTS, ITEMS, NOTHING, dense_total
from depcut.plan.data import PlanData
from depcut.plan.stacks import REBUILD
from depcut.rebuild.choose import within
from depcut.rebuild.layers import Droppable, fits
from depcut.rebuild.rebuilding import Rebuilding

_MISS = 0.03  # share of the dense quantity by which fewer layers may miss a budget widths meet


def layers_and_width(
    rebuilding: Rebuilding,
    layers: Droppable,
    residuals: Residuals,
    chooser: Chooser,
    ratio: float,
    of: str,
) -> PlanData:
    """The plan that drops the layers that cost least, and narrows the others.

    It is judged as `depcut.allocate.depth.depth_and_width` does. A layer stays if one of its
    parameters is named by ignore= or ratios=.

    Args:
        rebuilding: What the class can express of widths.
        layers: What it can express of layers.
        residuals: The model's branches.
        chooser: A request, resolved; its groups shrink in the steps of the class.
        ratio: Fraction of the quantity that is removed.
        of: "macs", "params" or "channels".

    Raises:
        BudgetError: No number of layers and no widths meet the budget.
    """
    coupling = chooser.coupling
    dense = dense_total(ITEMS[of](coupling, NOTHING))
    target = dense * (1 - ratio)

    misses: list[float] = []  # of the widths alone, which are judged first, where they can meet it

    def plan_for(names: Names) -> PlanData | None:
        stacks = layers.without(names)
        if stacks is None or not fits(rebuilding.builder, stacks):
            return None
        dead = gone(coupling.program, bypass(residuals.named(names)))
        quantity = COSTS[of](coupling, dead)
        if quantity.total < target:
            return None
        narrowed = chooser.without(dead.tensors)
        shorter = replace(rebuilding, stacks=stacks, absent=narrowed.absent)
        plan = within(shorter, narrowed, quantity, float(ratio), of, target)
        settings = {**plan.settings, "depth": True}
        if not layers.stacks:
            settings[REBUILD] = {**settings[REBUILD], "whole_layers": layers.why}
        made = replace(plan, settings=settings, dropped=tuple(sorted(names)))
        miss = abs(quantity(made.keep(coupling, residuals).counts) - target) / dense
        if not names:
            misses.append(miss)
        return made if miss <= max([_MISS, *misses] if misses else [math.inf]) else None

    allowed = residuals.sparing(chooser.spares)
    known = {branch.name for branch in allowed.branches}
    blocks = [
        block
        for found in layers.blocks.values()
        for block in found.values()
        if known.issuperset(block.branches)
    ]
    judge = judge_of(chooser, allowed, partial(Savings, coupling, allowed, of), plan_for)
    orders = [_last_first(layers, _one_of_each(rebuilding, layers, judge.ranked(blocks)))]
    return plan_with_depth(plan_for, orders, judge)


def timed(residuals: Residuals, rebuilding: Rebuilding | None) -> Residuals:
    """The branches that may go where time is budgeted.

    Args:
        residuals: The model's branches.
        rebuilding: What the class can express, where it is to be built anew.

    Raises:
        InputError: It is: whole layers go for a budget of a count alone.
    """
    if rebuilding is not None:
        raise InputError(
            "whole layers of a class that is built from its config cannot be dropped for a budget "
            "of time",
            where="depth=",
            remedy="use of='macs' or of='params' and measure with depcut.compare, or pass "
            "rebuildable=False, which drops branches",
        )
    return residuals


def _one_of_each(
    rebuilding: Rebuilding, layers: Droppable, order: Sequence[Branch | Block]
) -> list[Branch | Block]:
    """An order in which the last layer of each kind that the config names goes in the end."""
    entries = rebuilding.builder.recipe.lists
    kinds: dict[str, Any] = {}
    left: Counter[Any] = Counter()
    for number, stack in enumerate(layers.stacks):
        for i in range(stack.count):
            kind = (number, *(repr(entries[path][i]) for path in stack.lists))
            left[kind] += 1
            if i in layers.blocks[number]:
                kinds[layers.blocks[number][i].name] = kind
    first: list[Branch | Block] = []
    last: list[Branch | Block] = []
    for block in order:
        kind = kinds[block.name]
        (first if left[kind] > 1 else last).append(block)
        left[kind] -= 1
    return first + last


def _last_first(layers: Droppable, order: Sequence[Branch | Block]) -> list[Branch | Block]:
    """An order in which the last layers go first, in lists that know their layers by place."""
    out = list(order)
    for number in layers.ordered:
        mine = list(layers.blocks[number].values())
        places = [i for i, block in enumerate(out) if any(block is own for own in mine)]
        left = [block for block in reversed(mine) if any(block is out[i] for i in places)]
        for place, block in zip(places, left, strict=True):
            out[place] = block
    return out
