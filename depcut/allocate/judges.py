"""What plans that drop branches are judged by: losses that add up, or the change of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from torch import nn

from depcut.allocate.branch_losses import branch_losses, width_loss
from depcut.allocate.choose import Chooser
from depcut.allocate.influence import (
    Batch,
    cheapest_first,
    examples,
    influence,
    output_change,
    outputs_of,
)
from depcut.branches.branch import Block, Branch, Residuals
from depcut.coupling.groups import Coupling
from depcut.errors import BudgetError
from depcut.plan.data import PlanData
from depcut.plan.keep import Keep
from depcut.support.processes import ALONE, Processes

Names = tuple[str, ...]
PlanFor = Callable[[Names], PlanData | None]


class Saved(Protocol):
    """What dropping branches saves of a budgeted quantity."""

    def __call__(self, names: Names) -> float:
        """What goes with these branches."""

    def own_groups(self, names: Names) -> list[int]:
        """Numbers of the groups that are there for these branches alone."""


SavedAt = Callable[[Keep], Saved]  # at the widths that stay


class Judge(Protocol):
    """Ranks branches, or blocks, and says how bad a plan is."""

    def ranked(self, candidates: Sequence[Branch | Block]) -> list[Branch | Block]:
        """Those whose removal saves something, in the order in which they go."""

    def change(self, plan: PlanData) -> float:
        """What a plan does to the model; the least is best."""


def judge_of(chooser: Chooser, residuals: Residuals, saved_at: SavedAt, plan_for: PlanFor) -> Judge:
    """The judge that the request has what it takes for.

    Args:
        chooser: A request, resolved.
        residuals: The branches that can go.
        saved_at: What branches save of the budget at some widths.
        plan_for: The plan that meets the budget without some branches.
    """
    coupling, model, data = chooser.coupling, chooser.model, chooser.request.calibration
    if data is not None and chooser.shares_of_outputs:
        losses = branch_losses(coupling, model, residuals.branches, data)
        if losses:
            return PredictedLoss(chooser, residuals, saved_at, losses, plan_for)
    batches = [data.leaves(b) for b in data.batches] if data else examples(coupling)
    everyone = data.everyone if data else ALONE
    saved = saved_at(Keep(coupling, {}))
    return OutputChange(coupling, model, residuals, saved, batches, everyone)


class PredictedLoss:
    """The losses of the branches that go and of the units that go, added up; no forward pass.

    Args:
        chooser: A request, resolved, whose scores are shares of the outputs' variance.
        residuals: The branches that can go.
        saved_at: What they save of the budget at some widths.
        losses: Of the branches, in the same unit.
        plan_for: The plan that meets the budget without some branches.
    """

    def __init__(
        self,
        chooser: Chooser,
        residuals: Residuals,
        saved_at: SavedAt,
        losses: Mapping[str, float],
        plan_for: PlanFor,
    ) -> None:
        self.chooser, self.residuals, self.losses = chooser, residuals, losses
        self.saved_at = saved_at
        self.widths: PlanData | None = None
        with suppress(BudgetError):
            self.widths = plan_for(())

    def ranked(self, candidates: Sequence[Branch | Block]) -> list[Branch | Block]:
        """By what is lost more than by widths alone, for what those leave of the budget.

        A branch that widths alone have nearly emptied costs little more when it goes, and saves
        little.
        """
        coupling, plan = self.chooser.coupling, self.widths
        keep = Keep(coupling, {}) if plan is None else plan.keep(coupling, self.residuals)
        saved = self.saved_at(keep)
        more: dict[str, float] = {}
        for candidate in candidates:
            names = branches_of(candidate)
            lost = sum(self.losses[name] for name in names)
            if plan is not None:
                lost -= width_loss(self.chooser, plan, saved.own_groups(names))
            more[candidate.name] = lost
        return cheapest_first(candidates, more, {c.name: saved(branches_of(c)) for c in candidates})

    def change(self, plan: PlanData) -> float:
        """Predicted share of the outputs' variance that is lost after compensation."""
        lost = sum(self.losses[name] for name in plan.dropped)
        return lost + width_loss(self.chooser, plan)


class OutputChange:
    """Relative L2 distance of the outputs before any repair; branches rank by their influence.

    Args:
        coupling: The analysed model.
        model: Its weights.
        residuals: The branches that can go.
        saved: What dropping some of them saves of the budget.
        batches: Flat inputs; the captured ones are weaker evidence than data.
        everyone: The processes that share them.
    """

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module,
        residuals: Residuals,
        saved: Saved,
        batches: Sequence[Batch],
        everyone: Processes = ALONE,
    ) -> None:
        self.coupling, self.model, self.residuals = coupling, model, residuals
        self.saved, self.batches, self.everyone = saved, batches, everyone
        self.dense = outputs_of(Keep(coupling, {}), model, batches)

    def ranked(self, candidates: Sequence[Branch | Block]) -> list[Branch | Block]:
        """By their change of the stream for what they save, the least first."""
        if not candidates:
            return []
        scores = influence(self.coupling, self.model, candidates, self.batches, self.everyone)
        gains = {c.name: self.saved(branches_of(c)) for c in candidates}
        return cheapest_first(candidates, scores, gains)

    def change(self, plan: PlanData) -> float:
        """How far the outputs are from the dense model's."""
        keep = plan.keep(self.coupling, self.residuals)
        outputs = outputs_of(keep, self.model, self.batches)
        return output_change(self.dense, outputs, self.everyone)


def branches_of(candidate: Branch | Block) -> Names:
    """Names of the branches that go with a branch or a block."""
    return candidate.branches if isinstance(candidate, Block) else (candidate.name,)
