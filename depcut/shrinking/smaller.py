"""The smaller model of an analysis: by data, by what the model makes itself, or by its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from depcut.allocate.influence import output_change
from depcut.analysis import Analysis
from depcut.apply.plan import Plan
from depcut.apply.report import amend, report
from depcut.calibration.calls import refuse_lone_loss
from depcut.calibration.data import Data, Loss
from depcut.calibration.self_made import Auto, SelfMade, self_made
from depcut.capture.clone import clone
from depcut.capture.process_state import quiet
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.errors import BudgetError
from depcut.options import Options
from depcut.scores import is_initial, needs_of
from depcut.support.torch_private import pytree


def smaller(
    analysis: Analysis,
    dense: nn.Module,
    ratio: float | None,
    data: Data | Auto | None,
    chosen: Options,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Plan, nn.Module]:
    """The plan and the smaller model.

    Args:
        analysis: Of the model.
        dense: What the plan is applied to.
        ratio: Fraction removed, None where the options say a time.
        data: Items of data, "auto" or None.
        chosen: The options.
        loss: For criteria with gradients.
        optimizer: One that trains the model.
    """
    if data is None or not isinstance(data, str):
        calibration = analysis.calibrate(data, loss=loss, options=chosen)
        plan = analysis.plan(ratio, data=calibration, options=chosen)
        return plan, plan.apply(dense, optimizer=optimizer, data=calibration, options=chosen)
    refuse_lone_loss(loss)
    made = _made(analysis, chosen)
    plan, slim = _with(analysis, dense, ratio, made, chosen, optimizer)
    if made.note and made.calibration is None:
        amend(slim, notes=(*report(slim).notes, made.note))
    return plan, slim


def _made(analysis: Analysis, chosen: Options) -> SelfMade:
    """Calibration data from the model, where the options have a use for it."""
    needs = needs_of(chosen.score) if chosen.score is not None else "data"
    reads = needs == "data" or bool(chosen.compensate)
    if not reads or needs == "loss" or (chosen.score is not None and is_initial(chosen.score)):
        return SelfMade(None, (), "")
    return self_made(
        analysis.coupling,
        analysis.model,
        seed=chosen.seed,
        memory=chosen.memory,
        progress=chosen.progress,
    )


def _with(
    analysis: Analysis,
    dense: nn.Module,
    ratio: float | None,
    made: SelfMade,
    chosen: Options,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Plan, nn.Module]:
    """By inputs that were made, unless weights alone come closer on others of the same kind."""
    plan = analysis.plan(ratio, data=made.calibration, options=chosen)
    if made.calibration is None or not made.held_out:
        return plan, plan.apply(dense, optimizer=optimizer, data=made.calibration, options=chosen)
    slim = plan.apply(dense, data=made.calibration, options=chosen)
    other = _plain(analysis, dense, ratio, plan, chosen)
    near = far = 0.0
    if other is not None:
        near = _change(analysis.program, dense, slim, made)
        far = _change(analysis.program, dense, other[1], made)
        if not near <= far:
            plan, slim = other
    if optimizer is not None:
        best = made.calibration if near <= far else None
        settings = chosen if best is not None else _alone(chosen)
        slim = plan.apply(dense, optimizer=optimizer, data=best, options=settings)
    if not near <= far:
        worse = (
            f"{made.note}; on others of them the repaired model was further from the dense one "
            f"({near:.3g} of the outputs' scale) than units judged by their weights alone "
            f"({far:.3g}), which is what this is"
        )
        amend(slim, notes=(*report(slim).notes, worse))
    return plan, slim


def _alone(chosen: Options) -> Options:
    """The options where there is no data."""
    reads = chosen.score is not None and needs_of(chosen.score) == "data"
    return replace(
        chosen,
        score=None if reads else chosen.score,
        compensate="auto" if chosen.compensate else False,
    )


def _plain(
    analysis: Analysis, dense: nn.Module, ratio: float | None, plan: Plan, chosen: Options
) -> tuple[Plan, nn.Module] | None:
    """The smaller model without data; None where the budget cannot be met so."""
    alone = _alone(chosen)
    try:
        # To plan for a time once more would mean to measure once more.
        other = plan if "latency" in plan.settings else analysis.plan(ratio, options=alone)
    except BudgetError:
        return None
    return other, other.apply(dense, options=alone)


@preserved()
def _change(program: Program, dense: nn.Module, other: nn.Module, made: SelfMade) -> float:
    """How far the outputs of a smaller model are from the dense ones, see `output_change`."""
    return output_change(_outputs(program, dense, made), _outputs(program, other, made))


def _outputs(program: Program, model: nn.Module, made: SelfMade) -> list[list[Any]]:
    own, out = clone(model, buffers=True).eval(), []
    with torch.no_grad(), quiet():
        for leaves in made.held_out:
            args, kwargs = pytree.tree_unflatten(list(leaves), program.in_spec)
            out.append([_seen(leaf) for leaf in program.results.flat(own(*args, **kwargs))])
    return out


def _seen(leaf: Any) -> Any:
    """An output without what is the same for all of its last dimension: no softmax sees that."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf if leaf.ndim < 2 or leaf.shape[-1] < 2 else leaf - leaf.mean(-1, keepdim=True)
