"""What can run a candidate, whether it is there, and what a timing needs to know of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import nn

from depcut.errors import InputError
from depcut.timing.clock import Call, Stopwatch

Runtime: TypeAlias = Literal["onnxruntime", "torch", "torch.compile"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt"]
Candidate: TypeAlias = "nn.Module | str | os.PathLike[str]"

RUNTIMES: tuple[str, ...] = get_args(Runtime)
PROVIDERS: tuple[str, ...] = get_args(Provider)

# onnxruntime's names for them; nodes that one has no kernel for go to the next.
CHAINS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class Runner(Protocol):
    """A candidate that is ready to run.

    Attributes:
        batch: Batch size of the inputs that were given.
        device: What it runs on, in words.
        file_bytes: Size of its ONNX file with external data; None where there is no file.
        stopwatch: What tells how long calls of it take.
    """

    batch: int
    device: str
    file_bytes: int | None
    stopwatch: Stopwatch

    def call(self, batch: int) -> Call:
        """A function that runs it once at a batch size; it has been seen to run."""

    def peak_memory(self, batch: int) -> int | None:
        """Bytes that it needs at a batch size; None where they cannot be told from others'."""


def check_runtime(runtime: str, provider: str | None) -> None:
    """Refuse what is unknown or absent here, before anything is built for it.

    Args:
        runtime: Name of the runtime.
        provider: Name of the provider, or None for the runtime's own choice.

    Raises:
        InputError: There is no such runtime or provider, or this machine lacks it.
    """
    import onnxruntime as ort

    if runtime not in RUNTIMES:
        raise _unknown("runtime", runtime, RUNTIMES)
    if provider is None:
        return
    if provider not in PROVIDERS:
        raise _unknown("provider", provider, PROVIDERS)
    if runtime == "onnxruntime":
        wanted, available = CHAINS[provider][0], ort.get_available_providers()
        if wanted not in available:
            raise InputError(
                f"onnxruntime {ort.__version__} has no {wanted}; it has {', '.join(available)}",
                where=f"provider={provider!r}",
                remedy='install onnxruntime-gpu in place of onnxruntime, or use provider="cpu"',
            )
    elif provider == "tensorrt":
        raise InputError(
            "tensorrt is a provider of onnxruntime, not of PyTorch; that has cpu and cuda",
            where=f"runtime={runtime!r}",
            remedy='use runtime="onnxruntime"',
        )
    elif provider == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"PyTorch {torch.__version__} finds no CUDA device; it has cpu",
            where=f"provider={provider!r}",
            remedy='install a CUDA build of torch and the driver, or use provider="cpu"',
        )


def engine(runtime: str) -> str:
    """The runtime's name and version.

    Args:
        runtime: Which one.

    Returns:
        A few words.
    """
    import onnxruntime as ort

    if runtime == "onnxruntime":
        return f"onnxruntime {ort.__version__}"
    how = "eager" if runtime == "torch" else "compiled for each batch size"
    return f"torch {torch.__version__} {how}"


def gpu_name(index: int | None = None) -> str:
    """What the GPU calls itself.

    Args:
        index: Its number; the current one when left out.

    Returns:
        Its name, or "a GPU" where PyTorch sees none.
    """
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else "a GPU"


def _unknown(kind: str, given: str, known: tuple[str, ...]) -> InputError:
    """No such runtime or provider."""
    names = ", ".join(f'"{name}"' for name in known)
    return InputError(f"unknown {kind} {given!r}", where="bench", remedy=f"use one of {names}")
