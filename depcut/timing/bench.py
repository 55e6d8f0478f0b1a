"""Candidates in turns: latency, throughput, memory, and the conditions that they hold under."""

from __future__ import annotations

import contextlib
import operator
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from depcut.capture.plain import check_whole
from depcut.capture.random_state import preserved
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
from depcut.support.unwrap import unwrapped
from depcut.timing.backends import Candidate, Runner, Setup
from depcut.timing.clock import Timing, interleave
from depcut.timing.measurements import BenchResult, Measurement
from depcut.timing.pinning import pinned
from depcut.timing.runtimes import RUNTIMES, check_runtime

_MOST = 1_000_000  # rounds, calls or examples of one call


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
        candidates: Models, or ONNX files when `runtime` is "onnxruntime" or "openvino", by name.
            The first one is what the others are compared with.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments that all take;
            inferred from each model when left out.
        runtime: "onnxruntime" (models are exported first), "openvino" (the same, and compiled anew
            for each batch size, in float32; pip install 'depcut[openvino]'), "torch" (eager) or
            "torch.compile" (compiled anew for each batch size).
        provider: "cpu", "cuda" or "tensorrt". When left out, onnxruntime and OpenVINO compute on
            the CPU and PyTorch on the device where the model is; "tensorrt" is onnxruntime's. On a
            GPU, inputs and outputs stay there: copies are not timed.
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
        sizes = {name: one.file_bytes for name, one in runners.items()}
        measurements = _measured(runners, batch_sizes, memory, rounds, warmup)
    return BenchResult(
        measurements=measurements,
        file_bytes=sizes,
        runtime=chosen.version(),
        provider=next(iter(runners.values())).device,
        threads=threads,
        machine=processor(),
        rounds=rounds,
        cpus=cpus,
        memory=memory,
    )


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
            check_whole(candidate, f"candidate {name!r}")
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
