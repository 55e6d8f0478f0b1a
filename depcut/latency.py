"""Timing that compares fairly: candidates take turns, and noise is never called a speedup."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnxruntime as ort
import torch
from rich.table import Table
from torch import nn

from depcut.errors import InputError
from depcut.export import export
from depcut.runtime import bind_inputs, evaluating, open_session, session_feeds
from depcut.tables import rendered

Runtime: TypeAlias = Literal["onnxruntime", "torch"]
Candidate: TypeAlias = "nn.Module | str | os.PathLike[str]"

# One sample repeats a fast model until it fills this time, far above what reading a clock costs.
_SAMPLE_SECONDS = 2e-3
# Two sessions of the very same file differ by about 1 %: their buffers lie elsewhere.
_SMALLEST_EFFECT = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        median: Median over the rounds.
        low: Lower end of the 95 % confidence interval of the median.
        high: Upper end of it.
        samples: Seconds per call in each round, in order.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The timing that these samples amount to."""
        low, high = median_interval(samples)
        return cls(statistics.median(samples), low, high, tuple(samples))

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ms ({1e3 * self.low:.3g} to {1e3 * self.high:.3g})"


@dataclass(frozen=True)
class Speedup:
    """How many times faster one candidate is than another, from the rounds that both ran in.

    Attributes:
        ratio: Median of the per-round ratios of times.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of it.
    """

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "slower", "within noise"]:
        """What may be claimed: "within noise" unless the whole interval is beyond 2 %."""
        if self.low > 1 + _SMALLEST_EFFECT:
            return "faster"
        if self.high < 1 / (1 + _SMALLEST_EFFECT):
            return "slower"
        return "within noise"

    def __str__(self) -> str:
        interval = f"{self.low:.2f} to {self.high:.2f}"
        if self.verdict == "within noise":
            return f"no difference beyond noise ({interval}x)"
        return f"{self.ratio:.2f}x ({interval}), {self.verdict}"


@dataclass(frozen=True)
class BenchResult:
    """Timings of all candidates, and the conditions that they hold under.

    Attributes:
        timings: By candidate name, in the order given.
        runtime: Library and version that ran the candidates.
        provider: Its execution provider or device.
        threads: Threads that one operator could use.
        machine: The processor.
        rounds: Times that every candidate had its turn.
    """

    timings: Mapping[str, Timing]
    runtime: str
    provider: str
    threads: int
    machine: str
    rounds: int

    def speedup(self, base: str, candidate: str) -> Speedup:
        """How many times faster `candidate` is than `base`.

        Args:
            base: Name of the candidate to compare with.
            candidate: Name of the one in question.

        Returns:
            The ratio with its interval and what may be claimed from it.

        Raises:
            InputError: A name is none of the candidates'.
        """
        for name in (base, candidate):
            if name not in self.timings:
                raise InputError(
                    f"no candidate {name!r}", remedy=f"there are: {', '.join(self.timings)}"
                )
        pairs = zip(self.timings[base].samples, self.timings[candidate].samples, strict=True)
        ratios = [slow / fast for slow, fast in pairs]
        return Speedup(statistics.median(ratios), *median_interval(ratios))

    @property
    def conditions(self) -> str:
        """One line that says what the numbers hold for."""
        plural = "thread" if self.threads == 1 else "threads"
        return (
            f"{self.runtime}, {self.provider}, {self.threads} {plural}, {self.machine}; "
            f"median of {self.rounds} interleaved rounds, 95 % interval"
        )

    def __rich__(self) -> Table:
        base = next(iter(self.timings))
        table = Table(caption=self.conditions)
        table.add_column("candidate")
        table.add_column("latency", justify="right")
        table.add_column(f"against {base}", justify="right")
        for name, timing in self.timings.items():
            table.add_row(name, str(timing), "" if name == base else str(self.speedup(base, name)))
        return table

    def __str__(self) -> str:
        return rendered(self)


