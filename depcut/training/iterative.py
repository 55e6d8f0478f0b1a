"""Iterative pruning: remove a little, retrain, rank anew, until the ratio is reached.

Sources: Han et al., Learning both Weights and Connections, NeurIPS 2015; Renda et al., Comparing
Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020 (one shot and iterative).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import check_ratio, criterion_or_default
from depcut.analysis import Analysis, analyze
from depcut.apply.plan import Plan
from depcut.apply.report import Report, report
from depcut.calibration.data import Calibration, Data, Loss, loss_function, read_with_inputs
from depcut.capture.inputs import Inputs
from depcut.capture.plain import refuse_spread
from depcut.errors import InputError, PlanError
from depcut.options import IterateKeywords, Options
from depcut.plan.cost import COSTS
from depcut.plan.fingerprint import fingerprint
from depcut.repair.after_rewrite import wants_repair
from depcut.rewrite.optimizer import check_optimizer
from depcut.scores import score_name
from depcut.support.checks import check_integer, check_items
from depcut.support.files import claimed
from depcut.support.keywords import settled, takes_options
from depcut.support.unwrap import unwrapped
from depcut.training.checkpoint import digest
from depcut.training.compose import TensorIndices, composed
from depcut.training.folders import RunFolder
from depcut.training.identity import callable_text, data_text, structure_text
from depcut.training.optimizers import made_by

Retrain = Callable[..., nn.Module | None]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

_MOST = 10_000  # turns
_KEEPS = 1e-9  # a smaller share than this is nothing to remove


@dataclass(frozen=True, eq=False)
class Iterated:
    """What iterative pruning came to.

    Attributes:
        model: The smaller model as it was retrained last.
        plan: All steps in one, for the dense model: the same architecture, with dense weights.
        steps: The plan of each step, for the model that the step before it left.
        reports: What was done in each step that this run took; those of a resumed one are fewer.
        removed: Fraction of the dense model's quantity that was gone after each step.
        optimizer: The optimizer of the model, if the caller gave a function that makes one.
    """

    model: nn.Module
    plan: Plan
    steps: tuple[Plan, ...]
    reports: tuple[Report, ...]
    removed: tuple[float, ...]
    optimizer: torch.optim.Optimizer | None = None


@dataclass
class _Run:
    """State of a run: the current model and optimizer, and what the steps so far gave."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    plans: list[Plan] = field(default_factory=list)
    indices: list[TensorIndices] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    removed: list[float] = field(default_factory=list)


def geometric(ratio: float, steps: int) -> tuple[float, ...]:
    """Ratios of the dense quantity after each step, if all remove the same share of the rest.

    1 - (1 - s)^(k / n) for k = 1..n. Source: Frankle & Carbin, The Lottery Ticket Hypothesis,
    ICLR 2019, section 1 (each round prunes p^(1/n) of what survives).

    Args:
        ratio: s, the fraction removed in the end.
        steps: n.
    """
    # The last is what was asked for, to the bit.
    return (*(1 - (1 - ratio) ** (k / steps) for k in range(1, steps)), ratio)


def _sources(
    model: nn.Module, items: Sequence[Any] | None, **functions: Callable[..., Any] | None
) -> dict[str, Any]:
    """What a resumed run must be given again, as texts to compare."""
    return {
        "structure": structure_text(model),
        "weights": digest(model),
        "data": None if items is None else f"{len(items)} items {data_text(items[:1])}",
        **{name: callable_text(function) for name, function in functions.items()},
    }


