"""Candidates in turns: latency, throughput, memory, and the conditions that they hold under."""

from __future__ import annotations

import contextlib
import operator
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from depcut.capture.random_state import preserved
from depcut.capture.refusals import check_module
from depcut.errors import InputError
from depcut.support.checks import (
    THREADS,
    check_flag,
    check_integer,
    check_items,
    check_kind,
    check_path,
)
from depcut.support.failures import shown
from depcut.support.machine import processor
from depcut.support.tables import rendered
from depcut.support.unwrap import unwrapped
from depcut.timing.backends import Candidate, Runner, Setup
from depcut.timing.clock import Speedup, Timing, interleave
from depcut.timing.pinning import pinned
from depcut.timing.runtimes import RUNTIMES, check_runtime

if TYPE_CHECKING:
    from rich.table import Table


_MOST = 1_000_000  # rounds, calls or examples of one call


@dataclass(frozen=True)
class Measurement:
    """One candidate at one batch size.

    Attributes:
        batch: Examples in one call.
        latency: Time of one call.
        peak_memory: Bytes that loading and running it take; None if that was not measured.
    """

    batch: int
    latency: Timing
    peak_memory: int | None = None

    @property
    def throughput(self) -> float:
        """Examples per second."""
        return self.batch / self.latency.median


