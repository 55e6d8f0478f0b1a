"""Peak memory of a candidate, from a fresh process or from PyTorch's CUDA allocator."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depcut.errors import ExportError, InputError
from depcut.timing.clock import Call

_SCRIPT = Path(__file__).with_name("footprint.py")


def session_memory(path: Path, feeds: Mapping[str, Any], threads: int) -> int:
    """Peak resident memory that an ONNX file takes in onnxruntime on the CPU.

    A fresh process loads and runs it; what that process held before is taken off.

    Args:
        path: The ONNX file.
        feeds: Arrays by input name, in the order of the graph.
        threads: Threads that one operator may use.

    Returns:
        The bytes, weights and workspace together.

    Raises:
        InputError: The system does not tell a process's peak.
        ExportError: The process failed, for want of memory perhaps.
    """
    if not Path("/proc/self/status").exists():
        raise InputError(
            "peak memory is read from /proc, which this system does not have",
            where="memory",
            remedy="leave memory out, or measure on Linux",
        )
    places = os.pathsep.join(place for place in sys.path if place)
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, *feeds.values())
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), str(path), str(inputs), str(threads)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": places},
        )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ExportError(
            f"the process that measures memory ended with code {done.returncode}"
            + (f": {said[-1]}" if said else ""),
            where=path.name,
            remedy="free some memory, or leave memory out",
        )
    return int(done.stdout)


def cuda_memory(call: Call, device: torch.device, own: int) -> int:
    """Peak memory that PyTorch's allocator hands out on a GPU for one candidate.

    Args:
        call: A call of it, warm.
        device: The GPU.
        own: Bytes of the candidate's parameters, buffers and inputs, which are there already.

    Returns:
        Those bytes and the most that a call adds to them.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return own + torch.cuda.max_memory_allocated(device) - before
