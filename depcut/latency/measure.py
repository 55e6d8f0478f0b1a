"""Run the dense model and smaller ones of it on this machine, with a progress bar."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from depcut.apply.plan import planned
from depcut.coupling.groups import Coupling
from depcut.deploy.convert import OLDER_OPSET, OPSET, draft
from depcut.deploy.runtime import bind_inputs
from depcut.errors import DepcutError, ExportError, LatencyError
from depcut.latency.samples import Sample, Samples
from depcut.options import ONNXRUNTIME
from depcut.timing.backends import Runner, Setup
from depcut.timing.clock import interleave
from depcut.timing.runtimes import RUNTIMES

# A function of a model: the module that is called for it, and the inputs that this is passed.
Call: TypeAlias = Callable[[nn.Module], tuple[nn.Module, Any]]

_ENOUGH = 0.7  # of the samples must succeed
_ROUNDS = 5


@dataclass(frozen=True)
class Beside:
    """A model timed in turns with the dense one.

    Attributes:
        ratio: Its time as a share of the dense model's; median over the rounds.
        dense_seconds: Median time of the dense model in those rounds.
    """

    ratio: float
    dense_seconds: float


class Bench:
    """The dense model in a runtime, ready to be run beside smaller ones.

    What holds while a runtime measures is entered by the caller, see `settled`.

    Args:
        model: The dense model.
        inputs: What it is run on, or a `Call`; their batch size is the one that is measured.
        threads: Threads that one operator may use.
        folder: For files; it outlives the bench.
        runtime: What runs the models.
        free_batch: Whether files take any batch size, as those of `depcut.export` do. Files for
            one are written faster.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        threads: int,
        folder: Path,
        *,
        runtime: str = ONNXRUNTIME,
        free_batch: bool = True,
    ) -> None:
        self.runtime = RUNTIMES[runtime]
        self.inputs, self.threads, self.folder = inputs, threads, folder
        self.free_batch, self.opset = free_batch, OPSET
        self.values = dict(bind_inputs(*called(model, inputs)).arguments)
        try:
            self.dense = self._runner(model, "dense")
        except ExportError:
            if self.runtime.in_place:
                raise
            self.opset = OLDER_OPSET
            self.dense = self._runner(model, "dense")
        self._run = self.dense.call(self.dense.batch)

    def written(self, model: nn.Module) -> Runner:
        """A smaller model, ready to run; its file takes the place of the one before."""
        return self._runner(model, "slim")

    def beside(self, runner: Runner, rounds: int = _ROUNDS) -> Beside:
        """Time a model in turns with the dense one."""
        samples = interleave(
            {"dense": self._run, "slim": runner.call(runner.batch)},
            rounds=rounds,
            warmup=1,
            stopwatch=runner.stopwatch,
        )
        pairs = zip(samples["dense"], samples["slim"], strict=True)
        return Beside(median(slim / dense for dense, slim in pairs), median(samples["dense"]))

    def _runner(self, model: nn.Module, name: str) -> Runner:
        """The model in the runtime, by way of a file that is not checked where it takes files."""
        model, inputs = called(model, self.inputs)
        setup = Setup(inputs, None, self.threads, self.folder)
        if self.runtime.in_place:
            return self.runtime.runner(name, model, setup)
        path = self.folder / f"{name}.onnx"
        for old in self.folder.glob(f"{name}.onnx*"):
            old.unlink()
        draft(model, inputs, path, opset=self.opset, free_batch=self.free_batch)
        # a generated model names its inputs anew: by name, and else in their order
        values = self.values
        if callable(self.inputs):
            values = dict(bind_inputs(model, inputs).arguments)
        return self.runtime.runner(name, path, replace(setup, inputs=values))


def called(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """What is called for a model, and what it is passed.

    Args:
        model: The model.
        inputs: What the model is passed, or a `Call`.
    """
    return inputs(model) if callable(inputs) else (model, inputs)


@contextlib.contextmanager
def settled(runtime: str, threads: int) -> Iterator[None]:
    """The settings that hold while a runtime measures.

    Args:
        runtime: What runs the models.
        threads: Threads that one operator may use.
    """
    with contextlib.ExitStack() as stack:
        RUNTIMES[runtime].enter(stack, threads)
        yield


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder for the files of models that are measured."""
    with tempfile.TemporaryDirectory(prefix="depcut-") as name:
        yield Path(name)


def measure(
    coupling: Coupling,
    model: nn.Module,
    inputs: Any,
    counts: NDArray[np.int64],
    *,
    threads: int,
    progress: bool,
    runtime: str = ONNXRUNTIME,
) -> Samples:
    """Measure the model at several widths.

    Args:
        coupling: The groups.
        model: The dense model.
        inputs: What it is run on, or a `Call`.
        counts: Kept counts, [samples, groups]; the dense ones first.
        threads: Threads that one operator may use.
        progress: Whether to show a progress bar on standard error.
        runtime: What runs the models.

    Raises:
        LatencyError: Too many of the smaller models could not be measured.
        ExportError: The dense model cannot be exported or run.
    """
    from rich.console import Console
    from rich.progress import Progress

    samples: list[Sample] = []
    failures: list[DepcutError] = []
    dense_seconds: list[float] = []
    bar = Progress(console=Console(stderr=True), transient=True, disable=not progress)
    with settled(runtime, threads), temporary() as folder, bar:
        task = bar.add_task("measuring kernels at several widths", total=len(counts))
        bench = Bench(model, inputs, threads, folder, runtime=runtime, free_batch=False)
        for row in counts:
            sample = _attempt(bench, coupling, model, row)
            if not isinstance(sample, DepcutError):
                samples.append(sample[0])
                dense_seconds.append(sample[1])
            elif not samples:
                raise sample
            else:
                failures.append(sample)
            bar.advance(task)
    if failures:
        what = f"{len(failures)} of {len(counts)} smaller models could not be measured"
        if len(samples) < _ENOUGH * len(counts):
            raise LatencyError(
                f"{what}; the first: {failures[0]}",
                where=type(model).__name__,
                remedy="use of='macs', or hold the layers concerned with ignore=",
            ) from failures[0]
        warnings.warn(f"{what} and are left out; the first: {failures[0]}", stacklevel=4)
    return Samples(median(dense_seconds), tuple(samples))


def _attempt(
    bench: Bench, coupling: Coupling, model: nn.Module, row: NDArray[np.int64]
) -> tuple[Sample, float] | DepcutError:
    """One sample and the dense model's time beside it, or what went wrong."""
    kept = {
        group.name: np.arange(count)
        for group, count in zip(coupling.groups, row, strict=True)
        if count < group.size
    }
    try:
        runner = bench.dense
        if kept:
            runner = bench.written(planned(coupling, model, kept, {}).apply(model))
        kernels = runner.kernels(runner.batch)
        beside = bench.beside(runner)
    except DepcutError as error:
        return error
    return Sample(tuple(map(int, row)), kernels, beside.ratio), beside.dense_seconds
