"""Whether onnxruntime and PyTorch compute the same, and by how much they differ."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession, OrtValue
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.dlpack import from_dlpack

from depcut.errors import ExportError
from depcut.runtime import Array, first_line, resized, session_tensors

# Allowed error per output, as (rtol, atol): max|onnx - torch| <= atol + rtol * max|torch|.
# The runtime fuses and reorders sums, so that the error follows the largest value of an output.
TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 1e-3),
    torch.bfloat16: (5e-2, 1e-2),
}


def compare_outputs(
    model: nn.Module,
    session: InferenceSession,
    arguments: inspect.BoundArguments,
    batch: int,
    *,
    rtol: float | None,
    atol: float | None,
) -> tuple[float, float]:
    """Largest absolute and relative error of the runtime at one batch size.

    Args:
        model: What the graph was made from, in evaluation mode.
        session: The graph in onnxruntime.
        arguments: What to feed both, up to the batch size.
        batch: The batch size.
        rtol: Error allowed relative to an output's largest magnitude; None: by its data type.
        atol: Error allowed on top of that; None: by its data type.

    Returns:
        The absolute error, and the relative one.

    Raises:
        ExportError: The error is larger, shapes or numbers of outputs differ, or the runtime stops.
    """
    other = resized(arguments, batch)
    with torch.no_grad():
        outputs = model(*other.args, **other.kwargs)
    expected = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    feeds = session_tensors(session, other.arguments)
    try:
        found = _run(session, feeds)
    except Exception as error:
        raise ExportError(
            f"onnxruntime stops at batch size {batch}: {first_line(error)}",
            where=type(model).__name__,
            remedy="the model's code may fix a size that follows the batch",
        ) from error
    if len(found) != len(expected):
        raise ExportError(
            f"the graph has {len(found)} outputs, the model {len(expected)}",
            where=type(model).__name__,
            remedy="return every tensor once",
        )
    names = [entry.name for entry in session.get_outputs()]
    errors = [
        _output_error(f"output {name!r}, batch size {batch}", tensor, array, rtol, atol)
        for name, tensor, array in zip(names, expected, found, strict=True)
    ]
    return max((a for a, _ in errors), default=0.0), max((r for _, r in errors), default=0.0)


def _run(session: InferenceSession, feeds: Mapping[str, Tensor]) -> Sequence[Array]:
    """The graph's outputs; bfloat16, which NumPy does not have, as float32."""
    # The runtime works on the arrays' own memory: they must live as long as the values.
    arrays = {name: _bits(tensor) for name, tensor in feeds.items()}
    values = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
        if feeds[name].dtype == torch.bfloat16
        else OrtValue.ortvalue_from_numpy(array)
        for name, array in arrays.items()
    }
    return [_values(entry) for entry in session.run_with_ort_values(None, values)]


def _bits(tensor: Tensor) -> Array:
    """The tensor's values, those of a bfloat16 as integers with the same bits."""
    tensor = tensor.detach().cpu().contiguous()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _values(value: OrtValue) -> Array:
    """What the runtime returned."""
    if value.element_type() != onnx.TensorProto.BFLOAT16:
        array: Array = value.numpy()
        return array
    return from_dlpack(value).float().numpy()


def _output_error(
    where: str, tensor: Tensor, found: Array, rtol: float | None, atol: float | None
) -> tuple[float, float]:
    """Absolute and relative error of one output, or an ExportError when it is too large."""
    expected = _exact(tensor)
    if expected.shape != found.shape:
        raise ExportError(
            f"onnxruntime gives shape {found.shape}, PyTorch {expected.shape}",
            where=where,
            remedy="the model's code may fix a size that follows the batch",
        )
    default_rtol, default_atol = TOLERANCES.get(tensor.dtype, (0.0, 0.0))
    rtol = default_rtol if rtol is None else rtol
    atol = default_atol if atol is None else atol
    both = expected, found.astype(np.float64)
    scale = float(np.abs(both[0][np.isfinite(both[0])]).max(initial=0.0))
    # Infinities and NaNs count as equal where both have them, as an infinite error elsewhere.
    with np.errstate(invalid="ignore"):
        same = (both[0] == both[1]) | (np.isnan(both[0]) & np.isnan(both[1]))
        gap = np.nan_to_num(np.where(same, 0.0, np.abs(both[0] - both[1])), nan=np.inf)
    worst = float(gap.max(initial=0.0))
    if worst > atol + rtol * scale:
        raise ExportError(
            f"onnxruntime and PyTorch differ by {worst:.3g} where the largest value is {scale:.3g}"
            f" (allowed: {atol:g} + {rtol:g} x largest)",
            where=where,
            remedy="pass a wider rtol= or atol= if this is rounding; else please report the model",
        )
    return worst, worst / scale if scale else 0.0


def _exact(tensor: Tensor) -> Array:
    """The tensor's values in double precision."""
    values: Array = tensor.detach().cpu().double().numpy()
    return values
