"""The groups of a model, its frozen dimensions with the reasons, and plans made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import (
    Chooser,
    Request,
    allocation_or_default,
    check_budget,
    criterion_or_default,
)
from depcut.allocate.depth import depth_and_width
from depcut.allocate.refusals import refuse_frozen
from depcut.apply.own_code import with_own_code
from depcut.apply.plan import Plan, planned
from depcut.axes import Indices
from depcut.branches.branch import Branch, Residuals
from depcut.branches.find import residuals
from depcut.calibration.calls import blaming_calls
from depcut.calibration.data import Calibration, Data, Loss
from depcut.calibration.self_made import Auto, given_or_made
from depcut.calibration.sharing import refuse_measured
from depcut.capture.capture import capture
from depcut.capture.inputs import Inputs
from depcut.capture.part import as_part
from depcut.capture.plain import plain
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.capture.results import EVERY, Outputs
from depcut.coupling.explanation import explanation
from depcut.coupling.groups import Coupling, Frozen, Group
from depcut.coupling.infer import infer_coupling
from depcut.deploy.runtime import single
from depcut.frontiers.scan import Scanned
from depcut.latency.alignment import alignment
from depcut.latency.model import SAMPLES, LatencyModel, latency_model
from depcut.latency.target import Goal, plan_for_latency
from depcut.latency.workload import workload
from depcut.options import ONNXRUNTIME, CalibrateKeywords, Options, PlanKeywords
from depcut.pictures.analysed import ShownAnalysis
from depcut.pictures.plots import plot_scores
from depcut.plan import cost
from depcut.plan.cost import Cost
from depcut.plan.data import PlanData
from depcut.rebuild.choose import checked, within
from depcut.rebuild.depth import layers_and_width, timed
from depcut.rebuild.layers import Droppable, droppable
from depcut.rebuild.rebuilding import Rebuilding, rebuilding
from depcut.rebuild.wanted import limits, unlimited
from depcut.scores import Criterion, Score, score_name
from depcut.scores import score as unit_scores
from depcut.support.keywords import settled, takes_options
from depcut.support.processes import together_on_data
from depcut.timing.runtimes import check_runtime

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Analysis(ShownAnalysis, Scanned):
    """Groups of coupled dimensions of one model.

    Attributes:
        model: The model analysed; it is only read.
        coupling: The result of inference: groups and frozen dimensions.
        inputs: The example inputs as they were given; time is measured on the first call's.
    """

    model: nn.Module
    coupling: Coupling
    inputs: Inputs = None

    @property
    def program(self) -> Program:
        """The captured model, by its first example call."""
        return self.coupling.program

    @property
    def groups(self) -> tuple[Group, ...]:
        """Units that can only be removed together."""
        return self.coupling.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Dimensions that cannot shrink, each with its reason and source line."""
        return self.coupling.frozen

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """MACs (of the first example call), parameters and channels by the kept counts."""
        return {name: build(self.coupling) for name, build in cost.COSTS.items()}

    @property
    def macs(self) -> int:
        """MACs of one example of the dense model, in the first example call."""
        return round(self.costs["macs"].total)

    @property
    def params(self) -> int:
        """Parameters of the dense model, shared ones once."""
        return round(self.costs["params"].total)

    @cached_property
    def residuals(self) -> Residuals:
        """Residual branches, blocks of them, and what was refused as a branch, with the reason."""
        return residuals(self.coupling)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Residual branches that a plan can drop as a whole."""
        return self.residuals.branches

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Layers and groups: edges from a layer to the groups it produces and to their readers."""
        return self.coupling.graph()

    @takes_options(Options, PlanKeywords)
    @preserved()
    @together_on_data
    def plan(
        self,
        ratio: float | None = None,
        *,
        data: Data | Calibration | Auto | None = None,
        loss: Loss | None = None,
        options: Options | None = None,
        **given: Unpack[PlanKeywords],
    ) -> Plan:
        """Choose the units that stay.

        Of several example calls, the first is what MACs and time are budgeted of, and what data
        goes to; layers that only the others run shrink by the same share as the rest, on average.

        Args:
            ratio: Fraction removed of the quantity named by `of`, in (0, 1).
            data: Calibration data: an iterable of what the model takes, or of (input, target);
                "auto": see `calibrate`.
            loss: A function of (output, target), for criteria that need gradients.
            options: What else is chosen, as one object; the keywords that follow go before it.
            **given: The fields of `depcut.Options`.

        Raises:
            InputError: An option has a wrong value, or a name matches nothing.
            BudgetError: The ratio or time cannot be reached, or nothing can be removed.
            LatencyError: The time cannot be measured.
            ProcessError: Another of several processes failed, or has another model or other data.
        """
        chosen = settled(Options, options, given, PlanKeywords, "plan", one_stage=True)
        of = check_budget(ratio, chosen.of, chosen.latency_ms)
        align = alignment(chosen)
        if of == "latency":
            check_runtime(chosen.runtime, None)
        if not self.groups:
            refuse_frozen(self.frozen, type(self.model).__name__)
        calibration = self.calibrate(data, loss=loss, options=chosen)
        if calibration is not None:
            refuse_measured(calibration.everyone, of)
            calibration.everyone.require_same("options", {"ratio": ratio, **chosen.record()})
        score = criterion_or_default(chosen.score, has_data=calibration is not None)
        rebuild, why = limits(lambda: self.rebuilding, chosen.rebuildable)
        request = Request(
            score,
            allocation_or_default(chosen.allocation, of),
            align,
            chosen.ignore,
            chosen.ratios or {},
            chosen.seed,
            calibration,
            hold=rebuild.held if rebuild else (),
            together=rebuild.ties if rebuild else None,
        )
        with blaming_calls(self.model, self.program, calibration):
            chooser = Chooser(self.coupling, self.model, request)

            def choose(whole: frozenset[int]) -> PlanData:
                return self._within(ratio, of, chooser.holding(whole), chosen, rebuild)

            never = chosen.generated == "never" and rebuild is None
            whole = frozenset[int]()
            plan = with_own_code(choose, self.coupling, self.model) if never else choose(whole)
        settings = {**plan.settings, **unlimited(self.model, why), "options": chosen.record()}
        return Plan.of(replace(plan, settings=settings), self.coupling, self.model)

    @cached_property
    def rebuilding(self) -> tuple[Rebuilding | None, str]:
        """What a config can say of smaller widths; None, and why, where it cannot be built anew."""
        return rebuilding(self.coupling, self.model)

    @cached_property
    def droppable(self) -> Droppable:
        """Whole layers that a class built from a config can lose, and why others cannot go."""
        return droppable(self.rebuilding[0], self.model, self.residuals)

    def _within(
        self,
        ratio: float | None,
        of: str,
        chooser: Chooser,
        chosen: Options,
        rebuild: Rebuilding | None,
    ) -> PlanData:
        """The best units that meet the budget."""
        if of == "latency":
            goal = Goal.of(ratio, chosen.latency_ms)
            branches = timed(self.residuals, rebuild) if chosen.depth else None
            calls = workload(chosen, self.model, self._inputs, self.latency)
            plan = plan_for_latency(self.model, chooser, calls, goal, branches)
            return checked(rebuild, plan) if rebuild else plan
        removed = float(cast(float, ratio))
        if chosen.depth and rebuild is not None:
            return layers_and_width(rebuild, self.droppable, self.residuals, chooser, removed, of)
        if chosen.depth:
            return depth_and_width(chooser, self.residuals, of, removed)
        quantity = self.costs[of]
        if rebuild is not None:
            return within(rebuild, chooser, quantity, removed, of)
        counts = chooser.meet(quantity, quantity.total * (1 - removed), of)
        return chooser.plan(counts, {"ratio": removed, "of": of})

    @takes_options(Options, CalibrateKeywords)
    def calibrate(
        self,
        data: Data | Calibration | Auto | None,
        *,
        loss: Loss | None = None,
        options: Options | None = None,
        **given: Unpack[CalibrateKeywords],
    ) -> Calibration | None:
        """Read and check calibration data once, for `plan` and `Plan.apply`.

        Args:
            data: An iterable of what the model takes, or of (input, target) pairs; None and what
                this function returned before are handed back. "auto": inputs are made from what a
                trained model knows of them; None is returned where that cannot be, and
                `depcut.shrink` says why.
            loss: A function of (output, target) that returns a scalar.
            options: What else is chosen, as one object; the keywords that follow go before it.
            **given: The fields of `depcut.Options`.

        Raises:
            InputError: The data or the loss does not fit the model.
        """
        chosen = settled(Options, options, given, CalibrateKeywords, "calibrate", one_stage=True)
        return given_or_made(self.coupling, self.model, data, loss=loss, **chosen.reading)

    def latency(
        self,
        *,
        inputs: Any = None,
        runtime: str = ONNXRUNTIME,
        threads: int = 1,
        samples: int = SAMPLES,
        refresh: bool = False,
        progress: bool = True,
    ) -> LatencyModel:
        """Time as a function of the kept counts, in a runtime on this machine's CPU.

        Takes a minute or more the first time: a number of smaller models are made and profiled.
        What was measured is kept in the user's cache directory.

        Args:
            inputs: What is timed, see `depcut.latency.model`; None: the inputs of the analysis.
            runtime: What runs the models, see `depcut.bench`.
            threads: Threads that one operator may use.
            samples: Models to measure, the dense one among them.
            refresh: Measure again even if there are measurements.
            progress: Whether to show a progress bar on standard error.

        Raises:
            InputError: An argument is out of its range, or the runtime is absent.
            BudgetError: Nothing can be removed.
            LatencyError: The time cannot be measured.
            ExportError: The model cannot be exported or run.
        """
        if not self.groups:
            refuse_frozen(self.frozen, type(self.model).__name__)
        return latency_model(
            self.coupling,
            self.model,
            self._inputs if inputs is None else inputs,
            runtime=runtime,
            threads=threads,
            samples=samples,
            refresh=refresh,
            progress=progress,
        )

    @property
    def _inputs(self) -> Inputs:
        """The inputs to time: as given, else a single one of those that were inferred."""
        if self.inputs is None:
            return single(self.model, self.program.kwargs or tuple(self.program.args))
        return self.inputs[0] if isinstance(self.inputs, list) else self.inputs

    def plan_keeping(
        self, kept: Mapping[str, Sequence[int] | Indices], dropped: Iterable[str] = ()
    ) -> Plan:
        """A plan from kept units by group name; groups not named keep everything.

        Args:
            kept: Indices that stay.
            dropped: Names of residual branches, or of blocks of them, that go: see `branches`.

        Raises:
            PlanError: Unknown group or branch, impossible units, or unequal counts where they are
                tied.
        """
        return planned(self.coupling, self.model, kept, {"units": "given"}, dropped)

    def explain(self, name: str) -> str:
        """Why a layer can or cannot shrink, and with whom.

        Args:
            name: A module or parameter name.

        Raises:
            InputError: The model has no such layer.
        """
        return explanation(self.coupling, name)

    @preserved()
    @together_on_data
    def plot_scores(
        self,
        score: str | Score | Criterion | None = None,
        *,
        data: Data | Calibration | None = None,
        loss: Loss | None = None,
        plan: Plan | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Plot the scores of each group's units, best first; needs matplotlib.

        Args:
            score: The criterion; left out, the plan's, or what `plan` would take.
            data: Calibration data, for criteria that need it.
            loss: A function of (output, target), for criteria that need gradients.
            plan: One of this analysis: a dot shows where it cuts.
            ax: Axes of matplotlib; a new figure when left out.

        Raises:
            InputError: The data does not fit, or matplotlib is not installed.
        """
        chosen = plan.options if plan is not None else Options()
        wanted = score if score is not None else chosen.score
        criterion = criterion_or_default(wanted, has_data=data is not None)
        calibration = self.calibrate(data, loss=loss)
        values = unit_scores(criterion, self.coupling, self.model, chosen.seed, calibration)
        kept = {row["group"]: row["kept"] for row in plan.rows()} if plan is not None else {}
        named = {g.name: v for g, v in zip(self.groups, values, strict=True)}
        title = f"{type(self.model).__name__}: scores by {score_name(criterion)}"
        return plot_scores(named, kept, title, ax)


def analyze(
    model: nn.Module,
    inputs: Inputs = None,
    outputs: Outputs = None,
    *,
    part: str | None = None,
) -> Analysis:
    """Find out what can be removed from a model; it is only read.

    Args:
        model: Any module that torch.export can capture.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; or a list of several
            such example calls, for a model that runs other layers in each (`which="b"`, early
            exits, other lengths): an axis that one of them freezes stays, and nothing that any of
            them runs keeps its dense width for want of a call. Left out, inferred from the first
            layer where that is unambiguous, or made as the model's library has it.
        outputs: Which outputs count, by names (keys, attributes; nested ones with dots; globs) or
            positions: `("logits",)`. The dimensions of the others may become narrower. Left out,
            all but those that the model's library calls auxiliary; `"*"` are all.
        part: Name of a module to capture alone, with the inputs that it gets in one run of the
            model on `inputs`, for a model that cannot be captured as a whole. What it returns is
            never narrowed. Plans, `Plan.apply` and results are of the whole model; MACs are those
            of the part.

    Raises:
        CaptureError: The model cannot be captured.
        InputError: The inputs are of the wrong kind, or cannot be inferred; or there is no such
            output.
    """
    model = plain(model)
    if part is not None:
        model, inputs = as_part(model, part, inputs)
        outputs = EVERY if outputs is None else outputs
    return Analysis(model, infer_coupling(capture(model, inputs, outputs)), inputs)
