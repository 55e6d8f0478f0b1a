"""How much of a model's weights a plan removes, for the adaptive learning rate."""

from __future__ import annotations

import math

from torch import nn

from depcut.apply.plan import Plan
from depcut.capture.plain import refuse_spread
from depcut.reference.slices import index_tensors
from depcut.support.checks import check_kind
from depcut.support.unwrap import unwrapped


def relative_distance(model: nn.Module, plan: Plan) -> float:
    """d = ||W - W_p|| / (||W|| sqrt(s)), before any compensation.

    W are all parameters, each element once, W_p the same without what the plan removes, s the share
    of the elements removed (Zimmer, Spiegel & Pokutta, ICLR 2023, section 3). Removing the smallest
    weights gives d <= 1; other criteria may give more.

    Args:
        plan: Of this step of pruning alone.
        model: The model as it was before this step.

    Returns:
        The distance; 0 if nothing is removed.

    Raises:
        PlanError: The model has another architecture.
    """
    model = unwrapped(model)
    refuse_spread(model)
    keep = bound(plan, model).keep()
    energy = removed = 0.0
    elements = gone = 0
    for name, parameter in model.named_parameters():
        squares = parameter.detach().abs().double().square()
        energy += float(squares.sum())
        elements += squares.numel()
        if name in keep.gone.tensors:
            gone += squares.numel()
            removed += float(squares.sum())
        elif name in keep.tensors:
            kept = index_tensors(squares, keep.tensors[name])
            gone += squares.numel() - squares[kept].numel()
            squares[kept] = 0
            removed += float(squares.sum())
    if not gone or not energy:
        return 0.0
    return math.sqrt(removed / energy / (gone / elements))


def bound(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the analysis of this very model attached.

    Args:
        plan: As made, or loaded from a file.
        model: An instance of its architecture.

    Raises:
        PlanError: The model has another architecture.
    """
    check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
    return plan if plan.coupling is not None and plan.model is model else plan.bind(model)