@dataclass(frozen=True)
class BenchResult:
    """Measurements of all candidates, and the conditions that they hold under.

    Attributes:
        measurements: By candidate name and batch size, both in the order given.
        file_bytes: Size of each candidate's ONNX file, external data included; None in PyTorch.
        runtime: Library and version that ran the candidates.
        provider: Its execution provider or device.
        threads: Threads that one operator could use.
        machine: The processor.
        rounds: Times that every candidate had its turn at a batch size.
        cpus: Processors that the measurement was pinned to; none of them if it was not.
        memory: Whether peak memory was asked for.
    """

    measurements: Mapping[str, Mapping[int, Measurement]]
    file_bytes: Mapping[str, int | None]
    runtime: str
    provider: str
    threads: int
    machine: str
    rounds: int
    cpus: tuple[int, ...] = ()
    memory: bool = False

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes, in the order given."""
        return tuple(next(iter(self.measurements.values())))

    @property
    def timings(self) -> dict[str, Timing]:
        """Time of one call of each candidate, at the first batch size."""
        return {name: self.at(name).latency for name in self.measurements}

    def at(self, candidate: str, batch: int | None = None) -> Measurement:
        """What was measured of one candidate.

        Args:
            candidate: Its name.
            batch: The batch size; the first one when left out.

        Returns:
            The measurement.

        Raises:
            InputError: There is no such candidate or batch size.
        """
        if candidate not in self.measurements:
            raise InputError(
                f"no candidate {candidate!r}", remedy=f"there are: {', '.join(self.measurements)}"
            )
        batch = self.batch_sizes[0] if batch is None else batch
        if batch not in self.batch_sizes:
            raise InputError(
                f"batch size {batch} was not measured",
                remedy=f"there are: {', '.join(map(str, self.batch_sizes))}",
            )
        return self.measurements[candidate][batch]

    def speedup(self, base: str, candidate: str, batch: int | None = None) -> Speedup:
        """How many times faster `candidate` is than `base`.

        Args:
            base: Name of the candidate to compare with.
            candidate: Name of the one in question.
            batch: The batch size; the first one when left out.

        Returns:
            The ratio with its interval and what may be claimed from it.

        Raises:
            InputError: There is no such candidate or batch size.
        """
        return Speedup.between(self.at(base, batch).latency, self.at(candidate, batch).latency)

    @property
    def warning(self) -> str:
        """A line on the candidates whose times scatter too widely, or an empty string."""
        spreads = [
            (measurement.latency.spread, f"{name} at batch size {batch}")
            for name, by_batch in self.measurements.items()
            for batch, measurement in by_batch.items()
            if measurement.latency.is_unstable
        ]
        if not spreads:
            return ""
        spread, worst = max(spreads)
        return (
            f"unstable machine: the middle half of the times of {worst} spans {spread:.0%} of "
            "their median; stop what else runs, or pin"
        )

    @property
    def conditions(self) -> str:
        """What the numbers hold for: one line, and others on what went wrong, if anything did."""
        plural = "thread" if self.threads == 1 else "threads"
        where = f" on CPU {', '.join(map(str, self.cpus))}" if self.cpus else ""
        line = (
            f"{self.runtime}, {self.provider}, {self.threads} {plural}{where}, {self.machine}; "
            f"median of {self.rounds} interleaved rounds, 95 % interval"
        )
        missing = self.memory and any(
            one.peak_memory is None
            for sizes in self.measurements.values()
            for one in sizes.values()
        )
        note = "no way to measure peak memory here" if missing else ""
        return "\n".join(filter(None, (line, note, self.warning)))

    def __rich__(self) -> Table:
        from rich.table import Table

        base = next(iter(self.measurements))
        has_files = any(self.file_bytes.values())
        table = Table(caption=self.conditions)
        table.add_column("candidate")
        headings = ["batch", "latency", f"against {base}", "examples/s"]
        headings += ["file"] * has_files + ["peak memory"] * self.memory
        for heading in headings:
            table.add_column(heading, justify="right")
        for batch in self.batch_sizes:
            for name in self.measurements:
                one = self.at(name, batch)
                against = "" if name == base else str(self.speedup(base, name, batch))
                cells = [str(batch), str(one.latency), against, rate(one.throughput)]
                cells += [byte_size(self.file_bytes[name])] * has_files
                cells += [byte_size(one.peak_memory)] * self.memory
                table.add_row(name, *cells)
        return table

    def __str__(self) -> str:
        return rendered(self)


def bench(
    candidates: Mapping[str, Candidate],
    inputs: Any = None,
    *,
    runtime: str = "onnxruntime",
    provider: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    threads: int = 1,
    pin: bool | Sequence[int] = False,
    memory: bool = False,
    rounds: int = 30,
    warmup: int = 5,
) -> BenchResult:
    """Time candidates in turns (A B A B ...), so that drift of the machine affects all alike.

    Args:
        candidates: Models, or ONNX files when `runtime` is "onnxruntime", by name. The first one
            is what the others are compared with.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments that all take;
            inferred from each model when left out.
        runtime: "onnxruntime" (models are exported first), "torch" (eager) or "torch.compile"
            (compiled anew for each batch size).
        provider: "cpu", "cuda" or "tensorrt". When left out, onnxruntime computes on the CPU and
            PyTorch on the device where the model is; "tensorrt" is onnxruntime's. On a GPU, inputs
            and outputs stay there: copies are not timed.
        batch_sizes: Batch sizes to measure at, by repeating rows of the inputs; when left out,
            that of the inputs.
        threads: Threads that one operator may use.
        pin: Processors to stay on while measuring, or True for as many as there are threads.
        memory: Measure peak memory too. In onnxruntime on the CPU this is what a fresh process
            holds more after loading and running the candidate than before, a second or so for
            each; in PyTorch on CUDA what its allocator hands out. None elsewhere.
        rounds: Turns that every candidate has at a batch size, at least 6. A turn is some 5 ms of
            calls that are not counted, for the caches are cold, and some 20 ms that are.
        warmup: Calls of each candidate that are not counted.

    Returns:
        Medians with confidence intervals, and the conditions they hold under.

    Raises:
        InputError: An argument is out of its range, the provider is absent, a file is given to
            PyTorch, or a candidate does not take a batch size.
        ExportError: A model cannot be exported, or a file cannot be run.
    """
    check_runtime(runtime, provider)
    _check_candidates(candidates)
    candidates = {name: unwrapped(candidate) for name, candidate in candidates.items()}
    batch_sizes = check_timing(threads, rounds, warmup, batch_sizes, memory)
    threads, rounds, warmup = map(operator.index, (threads, rounds, warmup))
    chosen = RUNTIMES[runtime]
    with contextlib.ExitStack() as stack:
        cpus = stack.enter_context(pinned(pin, threads))
        stack.enter_context(preserved())
        chosen.enter(stack, threads)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="depcut-")))
        runners: dict[str, Runner] = {}
        for place, (name, candidate) in enumerate(candidates.items()):
            own = folder / str(place)
            own.mkdir()
            setup = Setup(inputs, provider, threads, own)
            runners[name] = chosen.runner(name, candidate, setup)
        measurements = _measured(runners, batch_sizes, memory, rounds, warmup)
    return BenchResult(
        measurements=measurements,
        file_bytes={name: runner.file_bytes for name, runner in runners.items()},
        runtime=chosen.version(),
        provider=next(iter(runners.values())).device,
        threads=threads,
        machine=processor(),
        rounds=rounds,
        cpus=cpus,
        memory=memory,
    )


def rate(per_second: float) -> str:
    """Examples per second as text.

    Args:
        per_second: The number.

    Returns:
        Three significant digits, or all before the point from 100 on.
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def byte_size(count: int | None) -> str:
    """A number of bytes as text.

    Args:
        count: How many, if that is known.

    Returns:
        One digit after the point and a unit, or that they were not measured.
    """
    from rich.filesize import decimal

    return "not measured" if count is None else decimal(count)


