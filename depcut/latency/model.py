"""Time as a function of the kept counts of one model, on one machine."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from depcut.allocate.space import space
from depcut.apply.plan import Plan
from depcut.coupling.groups import Coupling
from depcut.deploy.runtime import bind_inputs
from depcut.errors import listed
from depcut.latency import cache
from depcut.latency.designs import between, designs
from depcut.latency.measure import called, measure
from depcut.latency.samples import Samples
from depcut.latency.staircase import fit
from depcut.options import ONNXRUNTIME
from depcut.plan.cost import Cost
from depcut.plan.fingerprint import fingerprint
from depcut.plan.preferences import preferences
from depcut.support.checks import THREADS, check_flag, check_integer
from depcut.support.failures import shown
from depcut.support.machine import processor
from depcut.support.torch_private import pytree
from depcut.timing.runtimes import RUNTIMES, check_runtime

SAMPLES = 16
_MOST_SAMPLES = 10_000
_UNSURE = 0.1  # a typical error of the fit that is worth a warning
_BETWEEN = 2  # further samples at widths between the steps
_GRID = 8  # widths are sampled at multiples of it, where they allow


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts the time of a smaller model from its widths.

    Attributes:
        coupling: The groups that counts are of.
        cost: Seconds as a function of the kept counts.
        dense_seconds: Measured time of the dense model.
        errors: Relative error of the prediction for each model that was measured, [samples].
        explained: Share of the dense model's time in kernels whose sizes follow from the counts.
        slowdown: Measured over predicted time of models whose widths all lie between the multiples
            of 8 that the prediction knows (padding, and fast paths that do not apply).
        threads: Threads that one operator could use.
        runtime: Library, version and provider.
        machine: The processor.
        engine: The runtime's name, see `depcut.bench`.
    """

    coupling: Coupling
    cost: Cost
    dense_seconds: float
    errors: NDArray[np.float64]
    explained: float
    slowdown: float
    threads: int
    runtime: str
    machine: str
    engine: str = ONNXRUNTIME

    def predict(self, plan: Plan) -> float:
        """Seconds that the model takes after the plan.

        Time is known at multiples of 8 (where a width allows). Other widths are taken for the next
        of them, times what models with such widths were measured to take longer; that is coarse,
        and said in a warning.

        Args:
            plan: A plan for the same model.

        Raises:
            PlanError: It was made for another architecture.
        """
        counts = plan.keep(self.coupling).counts
        seconds, grid = self.cost(counts), self.cost.grid
        if grid is None:
            return seconds
        off = np.flatnonzero((counts % grid > 0) & (counts < self.cost.dense))
        if not len(off):
            return seconds
        names = [self.coupling.groups[int(number)].name for number in off]
        warnings.warn(
            f"{len(off)} widths ({listed(names, 3)}) lie between those whose time is known; "
            f"models with such widths took {self.slowdown:.2f} times as long as with the next "
            "larger ones",
            stacklevel=2,
        )
        return seconds * (1 + (self.slowdown - 1) * len(off) / int((grid > 1).sum()))

    def __str__(self) -> str:
        worst = float(np.abs(self.errors).max())
        return (
            f"latency model: dense {1e3 * self.dense_seconds:.3g} ms "
            f"({self.runtime}, {self.threads} thread{'s' * (self.threads > 1)}, {self.machine}); "
            f"{len(self.errors)} models measured, largest error {worst:.1%}, "
            f"{self.explained:.0%} of the time in kernels that follow the widths; "
            f"widths between multiples of {_GRID} take {self.slowdown:.2f} times as long"
        )


