"""How an analysis makes a frontier: score once, then a plan a ratio."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import (
    allocation_or_default,
    check_budget,
    criterion_or_default,
)
from depcut.allocate.refusals import refuse_frozen
from depcut.apply.plan import Plan
from depcut.branches.branch import Residuals
from depcut.calibration.calls import blaming_calls
from depcut.calibration.data import Calibration, Data, Loss
from depcut.calibration.sharing import refuse_measured
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.errors import BudgetError, InputError
from depcut.frontiers.frontier import Frontier, FrontierRow
from depcut.frontiers.scored import Scored
from depcut.latency.model import LatencyModel
from depcut.options import (
    ONNXRUNTIME,
    CalibrateKeywords,
    FrontierKeywords,
    Options,
    PlanKeywords,
)
from depcut.plan.cost import COSTS, Cost
from depcut.rebuild.choose import lost_share
from depcut.scores import is_additive, score, score_name
from depcut.support.checks import check_flag, check_items
from depcut.support.failures import shown
from depcut.support.keywords import settled, takes_options
from depcut.support.processes import together_on_data

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Scanned:
    """An analysis, as far as frontiers are made of it."""

    model: nn.Module
    coupling: Coupling

    @property
    @abstractmethod
    def costs(self) -> dict[str, Cost]:
        """MACs, parameters and channels by the kept counts."""

    @property
    @abstractmethod
    def residuals(self) -> Residuals:
        """Residual branches."""

    @abstractmethod
    def plan(
        self,
        ratio: float | None = None,
        *,
        data: Data | Calibration | None = None,
        loss: Loss | None = None,
        options: Options | None = None,
        **given: Unpack[PlanKeywords],
    ) -> Plan:
        """Choose the units that stay."""

    @abstractmethod
    def calibrate(
        self,
        data: Data | Calibration | None,
        *,
        loss: Loss | None = None,
        options: Options | None = None,
        **given: Unpack[CalibrateKeywords],
    ) -> Calibration | None:
        """Read and check calibration data."""

    @abstractmethod
    def latency(
        self,
        *,
        runtime: str = ONNXRUNTIME,
        threads: int = 1,
        samples: int = 0,
        refresh: bool = False,
        progress: bool = True,
    ) -> LatencyModel:
        """Time as a function of the kept counts."""

    @takes_options(Options, FrontierKeywords)
    @preserved()
    @together_on_data
    def frontier(
        self,
        ratios: Iterable[float] = RATIOS,
        *,
        data: Data | Calibration | None = None,
        loss: Loss | None = None,
        latency: bool = False,
        options: Options | None = None,
        **given: Unpack[FrontierKeywords],
    ) -> Frontier:
        """Plans for several ratios, of units that are scored once.

        Each is the plan that `plan` makes for its ratio; nothing is applied. With depth=True, which
        branches go is judged anew for each ratio, and with of="latency" each is measured.

        Args:
            ratios: Fractions removed of the quantity named by `of`, each in (0, 1); one row each.
            data: Calibration data: an iterable of what the model takes, or of (input, target).
            loss: A function of (output, target), for criteria that need gradients.
            latency: Whether to predict the time of each row, see `latency`; where time is budgeted,
                it is measured anyway.
            options: What else is chosen, as one object; the keywords that follow go before it.
            **given: The fields of `depcut.Options`.

        Raises:
            InputError: An option has a wrong value, or a name matches nothing.
            BudgetError: None of the ratios can be reached, or nothing can be removed.
            LatencyError: The time cannot be measured.
            ProcessError: Another of several processes failed, or has another model or other data.
        """
        chosen = settled(Options, options, given, FrontierKeywords, "frontier", one_stage=True)
        wanted = _checked(ratios)
        check_flag(latency, "latency")
        of = chosen.of
        for ratio in wanted:
            of = check_budget(ratio, chosen.of, chosen.latency_ms)
        if latency and chosen.depth:
            raise InputError(
                "the time without branches is not modelled, only that of widths",
                where="latency=",
                remedy="leave latency or depth out, and measure rows with depcut.compare",
            )
        if not self.coupling.groups:
            refuse_frozen(self.coupling.frozen, type(self.model).__name__)
        calibration = self.calibrate(data, loss=loss, options=chosen)
        if calibration is not None:
            refuse_measured(calibration.everyone, of)
            calibration.everyone.require_same("options", {"ratios": [*wanted], **chosen.record()})
        scored = self._scored(chosen, calibration)
        times = None
        if latency and of != "latency":
            times = self.latency(
                runtime=chosen.runtime, threads=chosen.threads, progress=chosen.progress
            )
        plans = {ratio: self._planned(ratio, scored, chosen, calibration) for ratio in wanted}
        unreached = {r: plan for r, plan in plans.items() if isinstance(plan, BudgetError)}
        if len(unreached) == len(plans):
            raise unreached[min(unreached)]
        allocation = allocation_or_default(chosen.allocation, of)
        rows = (
            self._row(ratio, plan, scored, times, calibration)
            for ratio, plan in plans.items()
            if isinstance(plan, Plan)
        )
        return Frontier(
            tuple(rows),
            round(self.costs["macs"].total),
            round(self.costs["params"].total),
            {"of": of, "score": score_name(scored), "allocation": allocation},
            {ratio: str(error) for ratio, error in unreached.items()},
        )

    def _planned(
        self, ratio: float, scored: Scored, chosen: Options, calibration: Calibration | None
    ) -> Plan | BudgetError:
        """The plan for a ratio, which says of itself what was asked for; or why there is none."""
        try:
            plan = self.plan(ratio, data=calibration, options=replace(chosen, score=scored))
        except BudgetError as error:
            return error
        return replace(plan, settings={**plan.settings, "options": chosen.record()})

    def _scored(self, chosen: Options, calibration: Calibration | None) -> Scored:
        """The criterion asked for, of which the scores are known."""
        wanted = criterion_or_default(chosen.score, has_data=calibration is not None)
        with blaming_calls(self.model, self.coupling.program, calibration):
            values = score(wanted, self.coupling, self.model, chosen.seed, calibration)
        return Scored(values, score_name(wanted), additive=is_additive(wanted))

    def _row(
        self,
        ratio: float,
        plan: Plan,
        scored: Scored,
        times: LatencyModel | None,
        calibration: Calibration | None,
    ) -> FrontierRow:
        """What is known of a plan."""
        keep = plan.keep(residuals=self.residuals)
        counts, costs = keep.counts.copy(), self.costs
        if plan.dropped:
            costs = {name: COSTS[name](self.coupling, keep.gone) for name in ("macs", "params")}
        for group in self.coupling.groups if plan.dropped else ():
            if all(member.tensor in keep.gone.tensors for member in group.members):
                counts[group.index] = 0
        milliseconds = plan.settings.get("latency", {}).get("measured_ms")
        if times is not None:
            milliseconds = 1e3 * times.predict(plan)
        return FrontierRow(
            ratio,
            plan,
            lost_share(scored.scores, counts, additive=scored.additive),
            round(costs["macs"](keep.counts)),
            round(costs["params"](keep.counts)),
            milliseconds,
            calibration,
        )


def _checked(ratios: Iterable[float]) -> tuple[float, ...]:
    """The ratios as plain numbers; each is checked where its budget is."""
    remedy = "pass fractions to remove, such as (0.25, 0.5, 0.75)"
    listed = check_items(ratios, "ratios", remedy)
    if not listed or len(set(map(repr, listed))) < len(listed):
        raise InputError(f"ratios is {shown(ratios)}", where="ratios=", remedy=remedy)
    return listed
