"""Whether a file computes in int8, by the runtime's own profile, and how far it is from float."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from depcut.deploy.feeds import Fed
from depcut.deploy.quantization import LAYERS, Metric
from depcut.deploy.runtime import Array, open_session
from depcut.errors import ExportError, InputError
from depcut.support.failures import first_line, reraise_fatal

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Kernels of onnxruntime that multiply bytes by bytes.
INT8 = (
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger",
    "MatMulInteger16", "MatMulIntegerToFloat", "NhwcQLinearConv", "QAttention", "QGemm",
    "QLinearConv", "QLinearConvTranspose", "QLinearMatMul",
)  # fmt: skip
# Those that do the same in floating point, alone or fused with what follows.
FLOAT = (
    *LAYERS, "Attention", "FusedConv", "FusedGemm", "FusedMatMul", "GroupQueryAttention",
    "MultiHeadAttention", "TransposeMatMul",
)  # fmt: skip


@dataclass(frozen=True)
class Distance:
    """How far an int8 file is from the float one; see `Quantization`."""

    max_abs_error: float
    max_rel_error: float
    rms_error: float


def kernels(path: Path, feeds: Mapping[str, Array]) -> tuple[dict[str, int], dict[str, int]]:
    """How many kernels of each operator multiply in int8, and in floating point, in one run.

    Args:
        path: The file; it has a folder of its own, where the runtime writes its profile.
        feeds: Arrays by the names of its inputs.

    Raises:
        ExportError: The runtime does not run the file, or not one of its kernels computes in int8.
    """
    session = open_session(path, profile=path.with_name("profile"))
    try:
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"onnxruntime stops in the int8 file: {first_line(error)}",
            where="quantize=",
            remedy="leave quantize= out, or choose the other scheme",
        ) from error
    return counted(events, path.name)


def counted(
    events: Iterable[Mapping[str, Any]], where: str
) -> tuple[dict[str, int], dict[str, int]]:
    """The kernels of a profile, see `kernels`.

    Args:
        events: What the runtime's profile holds.
        where: What was profiled, for messages.

    Raises:
        ExportError: No kernel computes in int8.
    """
    found = Counter(
        str(event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
    )
    in_int8 = {name: found[name] for name in sorted(found) if name in INT8}
    in_float = {name: found[name] for name in sorted(found) if name in FLOAT}
    if not in_int8:
        raise ExportError(
            "the runtime's profile shows no int8 kernel: the file would be an int8 one in name "
            f"alone; it runs {', '.join(sorted(found)) or 'nothing'}",
            where=where,
            remedy="leave quantize= out, or choose the other scheme",
        )
    return in_int8, in_float


def distance(session: InferenceSession, batches: Sequence[Fed]) -> Distance:
    """How far a session's outputs are from those of the float file.

    Args:
        session: The int8 file.
        batches: What both are compared on.

    Raises:
        ExportError: Outputs have other shapes, or are not finite where the float ones are.
    """
    names = [entry.name for entry in session.get_outputs()]
    worst, scale, squares, whole = (dict.fromkeys(names, 0.0) for _ in range(4))
    for batch in batches:
        returned = session.run(None, dict(batch.feeds))
        for name, wanted, got in zip(names, batch.outputs, returned, strict=True):
            exact, found = _finite(name, wanted, got)
            if exact.size:
                worst[name] = max(worst[name], float(np.abs(found - exact).max()))
                scale[name] = max(scale[name], float(np.abs(exact).max()))
                squares[name] += float(np.square(found - exact).sum())
                whole[name] += float(np.square(exact).sum())
    return Distance(
        max(worst.values(), default=0.0),
        max((worst[n] / (scale[n] or 1.0) for n in names), default=0.0),
        max((math.sqrt(squares[n] / (whole[n] or 1.0)) for n in names), default=0.0),
    )


def _finite(name: str, wanted: Array, got: Array) -> tuple[Array, Array]:
    """Both outputs where the float one is finite, in double precision."""
    finite = np.isfinite(wanted) if wanted.dtype.kind == "f" else np.ones(wanted.shape, bool)
    if wanted.shape != got.shape or not np.isfinite(got[finite].astype(np.float64)).all():
        raise ExportError(
            f"the int8 file gives shape {got.shape}, the float one {wanted.shape}"
            if wanted.shape != got.shape
            else "the int8 file gives NaN or infinite values where the float one does not",
            where=f"output {name!r}",
            remedy="leave quantize= out, or choose the other scheme",
        )
    return wanted[finite].astype(np.float64), got[finite].astype(np.float64)


def metric_of(
    metric: Metric, session: InferenceSession, batches: Sequence[Fed], structure: Any
) -> float:
    """The mean of a metric over batches, by their rows.

    Args:
        metric: A function of (output, target) that returns the mean over a batch.
        session: The file.
        batches: What it runs on.
        structure: Makes a model's output of the list of tensors in it.

    Raises:
        InputError: The metric fails, or returns no number.
    """
    total, rows = 0.0, 0
    for batch in batches:
        arrays = session.run(None, dict(batch.feeds))
        count = next((a.shape[0] for a in batch.feeds.values() if a.ndim), 1)
        try:
            value = float(metric(structure([torch.from_numpy(a) for a in arrays]), batch.target))
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"it failed: {first_line(error)}",
                where="metric=",
                remedy="it gets (output of the model, target of the item), and returns a number",
            ) from error
        total, rows = total + count * value, rows + count
    return total / rows
