"""A plan bound to a model: from kept units to the smaller model, verified and repaired."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.apply.carried import carry
from depcut.apply.report import Report, record
from depcut.apply.sharding import require_even, shard_alike
from depcut.apply.whole import whole_result
from depcut.axes import Indices
from depcut.branches.branch import Residuals
from depcut.calibration.calls import blaming_calls
from depcut.calibration.data import Calibration, Data
from depcut.calibration.self_made import Auto, given_data, given_or_made
from depcut.capture.capture import capture
from depcut.capture.inputs import Inputs
from depcut.capture.part import Part, as_part, inside, shown_part, whole_of
from depcut.capture.plain import origin_of, plain, refuse_spread, spread_note
from depcut.coupling.groups import Coupling, layer_of
from depcut.coupling.infer import infer_coupling
from depcut.errors import PlanError
from depcut.masking.context import masked
from depcut.options import ApplyKeywords, Options
from depcut.pictures.plans import plan_records, plan_rows, plan_summary
from depcut.pictures.plots import plot_widths
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary
from depcut.plan import cost
from depcut.plan.budget import missed
from depcut.plan.data import PlanData, make_plan
from depcut.plan.fingerprint import example_of, outputs_of
from depcut.plan.keep import Keep
from depcut.plan.layers import layer_sizes
from depcut.plan.stacks import name_then, stacks_of
from depcut.plan.unchanged import check_unchanged
from depcut.plan.uncounted import narrower
from depcut.rebuild.numbering import number_anew
from depcut.rebuild.rebuilding import recorded
from depcut.rebuild.stock import prove
from depcut.repair.after_rewrite import repair, wants_repair
from depcut.repair.compensate import Compensation
from depcut.rewrite.build import Slim, rewrite
from depcut.rewrite.finish import finish
from depcut.rewrite.optimizer import check_optimizer, narrow_optimizer
from depcut.support.keywords import settled, takes_options
from depcut.support.processes import together_on_data
from depcut.support.sharded import sharding_of
from depcut.support.unwrap import unwrapping_note
from depcut.verify.calls import verify_calls
from depcut.verify.ownership import check_own_tensors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Plan(PlanData, Shown):
    """Kept units of every narrowed group, for one architecture.

    Attributes:
        kept: Ascending kept indices by group name, [kept] or [rows, kept] where the group chooses
            row by row; groups not in it keep everything.
        sizes: Dense size of every group of the architecture.
        shapes: Dense shape of every parameter and buffer.
        fingerprint: Of the architecture's tensors and groups.
        settings: How it was made: ratio and options.
        inputs: Shapes and dtypes of the example calls it was made with, see `PlanData`.
        dropped: Names of the residual branches that go, sorted.
        coupling: The analysed architecture; None after loading.
        model: The model it was made for; None after loading.
    """

    coupling: Coupling | None = None
    model: nn.Module | None = None

    @staticmethod
    def of(data: PlanData, coupling: Coupling, model: nn.Module) -> Plan:
        """A plan with the architecture and the model that it was made for.

        Args:
            data: The kept units.
            coupling: The analysed architecture.
            model: The model.
        """
        given = {f.name: getattr(data, f.name) for f in fields(PlanData)}
        return Plan(**given, coupling=coupling, model=model)

    @takes_options(Options, ApplyKeywords)
    @together_on_data
    def apply(
        self,
        model: nn.Module,
        inputs: Inputs = None,
        *,
        data: Data | Calibration | Auto | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        options: Options | None = None,
        **given: Unpack[ApplyKeywords],
    ) -> nn.Module:
        """The smaller model: same class, new tensors, verified; `model` is not changed.

        With data, the weights that read what was removed are re-solved afterwards, and
        `depcut.report` of the result says what that did. `depcut.export` writes the plan's digest
        and request into the ONNX files of the result.

        Args:
            model: The model the plan was made for, or another instance of its architecture.
            inputs: Example inputs, of all example calls; left out, those of the plan (or of the
                same shapes).
            data: Calibration data: an iterable of what the model takes, or of (input, target);
                "auto": see `Analysis.calibrate`.
            optimizer: One that trains `model`; it is pointed at the smaller model.
            options: What else is chosen, as one object; the keywords that follow go before it.
            **given: The fields of `depcut.Options`.

        Raises:
            InputError: The data does not fit the model.
            PlanError: The model has another architecture, or has changed since it was analysed.
            VerificationError: The smaller model does not compute what it should.
            ProcessError: Another of several processes failed, or has another model or other data.
        """
        chosen = settled(Options, options, given, ApplyKeywords, "apply", one_stage=True)
        given_model, model = model, plain(model)
        origin = origin_of(model)
        sharding = sharding_of(origin)
        given_data(data)
        repairs = wants_repair(chosen.compensate, data is not None)
        if optimizer is not None:
            check_optimizer(optimizer, origin)
        model, inputs = self._seen(model, inputs)
        coupling = self._of(model, inputs)
        keep = self.keep(coupling)
        calibration = None
        if repairs and data is not None:
            calibration = given_or_made(coupling, model, data, **chosen.reading)
        if calibration is not None:
            made = {"plan": self.digest, **chosen.record()}
            calibration.everyone.require_same("options", made)
        with blaming_calls(model, coupling.program, calibration):
            stock = recorded(self.settings, model, keep)
            slim = stock or rewrite(model, keep)
            if sharding:
                require_even(slim.model, sharding)
            error = verify_calls(slim, model)
            check_own_tensors(slim.model, model, keep)
            compensation, moved = None, tuple[str, ...]()
            if chosen.compensate:
                compensation, moved = repair(slim.model, model, keep, calibration)
            if stock:
                prove(stock.model, keep)
        number_anew(slim.model)
        slim.model, notes = whole_result(slim.model, model)
        if calibration is not None and calibration.made:
            notes += (calibration.made,)
        notes += (*moved, *spread_note(whole_of(model)))
        notes += (*finish(slim.model, whole_of(model), keep), *unwrapping_note(given_model))
        record(slim.model, self.report_on(slim, model, error, compensation, notes))
        carry(slim.model, self)
        stacks = stacks_of(self.settings)
        if sharding:
            shard_alike(slim.model, sharding, stacks, slim.generated)
        if optimizer is not None:
            narrow_optimizer(optimizer, origin, slim.model, keep, stacks)
        return slim.model

    @contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """Judge the plan without a smaller model: zeros in `model`, while the context lasts.

            with plan.masked(model):
                print(accuracy(model))

        The model computes what `plan.apply(model, compensate=False)` would, as slowly as before.
        Its parameters stay the same objects, what is zero gets no gradient, and in the end all
        values are put back, bit for bit. A group over whose units a statistic runs (LayerNorm,
        mean over channels) has no such zeros, since they do not express fewer indices.

        Args:
            model: The model the plan was made for, or another instance of its architecture.

        Raises:
            InputError: The tensors of the model are spread over processes, devices or files.
            PlanError: The model has another architecture, or has changed since it was analysed; or
                no zeros compute what the smaller model does, with the groups and the reasons.
        """
        refuse_spread(model)
        seen, _ = self._seen(plain(model), None)
        coupling = self._of(seen)
        with masked(self.keep(coupling), seen):
            yield model

    def _seen(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """The model as it is captured, and its inputs: where the plan is of a part, of that."""
        if not self.part:
            return model, inputs
        if inputs is not None:
            return as_part(model, self.part, inputs)
        known = self.model
        if isinstance(known, Part) and known.is_of(model):
            return known, None
        return shown_part(model, self.part), None

    def report_on(
        self,
        slim: Slim,
        dense: nn.Module,
        error: float,
        compensation: Compensation | None,
        notes: tuple[str, ...],
    ) -> Report:
        """The report on a smaller model.

        Args:
            slim: The smaller model.
            dense: The model that it was made of.
            error: The largest difference that verification saw.
            compensation: What was re-solved on data, if anything.
            notes: What else is to be said.
        """
        keep = slim.keep
        macs, params = (
            (round(of(keep.coupling).total), round(of(keep.coupling, keep.gone)(keep.counts)))
            for of in (cost.macs, cost.params)
        )
        left = inside(slim.dense, keep.coupling.program.unused)
        stacks = stacks_of(self.settings)
        left &= {name_then(name, stacks) for name in slim.model.state_dict(keep_vars=True)}
        return Report(
            self.digest,
            dict(self.settings),
            dict(slim.generated),
            error,
            macs,
            params,
            compensation,
            {**slim.guarded, **slim.patched},
            tuple(sorted({layer_of(name) for name in left})),
            (*keep.coupling.program.notes, *narrower(keep), *notes),
            layer_sizes(keep, dense),
        )

    @property
    def options(self) -> Options:
        """The options that it was made with; a criterion that was a function is left out."""
        return Options.of_record(self.settings.get("options", {}))

    def keep(self, coupling: Coupling | None = None, residuals: Residuals | None = None) -> Keep:
        """The kept units as an evaluation over an analysed architecture.

        Args:
            coupling: The architecture; left out, that of the plan.
            residuals: Its branches, where they are known.

        Raises:
            PlanError: The architecture is another one, or has other rows.
        """
        return super().keep(coupling or self._bound(), residuals)

    def _bound(self) -> Coupling:
        if self.coupling is None:
            raise PlanError(
                "the plan was loaded from a file and knows no model yet",
                remedy="use plan.bind(model) first",
            )
        return self.coupling

    def bind(self, model: nn.Module, inputs: Inputs = None) -> Plan:
        """The plan with the analysis of a model of its architecture attached.

        Args:
            model: The model; it is only read.
            inputs: Example inputs, of all example calls; left out, those of the plan (or of the
                same shapes).

        Raises:
            PlanError: The model has another architecture.
        """
        model, inputs = self._seen(plain(model), inputs)
        self.check(model)
        coupling = self._analysed(model, inputs)
        self.keep(coupling)
        return replace(self, coupling=coupling, model=model)

    def _of(self, model: nn.Module, inputs: Inputs = None) -> Coupling:
        """The analysis of a model that the plan is to be used on."""
        if self.coupling is None or model is not self.model or inputs is not None:
            self.check(model)
            return self._analysed(model, inputs)
        check_unchanged(self.coupling.program, model)
        return self.coupling

    def _analysed(self, model: nn.Module, inputs: Inputs) -> Coupling:
        """A model analysed as the plan's was: the same outputs count."""
        example = inputs if inputs is not None else example_of(self.inputs, model)
        return infer_coupling(capture(model, example, outputs_of(self.inputs)))

    def tensor_indices(self) -> dict[str, tuple[Indices | None, ...]]:
        """Kept indices of every dimension of every parameter and buffer, by name.

        Returns:
            For each dimension None (all stay), a list, or, where what stays of a dimension differs
            along another one, an array with as many dimensions as the tensor, of size 1 along
            those that do not matter: index arrays that broadcast, as those of `numpy.ix_`.
        """
        keep = self.keep()
        return {
            name: keep.tensors.get(name, (None,) * len(dims))
            for name, dims in keep.coupling.dims.items()
            if name not in keep.coupling.program.anonymous and name not in keep.gone.tensors
        }

    @property
    def macs(self) -> float:
        """Predicted MACs of one example after the plan."""
        keep = self.keep()
        return cost.macs(keep.coupling, keep.gone)(keep.counts)

    @property
    def params(self) -> float:
        """Predicted number of parameters after the plan."""
        keep = self.keep()
        return cost.params(keep.coupling, keep.gone)(keep.counts)

    @property
    def missed(self) -> float | None:
        """By which share of the budget more is left than that, less if negative.

        Within 0.005 of it unless no combination of widths that may be kept was found to come so
        near: alignment, ties and coarse units stand in the way. None where no ratio of a count was
        asked for.
        """
        of = self.settings.get("of")
        if of not in cost.COSTS or "ratio" not in self.settings:
            return None
        keep = self.keep()
        now, dense = cost.COSTS[of](keep.coupling, keep.gone), cost.COSTS[of](keep.coupling)
        return missed(self.settings, dense.total, now(keep.counts))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group of the architecture."""
        return plan_rows(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the units of each group, dense and kept; needs matplotlib.

        Args:
            ax: Axes of matplotlib; a new figure when left out.

        Raises:
            InputError: matplotlib is not installed, or `ax` is none of its axes.
        """
        return plot_widths(self.rows(), f"plan {self.digest}", ax)

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        return plan_records(self, self.coupling, self.model)

    def summary(self) -> Summary:
        """What notebooks show."""
        return plan_summary(self, self.records())


def planned(
    coupling: Coupling,
    model: nn.Module,
    kept: Mapping[str, Sequence[int] | Indices],
    settings: Mapping[str, Any],
    dropped: Iterable[str] = (),
) -> Plan:
    """A plan from kept units by group name, for the model that was analysed.

    Args:
        coupling: The analysed architecture.
        model: The model it was analysed from.
        kept: Kept indices, see `make_plan`.
        settings: How it was made.
        dropped: Names of residual branches, or of blocks of them, that go.

    Raises:
        PlanError: See `make_plan`.
    """
    return Plan.of(make_plan(coupling, model, kept, settings, dropped), coupling, model)
