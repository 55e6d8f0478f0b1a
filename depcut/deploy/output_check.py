"""Whether onnxruntime and PyTorch compute the same, and by how much they differ."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.eager import user_line
from depcut.capture.process_state import as_captured
from depcut.capture.results import tensors_of
from depcut.deploy.runtime import Array, resized, session_tensors
from depcut.errors import ExportError
from depcut.rewrite.copying import copied
from depcut.support.closeness import Gap, gap
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

# A difference beyond that is no error of the file's if PyTorch itself is off by about as much: two
# computations that round alike differ by the sum of their errors.
_OWN = 3.0
_MOST = 0.02  # of the largest value, whatever the rounding

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
        model: What the graph was made from; a clone of it runs, in evaluation mode.
        session: The graph in onnxruntime.
        arguments: What to feed both, up to the batch size.
        batch: The batch size.
        rtol: Error allowed relative to an output's largest magnitude; None: by its data type.
        atol: Error allowed on top of that; None: by its data type.

    Returns:
        The absolute error, and the relative one.

    Raises:
        ExportError: The error is larger (than PyTorch's own distance from double precision
            explains, too), shapes or numbers of outputs differ, or the runtime stops.
    """
    other = resized(arguments, batch)
    try:
        expected = model_outputs(model, (other.args, other.kwargs))
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"the model itself does not run at batch size {batch}: {first_line(error)}",
            where=user_line(error, model),
            remedy="its code may fix a size that follows the batch",
        ) from error
    feeds = session_tensors(session, other.arguments)
    try:
        returned = _run(session, feeds)
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"onnxruntime stops at batch size {batch}: {first_line(error)}",
            where=type(model).__name__,
            remedy="the model's code may fix a size that follows the batch",
        ) from error
    if len(returned) != len(expected):
        raise ExportError(
            f"the graph has {len(returned)} outputs, the model {len(expected)}",
            where=type(model).__name__,
            remedy="return every tensor once",
        )
    places = [f"output {entry.name!r}, batch size {batch}" for entry in session.get_outputs()]
    gaps = [
        _gap(place, tensor, array)
        for place, tensor, array in zip(places, expected, returned, strict=True)
    ]
    allowed = [
        _allowed(tensor, each.scale, rtol, atol)
        for tensor, each in zip(expected, gaps, strict=True)
    ]
    if any(each.worst > limit for each, limit in zip(gaps, allowed, strict=True)):
        own = _rounding(model, other, expected)
        for place, each, limit, rounding in zip(places, gaps, allowed, own, strict=True):
            if each.worst > limit + min(_OWN * rounding, _MOST * each.scale):
                raise _disagreement(place, each, limit, rounding)
    return (
        max((each.worst for each in gaps), default=0.0),
        max((each.relative for each in gaps), default=0.0),
    )


def _run(session: InferenceSession, feeds: Mapping[str, Tensor]) -> Sequence[Array]:
    """The graph's outputs; bfloat16, which NumPy does not have, as float32."""
    import onnx
    from onnxruntime import OrtValue

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
    """A value of the runtime as an array, bfloat16 as float32."""
    import onnx

    if value.element_type() != onnx.TensorProto.BFLOAT16:
        array: Array = value.numpy()
        return array
    return from_dlpack(value).float().numpy()


def _gap(where: str, tensor: Tensor, array: Array) -> Gap:
    """The difference of one output, or an ExportError where the shapes differ."""
    expected = _exact(tensor)
    if expected.shape != array.shape:
        raise ExportError(
            f"onnxruntime gives shape {array.shape}, PyTorch {tuple(expected.shape)}",
            where=where,
            remedy="the model's code may fix a size that follows the batch",
        )
    return gap(expected, torch.from_numpy(np.asarray(array, np.float64)))


def _allowed(tensor: Tensor, scale: float, rtol: float | None, atol: float | None) -> float:
    """The error allowed for an output by its data type or the caller."""
    default_rtol, default_atol = TOLERANCES.get(tensor.dtype, (0.0, 0.0))
    rtol = default_rtol if rtol is None else rtol
    atol = default_atol if atol is None else atol
    return atol + rtol * scale


def _rounding(
    model: nn.Module, arguments: inspect.BoundArguments, expected: Sequence[Tensor]
) -> list[float]:
    """How far PyTorch itself is from double precision, by output; 0 where that cannot be told."""
    try:
        again = model_outputs(model, (arguments.args, arguments.kwargs))
        if not all(map(torch.equal, again, expected)):
            return [0.0] * len(expected)  # it draws random numbers
        values = pytree.tree_map(_doubled, (arguments.args, arguments.kwargs))
        exact = model_outputs(copied(model, {}).double(), values)
        gaps = [gap(_exact(a), _exact(b)).worst for a, b in zip(exact, expected, strict=True)]
    except Exception:  # noqa: BLE001  (code that insists on single precision has no second look)
        return [0.0] * len(expected)
    return [worst if math.isfinite(worst) else 0.0 for worst in gaps]


def model_outputs(model: nn.Module, values: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    """The tensors that a model returns in evaluation mode; a clone of it runs.

    Args:
        model: The model.
        values: Positional and keyword arguments.
    """
    args, kwargs = cloned_arguments(values)
    with torch.no_grad(), as_captured():
        outputs = clone(model, buffers=True)(*args, **kwargs)
    return tensors_of(outputs)


def _doubled(leaf: object) -> object:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _disagreement(where: str, difference: Gap, limit: float, rounding: float) -> ExportError:
    return ExportError(
        f"onnxruntime and PyTorch differ by {difference.worst:.3g} where the largest value is "
        f"{difference.scale:.3g} (allowed: {limit:.3g}; PyTorch's own rounding: {rounding:.3g})",
        where=where,
        remedy="pass a wider rtol= or atol= if this is rounding; else please report the model",
    )


def _exact(tensor: Tensor) -> Tensor:
    """The tensor's values in double precision."""
    return tensor.detach().cpu().double()
