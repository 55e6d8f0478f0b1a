"""Gradual pruning: masks that grow along a cubic schedule while the user's own loop trains.

Source of the schedule: Zhu & Gupta, To Prune, or Not to Prune, 2017, eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import (
    Chooser,
    Request,
    allocation_or_default,
    check_ratio,
    criterion_or_default,
)
from depcut.analysis import Analysis, analyze
from depcut.apply.plan import Plan, planned
from depcut.axes import Indices
from depcut.calibration.data import Calibration, Data, Loss
from depcut.capture.inputs import Inputs
from depcut.capture.plain import refuse_spread
from depcut.errors import BudgetError, InputError, PlanError, listed
from depcut.latency.alignment import alignment
from depcut.masking.masks import Masks
from depcut.masking.places import find_places
from depcut.masking.probe import probed
from depcut.options import GradualKeywords, Options
from depcut.plan.cost import COSTS
from depcut.plan.data import make_plan
from depcut.plan.keep import Keep
from depcut.plan.units import others
from depcut.support.checks import check_integer, check_number
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.keywords import settled, takes_options
from depcut.support.unwrap import unwrapped

_MOST = 10**12  # steps
_STEP, _MASKABLE, _KEPT, _VALUE = "step", "maskable", "kept.", "value."


def cubic(step: int, start: int, end: int, initial: float, final: float) -> float:
    """The ratio removed at a step: s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3.

    Source: Zhu & Gupta, To Prune, or Not to Prune, 2017, eq. 1.

    Args:
        step: t, the number of optimizer steps taken.
        start: t0; the ratio is the initial one until then.
        end: t0 + n dt; it is the final one from then on.
        initial: s_i.
        final: s_f.
    """
    done = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - done) ** 3


@takes_options(Options, GradualKeywords)
class Gradual:
    """Masks on a model in training, one structured ratio at a time, until it can be made smaller.

        gradual = depcut.training.Gradual(model, 0.5, inputs, start=100, end=1000, every=50)
        for batch in loader:
            ...
            optimizer.step()
            gradual.step()
        slim = gradual.commit(optimizer=optimizer)

    At every mask step, all units are ranked anew by their present values, masked ones included; a
    masked unit keeps the values of its zeroed slices aside, unchanged, and has them back if its
    rank rises. In between, what is zeroed (the slices that *read* a unit) gets no gradient and
    stays zero whatever the optimizer does; the slices that *make* it get none either, because
    nothing reads them, and only weight decay and momentum still move them. After `end` the choice
    is final. The model keeps its class, its parameters and its `state_dict` keys.

    A group over whose units a statistic runs (LayerNorm, mean over channels) is not masked, since
    zeros do not express fewer indices; neither is one of which a trial shows that zeros in its
    weights compute something else. `excluded` lists them; the others carry the whole ratio.

    Args:
        model: The model, which the caller trains; masks are zeros in its own parameters.
        ratio: Fraction to remove in the end of the quantity named by `of`, in (0, 1).
        inputs: Example inputs, as for `depcut.analyze`.
        start: Number of steps after which the ratio begins to grow.
        end: Number of steps after which it is reached, at the last mask step up to there.
        every: Steps between mask steps.
        initial: Ratio to start from, in [0, ratio).
        data: Calibration data for criteria that need some.
        loss: A function of (output, target), for criteria that need gradients.
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.Options`.

    Raises:
        InputError: An option has a wrong value.
        BudgetError: The ratio cannot be reached with the groups that can be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        ratio: float,
        inputs: Inputs,
        start: int,
        end: int,
        every: int,
        *,
        initial: float = 0.0,
        data: Data | Calibration | None = None,
        loss: Loss | None = None,
        options: Options | None = None,
        **given: Unpack[GradualKeywords],
    ) -> None:
        chosen = settled(Options, options, given, GradualKeywords, "Gradual")
        start, end, every = _check(ratio, start, end, every, chosen.of, initial)
        self.model, self.of = unwrapped(model), chosen.of
        model = self.model
        refuse_spread(model)
        self.ratio, self.initial = float(ratio), float(initial)
        self.start, self.every = start, every
        self.end = start + (end - start) // every * every
        self.analysis: Analysis = analyze(model, inputs)
        self._coupling = self.analysis.coupling
        self._places = probed(self._coupling, model, find_places(self._coupling))
        score = criterion_or_default(chosen.score, has_data=data is not None)
        align = alignment(chosen)
        self._request = Request(
            score,
            allocation_or_default(chosen.allocation),
            align,
            chosen.ignore,
            seed=chosen.seed,
            calibration=self.analysis.calibrate(data, loss=loss, options=chosen),
        )
        self.steps = 0
        self._committed = False
        self._keep = Keep(self._coupling, {})
        self._masks = Masks(model, self._places.zeros, self.analysis.program.aliases)
        self._check_reachable(align)

    @property
    def excluded(self) -> dict[str, str]:
        """Groups that are not masked, with the reason."""
        names = self._coupling.groups
        return {names[n].name: why for n, why in sorted(self._places.excluded.items())}

    @property
    def masked(self) -> dict[str, Indices]:
        """Masked units by group name; [rows, units] where each row of an outer axis has its own."""
        groups = self._coupling.groups
        return {
            groups[n].name: others(kept, groups[n].size) for n, kept in self._keep.units.items()
        }

    @property
    def target(self) -> float:
        """The ratio that the schedule wants now."""
        last = self.start + max(self.steps - self.start, 0) // self.every * self.every
        return cubic(last, self.start, self.end, self.initial, self.ratio)

    @property
    def removed(self) -> float:
        """The fraction of the quantity that the masks remove now."""
        quantity = self.analysis.costs[self.of]
        return 1 - quantity(self._keep.counts) / quantity.total

    @property
    def done(self) -> bool:
        """Whether the final masks are set."""
        return self.steps >= self.end

    def step(self) -> None:
        """Count an optimizer step; masks grow if it is time, and stay zero. Call it after each.

        Raises:
            PlanError: The model was committed.
        """
        self._refuse_if_committed("step()")
        self.steps += 1
        due = self.start <= self.steps <= self.end and (self.steps - self.start) % self.every == 0
        if not due:
            self._masks.enforce()
            return
        with self._masks.revealed():
            kept = self._chosen(self.target, self._request.align if self.done else 1)
        self._keep = Keep(self._coupling, kept)
        self._masks.set(self._keep)

    def _chosen(self, ratio: float, align: int) -> dict[int, Indices]:
        """Kept units of the groups that are narrowed at a ratio."""
        if ratio <= 0:
            return {}
        held = frozenset(self._places.excluded)
        request = replace(self._request, align=align, hold=held)
        chooser = Chooser(self._coupling, self.model, request)
        quantity = self.analysis.costs[self.of]
        counts = chooser.meet(quantity, quantity.total * (1 - ratio), self.of)
        kept = chooser.plan(counts, {}).kept
        numbers = {g.name: g.index for g in self._coupling.groups}
        return {numbers[name]: units for name, units in kept.items()}

    def _check_reachable(self, align: int) -> None:
        if not self._places.zeros:
            raise BudgetError(
                "nothing can be masked: " + self._reasons(),
                where=type(self.model).__name__,
                remedy="prune in steps instead: depcut.training.iterate",
            )
        try:
            self._chosen(self.ratio, align)
        except BudgetError as error:
            raise BudgetError(
                error.what + (f"; not masked: {self._reasons()}" if self.excluded else ""),
                where=error.where,
                remedy=f"{error.remedy}; or prune in steps instead: depcut.training.iterate",
            ) from None

    def _reasons(self) -> str:
        return listed([f"{name} ({why})" for name, why in self.excluded.items()], 3)

    def _refuse_if_committed(self, what: str) -> None:
        if self._committed:
            raise PlanError(
                f"{what} after commit(): the masks are a smaller model now",
                where="Gradual",
                remedy="train what commit() returned; for more, make a new Gradual for it",
            )

    @property
    def plan(self) -> Plan:
        """The plan that removes what is masked now."""
        groups = self._coupling.groups
        kept = {groups[n].name: units for n, units in self._keep.units.items()}
        settings = {"ratio": self.target, "of": self.of, "step": self.steps}
        return planned(self._coupling, self.model, kept, settings)

    def commit(self, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """The smaller model that computes what the masked one does.

        The dense model is left with its zeros, and without hooks.

        Args:
            optimizer: One that trains the model; it is pointed at the smaller one, its state is
                sliced along.

        Returns:
            The smaller model, verified; see `Plan.apply`.

        Raises:
            PlanError: It was committed before, or nothing is masked yet.
            VerificationError: The smaller model does not compute what it should.
        """
        self._refuse_if_committed("commit()")
        if not self._keep.units:
            raise PlanError(
                f"nothing is masked after {self.steps} steps: masks grow from step {self.start} on",
                where="Gradual.commit",
                remedy="call step() after every optimizer.step(), or start earlier",
            )
        self._masks.enforce()
        slim = self.plan.apply(self.model, optimizer=optimizer)
        self._masks.release()
        self._committed = True
        return slim

    def cancel(self) -> None:
        """Put all values back and take all hooks off: the model is dense again."""
        self._refuse_if_committed("cancel()")
        self._masks.clear()
        self._keep = Keep(self._coupling, {})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Steps, masks and the values kept aside, as plain tensors by name."""
        groups = self._coupling.groups
        maskable = [g.index in self._places.zeros for g in groups]
        state = {_STEP: torch.tensor(self.steps), _MASKABLE: torch.tensor(maskable)}
        for number, kept in self._keep.units.items():
            state[_KEPT + groups[number].name] = torch.from_numpy(kept.copy())
        for name, values in self._masks.values.items():
            state[_VALUE + name] = values.clone()
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue where `state_dict` was taken; the model's own weights are loaded by the caller.

        Args:
            state: What `state_dict` returned.

        Raises:
            PlanError: It is of another model, or no such state.
        """
        self._refuse_if_committed("load_state_dict()")
        groups = {g.name: g for g in self._coupling.groups}
        try:
            steps = int(state[_STEP])
            kept = {k[len(_KEPT) :]: v for k, v in state.items() if k.startswith(_KEPT)}
            values = {k[len(_VALUE) :]: v for k, v in state.items() if k.startswith(_VALUE)}
            flags = state[_MASKABLE].tolist()
            if len(flags) != len(groups):
                raise ValueError(f"{len(flags)} groups, the model has {len(groups)}")
            plan = make_plan(
                self._coupling, self.model, {n: v.cpu().numpy() for n, v in kept.items()}, {}
            )
        except Exception as error:
            reraise_fatal(error)
            raise self._other(first_line(error)) from error
        shut = {i: "so it was when the state was saved" for i, flag in enumerate(flags) if not flag}
        places = find_places(self._coupling).without({**self._places.excluded, **shut})
        keep = Keep(self._coupling, {groups[n].index: k for n, k in plan.kept.items()})
        if not set(keep.units) <= set(places.zeros):
            raise self._other("it masks groups that cannot be masked here")
        masks = Masks(self.model, places.zeros, self.analysis.program.aliases)
        if masks.sizes(keep) != {name: v.numel() for name, v in values.items()}:
            raise self._other("the values kept aside do not fit the masks")
        # The weights are those of the state or will be: what was masked before is not put back.
        self._masks.release()
        masks.set(keep)
        masks.load_values(values)
        self._places, self._masks, self._keep, self.steps = places, masks, keep, steps

    def _other(self, why: str) -> PlanError:
        return PlanError(
            f"the state is of another run: {why}",
            where="Gradual.load_state_dict",
            remedy="load what state_dict() of a Gradual for this architecture returned",
        )


def _check(
    ratio: Any, start: Any, end: Any, every: Any, of: str, initial: Any
) -> tuple[int, int, int]:
    """The first and the last step of the masks and the steps between, if all options fit."""
    check_ratio(ratio, "ratio=")
    steps = "pass a number of optimizer steps, at least {}".format
    start = check_integer(start, "start", 0, _MOST, remedy=steps(0))
    end = check_integer(end, "end", 1, _MOST, remedy=steps(1))
    every = check_integer(every, "every", 1, _MOST, remedy=steps(1))
    if end <= start or every > end - start:
        raise InputError(
            f"there is no mask step from {start} to {end}, one every {every} steps",
            where="start=, end=, every=",
            remedy="let end be after start, and every at most end - start",
        )
    if of not in COSTS:
        raise InputError(
            f"masks have no {of!r} to measure", where="of=", remedy=f"use one of {', '.join(COSTS)}"
        )
    check_number(initial, "initial", "pass a ratio from 0 to below ratio", least=0, below=ratio)
    return start, end, every