@takes_options(Options, IterateKeywords)
def iterate(
    model: nn.Module,
    ratio: float | None = None,
    inputs: Inputs = None,
    *,
    steps: int | Sequence[float] = 1,
    retrain: Retrain | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    **given: Unpack[IterateKeywords],
) -> Iterated:
    """Prune and retrain in turns; units are ranked anew by the weights of each turn.

    Step k brings the quantity to (1 - ratio)^(k / steps) of the *dense* model's, so that each
    removes the same share of what is left, and what widths round off does not add up.

    Args:
        model: The dense model; it is not changed.
        ratio: Fraction removed in the end of the quantity named by `of`, in (0, 1).
        inputs: Example inputs, as for `depcut.shrink`.
        steps: Number of turns, 1 is one-shot pruning; or, in place of a ratio, the fraction of the
            dense quantity that is gone after each turn, increasing. It may begin with 0, a turn
            that only trains.
        retrain: Called as retrain(model, step), or retrain(model, step, optimizer) if there is
            one, after each removal, step counting from 0. It trains in place and returns None, or
            returns another model of the same architecture. What it raises is not caught.
        data: Calibration data, read once.
        loss: A function of (output, target), for criteria that need gradients.
        optimizer: A function from a model to its optimizer.
        checkpoint: Folder to which every finished step is written: plan (JSON), weights and
            optimizer state (safetensors), torch's random state. Data loaders and other sources of
            chance are the caller's to seed, by step. A run is resumed with the same dense model,
            functions and data: others are refused.
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.Options`.

    Raises:
        InputError: An option has a wrong value, or the checkpoints are of another run.
        BudgetError: A ratio cannot be reached.
        PlanError: The retrain function changed the architecture.
    """
    chosen = settled(Options, options, given, IterateKeywords, "iterate")
    model = unwrapped(model)
    refuse_spread(model)
    targets = _targets(ratio, steps)
    _check(retrain, chosen.of, optimizer)
    wants_repair(chosen.compensate, data is not None)
    items, inputs = read_with_inputs(data, chosen.batches, inputs, model, loss is not None)
    dense = analyze(model, inputs)
    score = criterion_or_default(chosen.score, has_data=data is not None)
    request = {
        "allocation": chosen.allocation,
        "align": chosen.align,
        "ignore": list(chosen.ignore),
        "seed": chosen.seed,
        "targets": list(targets),
        "of": chosen.of,
        "score": score_name(score),
        "compensate": chosen.compensate,
        "optimizer_state": chosen.optimizer_state if optimizer is not None else None,
        "architecture": fingerprint(dense.coupling),
    }
    if checkpoint is not None:
        chosen_loss = loss_function(loss)
        request |= _sources(model, items, retrain=retrain, optimizer=optimizer, loss=chosen_loss)
    disk = None if checkpoint is None else RunFolder(checkpoint, request, chosen.resume)
    turns = _Turns(dense, targets, retrain, optimizer, loss, items, disk, chosen)
    with nullcontext() if disk is None else claimed(disk.folder, "checkpoint=", InputError):
        run = turns.run()
    settings = {"ratio": targets[-1], "of": chosen.of, "steps": len(targets)}
    settings["options"] = chosen.record()
    plan = composed(dense, run.indices, settings)
    return Iterated(
        run.model, plan, tuple(run.plans), tuple(run.reports), tuple(run.removed), run.optimizer
    )