def bench(
    candidates: Mapping[str, Candidate],
    inputs: Any = None,
    *,
    runtime: Runtime = "onnxruntime",
    threads: int = 1,
    rounds: int = 30,
    warmup: int = 5,
) -> BenchResult:
    """Time candidates in turns (A B A B ...), so that drift of the machine meets all alike.

    Args:
        candidates: Models, or ONNX files when `runtime` is "onnxruntime", by name. The first one
            is what the others are compared with.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments that all take;
            inferred from each model when left out.
        runtime: "onnxruntime" (its CPU provider; models are exported first) or "torch" (eager, on
            the device where the model is).
        threads: Threads that one operator may use.
        rounds: Turns that every candidate has, at least 6; a turn of a fast model is many calls.
        warmup: Calls of each candidate that are not counted.

    Returns:
        Medians with confidence intervals, and the conditions they hold under.

    Raises:
        InputError: An argument is out of its range, or a file is given to "torch".
        ExportError: A model cannot be exported, or a file cannot be run.
    """
    _check(candidates, runtime, threads, rounds)
    with contextlib.ExitStack() as stack:
        if runtime == "torch":
            stack.enter_context(_torch_threads(threads))
            calls = {n: _eager(n, c, inputs, stack) for n, c in candidates.items()}
            provider = _device(candidates)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="depcut-")))
            calls = {n: _session(n, c, inputs, folder, threads) for n, c in candidates.items()}
            provider = "CPUExecutionProvider"
        samples = interleave(calls, rounds=rounds, warmup=warmup)
    return BenchResult(
        timings={name: Timing.of(times) for name, times in samples.items()},
        runtime=f"torch {torch.__version__} eager"
        if runtime == "torch"
        else f"onnxruntime {ort.__version__}",
        provider=provider,
        threads=threads,
        machine=_machine(),
        rounds=rounds,
    )


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample a round, all of them in turn in every round.

    Args:
        calls: What to time, by name.
        rounds: Number of rounds.
        warmup: Calls of each that come first and are not counted.

    Returns:
        The samples by name, in the order of the rounds.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        started = time.perf_counter()
        call()
        once = time.perf_counter() - started
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_collection():
        for _ in range(rounds):
            for name, call in calls.items():
                count = repeats[name]
                started = time.perf_counter()
                for _ in range(count):
                    call()
                samples[name].append((time.perf_counter() - started) / count)
    return samples


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median, from order statistics.

    The number of samples below the true median is binomial (n, 1/2), whatever the distribution;
    see Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.

    Args:
        samples: At least 6 of them for 95 %; with fewer, the interval is the whole range.
        confidence: Probability that the interval covers the median.

    Returns:
        The lower and the upper end.
    """
    ordered = sorted(samples)
    n = len(ordered)
    tail, below = 0.0, 0
    while below < n // 2:
        tail += math.comb(n, below) / 2**n
        if tail > (1 - confidence) / 2:
            break
        below += 1
    first = max(below - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def _check(candidates: Mapping[str, Candidate], runtime: str, threads: int, rounds: int) -> None:
    """Refuse what cannot be timed."""
    if not candidates:
        raise InputError("no candidates", where="bench", remedy="pass at least one, by name")
    if runtime not in ("onnxruntime", "torch"):
        raise InputError(
            f"unknown runtime {runtime!r}", where="bench", remedy='use "onnxruntime" or "torch"'
        )
    if threads < 1:
        raise InputError(f"threads={threads}", where="bench", remedy="pass 1 or more")
    if rounds < 6:
        raise InputError(
            f"rounds={rounds}",
            where="bench",
            remedy="pass 6 or more: fewer give no 95 % interval of a median",
        )


def _session(
    name: str, candidate: Candidate, inputs: Any, folder: Path, threads: int
) -> Callable[[], object]:
    """A call of the candidate in onnxruntime, exported to the folder first if it is a model."""
    if isinstance(candidate, nn.Module):
        values: Mapping[str, Any] = bind_inputs(candidate, inputs).arguments
        path = export(candidate, folder / f"{len(list(folder.iterdir()))}.onnx", inputs).path
    else:
        values = inputs if isinstance(inputs, Mapping) else {"": inputs}
        path = Path(candidate)
        if not path.is_file():
            raise InputError(
                f"no file {path}", where=f"candidate {name!r}", remedy="export it first"
            )
    session = open_session(path, threads)
    feeds = session_feeds(session, values)
    return lambda: session.run(None, feeds)


def _eager(
    name: str, candidate: Candidate, inputs: Any, stack: contextlib.ExitStack
) -> Callable[[], object]:
    """A call of the model in PyTorch, in evaluation mode until the stack closes."""
    if not isinstance(candidate, nn.Module):
        raise InputError(
            f"{candidate} is a file", where=f"candidate {name!r}", remedy='use "onnxruntime"'
        )
    stack.enter_context(evaluating(candidate))
    bound = bind_inputs(candidate, inputs)
    on_cuda = any(tensor.is_cuda for tensor in candidate.parameters())

    def call() -> None:
        # no_grad rather than inference_mode: a model may cache tensors that later need gradients
        with torch.no_grad():
            candidate(*bound.args, **bound.kwargs)
        if on_cuda:
            torch.cuda.synchronize()

    return call


def _device(candidates: Mapping[str, Candidate]) -> str:
    """Where the first model computes."""
    models = [model for model in candidates.values() if isinstance(model, nn.Module)]
    tensors = (tensor for model in models for tensor in model.parameters())
    return str(next((tensor.device for tensor in tensors), "cpu"))


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Give PyTorch this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _machine() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