def latency_model(
    coupling: Coupling,
    model: nn.Module,
    inputs: Any,
    *,
    runtime: str = ONNXRUNTIME,
    threads: int = 1,
    samples: int = SAMPLES,
    refresh: bool = False,
    progress: bool = True,
) -> LatencyModel:
    """Measure a model in a runtime on the CPU, or read what was measured before.

    Each sample is a real smaller model: rewritten, exported where the runtime takes files, and
    profiled by the runtime itself, so that every kernel is seen with the layout, the fusions and
    the neighbours that it has there.
    Measurements are kept in the user's cache directory, by architecture, inputs, version of the
    runtime, processor and threads.

    Args:
        coupling: The groups.
        model: The dense model; it is only read.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments, or a function of the
            model that returns the module to call and what that is passed; their batch size is the
            one that is timed.
        runtime: What runs the models, see `depcut.bench`.
        threads: Threads that one operator may use.
        samples: Number of models to measure, the dense one among them; at least 6. Two more have
            widths between the multiples of 8.
        refresh: Measure again even if there are measurements.
        progress: Whether to show a progress bar on standard error.

    Raises:
        InputError: An argument is out of its range, or the runtime is absent.
        LatencyError: The model cannot be measured.
        ExportError: The model cannot be exported or run.
    """
    _check_request(runtime, threads, samples, refresh=refresh, progress=progress)
    steps = space(coupling, _GRID, set(), preferences(coupling).ties)
    described = f"{RUNTIMES[runtime].version()}, CPU"
    key = {
        "architecture": fingerprint(coupling),
        "graph": hashlib.sha256(coupling.program.graph.code.encode()).hexdigest(),
        **_called(model, inputs),
        "runtime": described,
        "torch": torch.__version__,
        "machine": processor(),
        "threads": threads,
        "samples": samples,
        "between": _BETWEEN,
    }
    measured = None if refresh else cache.load(key)
    if measured is None:
        rows = designs(steps, samples)
        rows = np.concatenate([rows, between(steps, rows[-_BETWEEN:])])
        measured = measure(
            coupling, model, inputs, rows, threads=threads, progress=progress, runtime=runtime
        )
        cache.store(key, measured)
    grid = steps.steps[steps.class_of]
    known, others = _split(measured, grid)
    fitted = fit(coupling, known)
    cost = replace(fitted.cost, grid=grid)
    _warn_if_unsure(float(np.median(np.abs(fitted.errors))))
    return LatencyModel(
        coupling=coupling,
        cost=cost,
        dense_seconds=measured.dense_seconds,
        errors=fitted.errors,
        explained=fitted.explained,
        slowdown=_slowdown(cost, others),
        threads=threads,
        runtime=described,
        machine=processor(),
        engine=runtime,
    )


def _check_request(
    runtime: str, threads: int, samples: int, *, refresh: bool, progress: bool
) -> None:
    """Refuse arguments of `latency_model` that are out of their range."""
    check_runtime(runtime, None)
    for flag, given in (("refresh", refresh), ("progress", progress)):
        check_flag(given, flag)
    limits = (
        ("threads", threads, 1, THREADS, f"pass 1 to {THREADS}"),
        ("samples", samples, 6, _MOST_SAMPLES, "pass 6 or more: fewer explain nothing"),
    )
    for name, value, least, most, remedy in limits:
        check_integer(value, name, least, most, what=f"{name}={shown(value)}", remedy=remedy)


def _warn_if_unsure(typical: float) -> None:
    """Warn the caller of `latency_model` where the widths explain too little of the times."""
    if typical > _UNSURE:
        warnings.warn(
            f"the widths explain the measured times to {typical:.0%} only; if the machine was "
            "busy, measure again with analysis.latency(refresh=True)",
            stacklevel=4,
        )


def _split(measured: Samples, grid: NDArray[np.int64]) -> tuple[Samples, Samples]:
    """The samples at the steps, and those between them."""
    dense = np.array(measured.samples[0].counts)
    on = [not ((counts % grid > 0) & (counts < dense)).any() for counts in measured.counts]
    parts = (
        tuple(s for s, is_on in zip(measured.samples, on, strict=True) if is_on == wanted)
        for wanted in (True, False)
    )
    first, second = (Samples(measured.dense_seconds, part) for part in parts)
    return first, second


def _slowdown(cost: Cost, others: Samples) -> float:
    """Geometric mean of measured over predicted time, at least 1; 1 where nothing was measured."""
    if not others.samples:
        return 1.0
    return max(1.0, float(np.exp(np.log(others.seconds / cost.many(others.counts)).mean())))


def _called(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What is called, and with what, as far as it tells measurements apart."""
    module, given = called(model, inputs)
    leaves = pytree.tree_leaves(dict(bind_inputs(module, given).arguments))
    kind = type(module)
    own = {} if module is model else {"module": f"{kind.__module__}.{kind.__qualname__}"}
    return {"inputs": [_described(leaf) for leaf in leaves], **own}


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return [list(leaf.shape), str(leaf.dtype)]
    return repr(leaf)