def _measured(
    runners: Mapping[str, Runner],
    batch_sizes: Sequence[int] | None,
    memory: bool,
    rounds: int,
    warmup: int,
) -> dict[str, dict[int, Measurement]]:
    """Time all runners, one batch size after the other; by name and batch size."""
    devices = {runner.device: name for name, runner in runners.items()}
    if len(devices) > 1:
        raise InputError(
            "the candidates are on different devices: "
            + ", ".join(f"{name} on {device}" for device, name in devices.items()),
            where="bench",
            remedy="move them to the same one",
        )
    if batch_sizes is None:
        batch_sizes = (next(iter(runners.values())).batch,)
    # All of them before the first is timed, so that a mistake costs no waiting.
    calls = {b: {name: one.call(b) for name, one in runners.items()} for b in batch_sizes}
    peaks = {
        (name, b): one.peak_memory(b) if memory else None
        for name, one in runners.items()
        for b in batch_sizes
    }
    stopwatch = next(iter(runners.values())).stopwatch
    samples = {
        b: interleave(calls[b], rounds=rounds, warmup=warmup, stopwatch=stopwatch)
        for b in batch_sizes
    }
    return {
        name: {b: Measurement(b, Timing.of(samples[b][name]), peaks[name, b]) for b in batch_sizes}
        for name in runners
    }


def _check_candidates(candidates: Mapping[str, Candidate]) -> None:
    """Refuse what cannot be timed."""
    remedy = "pass models or files by name, such as {'dense': model}"
    if not isinstance(candidates, Mapping):
        raise InputError(
            f"candidates is a {type(candidates).__name__}", where="bench", remedy=remedy
        )
    if not candidates:
        raise InputError("no candidates", where="bench", remedy="pass at least one, by name")
    for name, candidate in candidates.items():
        check_kind(name, str, "the name of a candidate", remedy)
        if isinstance(candidate, nn.Module):
            check_module(candidate, f"candidate {name!r}")
        else:
            check_path(candidate, f"candidate {name!r}")


def check_timing(
    threads: int, rounds: int, warmup: int, batch_sizes: Sequence[int] | None, memory: bool
) -> tuple[int, ...] | None:
    """Refuse what nothing can be timed with; the batch sizes as plain integers.

    Args:
        threads: See `bench`.
        rounds: See `bench`.
        warmup: See `bench`.
        batch_sizes: See `bench`.
        memory: See `bench`.

    Raises:
        InputError: A value is of another kind or out of its range.
    """
    check_flag(memory, "memory")
    limits = (
        ("threads", threads, 1, THREADS, f"pass 1 to {THREADS}"),
        ("rounds", rounds, 6, _MOST, "pass 6 or more: fewer give no 95 % interval of a median"),
        ("warmup", warmup, 0, _MOST, f"pass 0 to {_MOST}"),
    )
    for name, value, least, most, remedy in limits:
        what = f"{name}={shown(value)}"
        check_integer(value, name, least, most, what=what, where="bench", remedy=remedy)
    if batch_sizes is None:
        return None
    remedy, what = (
        "pass one or more positive numbers, each once",
        f"batch_sizes={shown(batch_sizes)}",
    )
    sizes = tuple(
        check_integer(size, "batch_sizes", 1, _MOST, what=what, where="bench", remedy=remedy)
        for size in check_items(batch_sizes, "batch_sizes", remedy)
    )
    if not sizes or len(set(sizes)) < len(sizes):
        raise InputError(what, where="bench", remedy=remedy)
    return sizes
