"""The interface of a runtime that candidates are timed in, and its registry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from depcut.timing.clock import Call, Stopwatch
from depcut.timing.kernels import Kernel

Candidate: TypeAlias = "nn.Module | str | os.PathLike[str]"


class Runner(Protocol):
    """A candidate that is ready to run.

    Attributes:
        batch: Batch size of the inputs that were given.
        device: What it runs on, in words.
        stopwatch: What tells how long calls of it take.
    """

    batch: int
    device: str
    stopwatch: Stopwatch

    @property
    def file_bytes(self) -> int | None:
        """Size of its ONNX file with external data; None where there is no file."""

    def call(self, batch: int) -> Call:
        """A function that runs it once at a batch size; it has been seen to run."""

    def peak_memory(self, batch: int) -> int | None:
        """Bytes that it needs at a batch size; None where they cannot be told from others'."""

    def kernels(self, batch: int) -> tuple[Kernel, ...]:
        """What a run at a batch size spends its time on, or LatencyError where that is not told."""


@dataclass(frozen=True)
class Setup:
    """What a runner is built from, beside the candidate.

    Attributes:
        inputs: Its inputs, or None to infer them.
        provider: What computes, or None for the runtime's own choice.
        threads: Threads that one operator may use.
        folder: An empty folder for the files that the runner writes.
    """

    inputs: Any
    provider: str | None
    threads: int
    folder: Path


class Runtime(Protocol):
    """A library that runs candidates.

    Attributes:
        providers: What may compute in it.
        in_place: Whether a model runs on the device where it is, so that it must be moved first;
            the others take ONNX files, too.
        alignment: Widths that are multiples of it waste nothing in its kernels on the CPU.
    """

    providers: tuple[str, ...]
    in_place: bool
    alignment: int

    def check(self, provider: str) -> None:
        """Raise InputError if this machine lacks the library or a provider of `providers`."""

    def version(self) -> str:
        """Its name and version in a few words."""

    def enter(self, stack: contextlib.ExitStack, threads: int) -> None:
        """Make the settings that hold while it measures; the stack takes them back."""

    def runner(self, name: str, candidate: Candidate, setup: Setup) -> Runner:
        """The runner of a candidate; errors name it by `name`."""


RUNTIMES: dict[str, Runtime] = {}

Registered = TypeVar("Registered", bound=Callable[[], Runtime])


def runtime(name: str) -> Callable[[Registered], Registered]:
    """Register the decorated class, which takes no arguments, as a runtime.

    Args:
        name: What users pass as `runtime=`.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: There is a runtime of that name.
    """

    def register(kind: Registered) -> Registered:
        if name in RUNTIMES:
            raise ValueError(f"there are two runtimes named {name!r}")
        RUNTIMES[name] = kind()
        return kind

    return register


def channel_block() -> int:
    """How many floats a vector of this processor holds: what kernels on the CPU block channels by.

    oneDNN's layouts are nChw8c on AVX2 and nChw16c on AVX-512 and pad other widths:
    https://oneapi-src.github.io/oneDNN/dev_guide_understanding_memory_formats.html; onnxruntime's
    NCHWc kernels are alike: onnxruntime/core/mlas/lib/snchwc.cpp.
    """
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def gpu_name(index: int | None = None) -> str:
    """The name of a GPU.

    Args:
        index: Its number; the current one when left out.

    Returns:
        Its name, or "a GPU" where PyTorch sees none.
    """
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "a GPU"