@dataclass(frozen=True)
class _Turns:
    """All that the steps of a run share.

    Attributes:
        dense: The dense model's analysis.
        targets: Ratio of the dense quantity that is gone after each step.
        retrain: The user's function.
        make: Makes an optimizer, if there is to be one.
        loss: For criteria that need gradients.
        items: Calibration data, read already.
        disk: Where finished steps are kept, if anywhere.
        options: Of the planning and applying of every step.
    """

    dense: Analysis
    targets: tuple[float, ...]
    retrain: Retrain | None
    make: MakeOptimizer | None
    loss: Loss | None
    items: Any
    disk: RunFolder | None
    options: Options

    def run(self) -> _Run:
        from rich.console import Console
        from rich.progress import Progress

        run = _Run(self.dense.model)
        done = self._resumed(run)
        console = Console(stderr=True)
        shown = self.options.progress and (console.is_interactive or console.is_jupyter)
        with Progress(console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("prune and retrain", total=len(self.targets), completed=done)
            for step in range(done, len(self.targets)):
                self._step(run, step)
                bar.advance(task)
        return run

    def _resumed(self, run: _Run) -> int:
        """Rebuild the last finished step: its plans in turn, then its weights."""
        done = 0 if self.disk is None else min(self.disk.finished(), len(self.targets))
        if self.disk is None or not done:
            return 0
        for step in range(done):
            plan = self.disk.plan(step).bind(run.model, self._inputs)
            self._narrow(run, plan, compensate=False)
        record = self.disk.read(done - 1, run.model, run.optimizer)
        run.removed = [float(r) for r in record["removed"]]
        return done

    def _analysis(self, model: nn.Module) -> Analysis:
        return self.dense if model is self.dense.model else analyze(model, self._inputs)

    @property
    def _inputs(self) -> Inputs:
        """The inputs as given, else as inferred."""
        program = self.dense.program
        if self.dense.inputs is not None:
            return self.dense.inputs
        return program.kwargs or tuple(program.args)

    def _step(self, run: _Run, step: int) -> None:
        analysis = self._analysis(run.model)
        of = self.options.of
        total = self.dense.costs[of].total
        target = total * (1 - self.targets[step])
        ratio = 1 - target / analysis.costs[of].total
        if ratio <= _KEEPS:
            plan = analysis.plan_keeping({})
            self._narrow(run, plan, compensate=False)
        else:
            data = analysis.calibrate(self.items, loss=self.loss, options=self.options)
            plan = analysis.plan(ratio, data=data, options=self.options)
            self._narrow(run, plan, compensate=self.options.compensate, data=data)
        left = analysis.costs[of](plan.keep().counts)
        run.removed.append(1 - left / total)
        self._retrain(run, step)
        if self.disk is not None:
            self.disk.write(step, plan, run.model, run.optimizer, {"removed": run.removed})

    def _narrow(
        self, run: _Run, plan: Plan, *, compensate: bool | str, data: Calibration | None = None
    ) -> None:
        """Apply a plan to the model of a run, with its optimizer."""
        sliced = run.optimizer if self.options.optimizer_state == "slice" else None
        slim = plan.apply(
            run.model, optimizer=sliced, data=data, options=self.options, compensate=compensate
        )
        run.plans.append(replace(plan, coupling=None, model=None))  # not to hold on to the model
        run.indices.append(plan.tensor_indices())
        run.reports.append(report(slim))
        run.model = slim
        if self.make is not None and sliced is None:
            run.optimizer = made_by(self.make, slim)
            check_optimizer(run.optimizer, slim)

    def _retrain(self, run: _Run, step: int) -> None:
        if self.retrain is None:
            return
        before = _shapes(run.model)
        extra = () if run.optimizer is None else (run.optimizer,)
        result = self.retrain(run.model, step, *extra)
        if result is not None and not isinstance(result, nn.Module):
            raise InputError(
                f"the retrain function returned a {type(result).__name__}",
                where=f"retrain=, step {step}",
                remedy="train the model in place and return None, or return a module",
            )
        trained = run.model if result is None else result
        after = _shapes(trained)
        if after != before:
            raise PlanError(
                f"the retrain function changed the architecture: {_changed(before, after)}",
                where=f"retrain=, step {step}",
                remedy="return a model with the same tensors as the one that it was given",
            )
        run.model = trained


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            was, now = (str(s.get(name, "absent")) for s in (before, after))
            return f"{name} was {was}, is {now}"
    return "its tensors have another order"


def _targets(ratio: float | None, steps: Any) -> tuple[float, ...]:
    """The ratio of the dense quantity that is gone after each step."""
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        check_ratio(ratio, "ratio=")
        remedy = f"pass an integer of at least 1 and at most {_MOST}"
        return geometric(float(ratio or 0), check_integer(steps, "steps", 1, _MOST, remedy=remedy))
    if ratio is not None:
        raise InputError(
            "a list of steps stands for the ratio too",
            where="steps=",
            remedy="leave ratio out, or pass the number of steps",
        )
    values = check_items(steps, "steps", "pass a number of steps, or the ratio after each of them")
    for i, value in enumerate(values):
        if i or value != 0:
            check_ratio(value, f"steps=, item {i}")
    increasing = all(a < b for a, b in pairwise(values))
    if not increasing or not any(values):
        raise InputError(
            f"the steps {list(values)} do not increase",
            where="steps=",
            remedy="list the fraction of the dense model that is gone after each step, rising",
        )
    return tuple(map(float, values))


def _check(retrain: object, of: str, optimizer: object) -> None:
    if retrain is not None and not callable(retrain):
        raise InputError(
            f"retrain is a {type(retrain).__name__}, not a function",
            where="retrain=",
            remedy="pass a function of (model, step)",
        )
    if of not in COSTS:
        raise InputError(
            f"steps have no {of!r} to measure", where="of=", remedy=f"use one of {', '.join(COSTS)}"
        )
    if optimizer is not None and (
        not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)
    ):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}, not a function that makes one",
            where="optimizer=",
            remedy="pass e.g. lambda model: torch.optim.SGD(model.parameters(), 0.1)",
        )
