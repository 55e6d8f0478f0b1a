"""What dropping residual branches costs, in the unit in which obs scores widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from depcut import axes
from depcut.allocate.choose import Chooser
from depcut.branches.branch import Branch
from depcut.calibration.data import Calibration
from depcut.calibration.sensitivity import sensitivities
from depcut.coupling.groups import Coupling
from depcut.plan.data import PlanData


def branch_losses(
    coupling: Coupling, model: nn.Module, branches: Sequence[Branch], data: Calibration
) -> dict[str, float]:
    """Share of the outputs' variance that each branch costs when its summand becomes its mean.

    Squared deviations of the summand from its mean, weighted by the outputs' mean squared
    derivative with respect to it: to first order. That is what obs has for the removal of all that
    the branch's last layer reads, so that losses of branches and of widths add up. What the readers
    of the stream can make up for is left out, for branches as for widths.

    Args:
        coupling: The analysed model.
        model: Its weights.
        branches: What can go.
        data: Batches, each of which runs forward and backward once.

    Returns:
        The loss by name; empty if the graph cannot be differentiated.
    """
    features = {b.operand: _features(coupling, b) for b in branches}
    felt = sensitivities(coupling, model, data, features)
    if not all(b.operand in felt for b in branches):
        return {}
    found = torch.stack([felt[b.operand].cpu() for b in branches]) if branches else torch.zeros(0)
    (losses,) = data.everyone.of_first("losses of branches", [found])
    return {b.name: float(loss) for b, loss in zip(branches, losses, strict=True)}


def width_loss(chooser: Chooser, plan: PlanData, groups: Iterable[int] | None = None) -> float:
    """The loss that the scores have for the units that a plan removes.

    Args:
        chooser: Of additive scores.
        plan: One of its plans.
        groups: Numbers of those that count; None: all.
    """
    names = [g.name for g in chooser.coupling.groups]
    total = 0.0
    for number in range(len(names)) if groups is None else groups:
        if names[number] in plan.kept:
            values = chooser.scores[number]
            kept = np.take_along_axis(values, np.asarray(plan.kept[names[number]]), axis=-1)
            total += float(values.sum() - kept.sum())
    return total


def _features(coupling: Coupling, branch: Branch) -> tuple[int, ...]:
    """Dimensions of a branch's summand that its own parameters have: its channels."""
    dims = coupling.env[branch.operand]
    assert isinstance(dims, tuple)
    own = {
        leaf
        for name in branch.parameters
        for term in coupling.dims.get(name, ())
        for leaf in axes.leaves(axes.resolve(term))
    }
    return tuple(
        i - len(dims)
        for i, term in enumerate(dims)
        if i and not own.isdisjoint(axes.leaves(axes.resolve(term)))
    )
