"""Run the dense model and smaller ones of it on this machine, with a progress bar."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from depcut.apply.plan import planned
from depcut.coupling.groups import Coupling
from depcut.deploy.convert import OLDER_OPSET, OPSET, draft
from depcut.deploy.runtime import bind_inputs, open_session, session_feeds
from depcut.errors import DepcutError, ExportError, LatencyError
from depcut.latency.kernels import profile
from depcut.latency.samples import Sample, Samples
from depcut.timing.clock import interleave

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

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
    """The dense model, ready to be run beside smaller ones.

    Args:
        model: The dense model.
        inputs: What it is run on; their batch size is the one that is measured.
        threads: Threads that one operator may use.
        folder: For files; it outlives the bench.
        free_batch: Whether files take any batch size, as those of `depcut.export` do. Files for
            one are written faster.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, threads: int, folder: Path, *, free_batch: bool = True
    ) -> None:
        self.inputs, self.threads, self.folder = inputs, threads, folder
        self.free_batch = free_batch
        self.values = bind_inputs(model, inputs).arguments
        self.path, self.opset = folder / "dense.onnx", OPSET
        draft(model, inputs, self.path, free_batch=free_batch)
        try:
            self.session = open_session(self.path, threads)
        except ExportError:
            self.opset = OLDER_OPSET
            draft(model, inputs, self.path, opset=self.opset, free_batch=free_batch)
            self.session = open_session(self.path, threads)

    def written(self, model: nn.Module) -> Path:
        """The ONNX file of a smaller model; it takes the place of the one before."""
        path = self.folder / "slim.onnx"
        for old in self.folder.glob("slim.onnx*"):
            old.unlink()
        draft(model, self.inputs, path, opset=self.opset, free_batch=self.free_batch)
        return path

    def beside(self, path: Path, rounds: int = _ROUNDS) -> Beside:
        """Time a file in turns with the dense model."""
        other = open_session(path, self.threads)
        samples = interleave(
            {"dense": self._call(self.session), "slim": self._call(other)},
            rounds=rounds,
            warmup=1,
        )
        pairs = zip(samples["dense"], samples["slim"], strict=True)
        return Beside(median(slim / dense for dense, slim in pairs), median(samples["dense"]))

    def _call(self, session: InferenceSession) -> Callable[[], object]:
        # a generated model names its inputs anew
        feeds = session_feeds(session, self.values)
        return lambda: session.run(None, feeds)


def measure(
    coupling: Coupling,
    model: nn.Module,
    inputs: Any,
    counts: NDArray[np.int64],
    *,
    threads: int,
    progress: bool,
) -> Samples:
    """Measure the model at several widths.

    Args:
        coupling: The groups.
        model: The dense model.
        inputs: What it is run on.
        counts: Kept counts, [samples, groups]; the dense ones first.
        threads: Threads that one operator may use.
        progress: Whether to show a progress bar on standard error.

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
    with tempfile.TemporaryDirectory(prefix="depcut-") as name, bar:
        task = bar.add_task("measuring kernels at several widths", total=len(counts))
        bench = Bench(model, inputs, threads, Path(name), free_batch=False)
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
        path = bench.path
        if kept:
            path = bench.written(planned(coupling, model, kept, {}).apply(model))
        kernels = profile(path, bench.values, bench.threads)
        beside = bench.beside(path)
    except DepcutError as error:
        return error
    return Sample(tuple(map(int, row)), kernels, beside.ratio), beside.dense_seconds
