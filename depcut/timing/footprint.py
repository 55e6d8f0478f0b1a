"""A script, run in a process of its own: the memory that one ONNX file takes in onnxruntime.

Usage: footprint.py MODEL.onnx INPUTS.npz THREADS. It prints the bytes that loading and running the
file added to the peak resident set. Nothing of the package and no PyTorch is imported, for what
they hold would hide what the file takes.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np

# The second run plans its memory from what the first one took.
_RUNS = 3


def footprint(file: str, inputs: str, threads: int) -> int:
    """Bytes that the peak resident set grows by.

    Args:
        file: The ONNX file.
        inputs: NumPy archive of its inputs, in the order of the graph.
        threads: Threads that one operator may use.

    Returns:
        The peak while the file is loaded and run, less what was resident before.
    """
    import onnxruntime as ort

    with np.load(inputs, allow_pickle=False) as archive:
        arrays = [archive[name] for name in archive.files]
    # Without the permission to reset it, the peak starts from that of the imports.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feeds = dict(zip(names, arrays, strict=True))
    for _ in range(_RUNS):
        session.run(None, feeds)
    return _peak() - before


def _peak() -> int:
    """Bytes of the peak resident set; getrusage would tell that of the process that forked."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split("\n"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status does not tell VmHWM")


if __name__ == "__main__":
    sys.stdout.write(str(footprint(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
