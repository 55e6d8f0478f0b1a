"""ONNX files that are checked before they appear: the format, the runtime, two batch sizes."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from depcut.errors import ExportError
from depcut.runtime import (
    Array,
    as_array,
    batch_size,
    bind_inputs,
    evaluating,
    first_line,
    open_session,
    resized,
    session_feeds,
)
from depcut.version import __version__

# Protobuf stops at 2 GiB; the graph itself and its names need some of that.
_EXTERNAL_DATA_FROM = 2**31 - 2**26

# Allowed error per output, as (rtol, atol): max|onnx - torch| <= atol + rtol * max|torch|.
# The runtime fuses and reorders sums, so that the error follows the largest value of an output.
TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 1e-3),
}

_CHATTY = ("torch.onnx", "torch.export", "torch.fx", "onnxscript")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how closely it agrees with PyTorch.

    Attributes:
        path: The file that was written.
        bytes: Size on disk, external data included.
        opset: Version of the default ONNX operator set.
        inputs: Names of the graph's inputs, in the order of the model's arguments.
        outputs: Names of the graph's outputs, in the order of the model's (flattened) outputs.
        batch_sizes: Batch sizes at which onnxruntime was compared with PyTorch; only one of them
            means that the model's code fixes its batch size, and the file does too.
        max_abs_error: Largest difference between the two, over all outputs.
        max_rel_error: The same divided by the largest magnitude of its output.
        seconds: Time that capture, conversion and checks took.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    max_abs_error: float
    max_rel_error: float
    seconds: float

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batch_sizes))
        batch = "any batch size" if len(self.batch_sizes) > 1 else "this batch size only"
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB, opset {self.opset}, {batch}; "
            f"agrees with PyTorch at batch {sizes} "
            f"(largest error {self.max_abs_error:.1e}, relative {self.max_rel_error:.1e})"
        )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write `model` in evaluation mode as an ONNX file that onnxruntime has been seen to run.

    The file appears under `path` only after it passed `onnx.checker` and agreed with PyTorch in
    onnxruntime at two batch sizes. Weights that exceed 2 GB go into `path` + ".data" beside it.
    The operator set is the one the exporter itself recommends: newer ones are converted to by
    rewriting, and the runtime's fusions do not know all that they contain.

    Args:
        model: The model; its parameters and training mode are the same afterwards.
        path: The file to write, in an existing folder.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; inferred from the
            first layer when left out. Dimension 0 of the tensors is the batch.
        rtol: Error allowed relative to an output's largest magnitude; by default 1e-4 in float32,
            2e-2 in float16 and 1e-6 in float64.
        atol: Error allowed on top of that; by default 1e-5, 1e-3 and 1e-8.
        metadata: Further entries for the file's metadata, beside depcut's version.

    Returns:
        What was written and how closely it agrees.

    Raises:
        ExportError: The model cannot be captured or converted, the file is not valid ONNX, or it
            disagrees with PyTorch. Nothing has been written then.
        InputError: `inputs` does not fit the model's forward.
    """
    started = time.perf_counter()
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(
            f"the folder {target.parent} does not exist",
            where=f"export to {target}",
            remedy="create it first",
        )
    with evaluating(model), _plain_attention(), _quiet():
        arguments, program = _capture(model, bind_inputs(model, inputs))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            _convert(program, draft, {"depcut_version": __version__, **(metadata or {})})
            proto = _checked(draft)
            session = open_session(draft)
            sizes = _batch_sizes(proto, arguments)
            errors = [_compare(model, session, arguments, n, rtol=rtol, atol=atol) for n in sizes]
            del session  # some systems cannot rename a file that is mapped
            written = _publish(draft, target)
    return ExportReport(
        path=target,
        bytes=written,
        opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
        inputs=tuple(entry.name for entry in proto.graph.input),
        outputs=tuple(entry.name for entry in proto.graph.output),
        batch_sizes=sizes,
        max_abs_error=max(absolute for absolute, _ in errors),
        max_rel_error=max(relative for _, relative in errors),
        seconds=time.perf_counter() - started,
    )


def draft(
    model: nn.Module, inputs: Any, path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a model as ONNX without any check, for measurements only.

    Args:
        model: The model; its mode is the same afterwards.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        path: The file to write.
        metadata: Entries for the file's metadata.

    Raises:
        ExportError: The model cannot be captured or converted.
    """
    with evaluating(model), _plain_attention(), _quiet():
        _, program = _capture(model, bind_inputs(model, inputs))
        _convert(program, path, metadata or {})


def _capture(
    model: nn.Module, arguments: inspect.BoundArguments
) -> tuple[inspect.BoundArguments, torch.export.ExportedProgram]:
    """The exported program, and the arguments it was made with."""
    if batch_size(arguments) == 1:
        # torch.export takes a dimension of one for a constant.
        with contextlib.suppress(ExportError):
            return _capture(model, resized(arguments, 2))
    shapes = pytree.tree_map(_free_batch, dict(arguments.arguments))
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, arguments.args, arguments.kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture the model: {first_line(error)}",
            where=type(model).__name__,
            remedy="its forward must not branch on the values of tensors; see the chained error",
        ) from error
    return arguments, program


def _free_batch(leaf: Any) -> dict[int, Any] | None:
    """The dynamic-shape entry of one argument."""
    is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0
    return {0: torch.export.Dim.AUTO} if is_batched else None


def _convert(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the program as ONNX to `path`, with its metadata."""
    try:
        converted = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
        if converted is None:
            raise ExportError("torch.onnx.export returned nothing", where=str(path.name))
        converted.model.metadata_props.update(metadata)
        _settle_sizes([*converted.model.graph.inputs, *converted.model.graph.outputs])
        weights = sum(
            value.const_value.nbytes
            for value in converted.model.graph.initializers.values()
            if value.const_value is not None
        )
        converted.save(path, external_data=weights > _EXTERNAL_DATA_FROM)
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(
            f"the file cannot be written: {error}", where=str(path.name), remedy="free some space"
        ) from error
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot convert the model: {first_line(_innermost(error))}",
            where=str(path.name),
            remedy="the chained error names the operator; replace it or update onnxscript",
        ) from error


def _innermost(error: BaseException) -> BaseException:
    """What started a chain of errors: the exporter's own ones only name their step."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _settle_sizes(values: Iterable[ir.Value | None]) -> None:
    """Write sizes that the model's code fixed as numbers; the exporter names them "3"."""
    for value in values:
        if value is None or value.shape is None:
            continue
        for place, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and (size.value or "").isdecimal():
                value.shape[place] = int(size.value or "")


def _checked(path: Path) -> onnx.ModelProto:
    """The file's graph without its weights, after onnx.checker accepted it."""
    try:
        onnx.checker.check_model(str(path))  # by path: the only way that takes more than 2 GB
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"onnx.checker refuses the file: {first_line(error)}",
            where=path.name,
            remedy="this is an error of the exporter; please report it with the model",
        ) from error
    return onnx.load(str(path), load_external_data=False)


def _batch_sizes(proto: onnx.ModelProto, arguments: inspect.BoundArguments) -> tuple[int, ...]:
    """Batch sizes at which to compare: two of them unless the graph fixes one."""
    batch = batch_size(arguments)
    leading = [value.type.tensor_type.shape.dim[:1] for value in proto.graph.input]
    is_free = any(dims and dims[0].dim_param for dims in leading)
    return (batch, batch + 1) if is_free else (batch,)


def _compare(
    model: nn.Module,
    session: InferenceSession,
    arguments: inspect.BoundArguments,
    batch: int,
    *,
    rtol: float | None,
    atol: float | None,
) -> tuple[float, float]:
    """Largest absolute and relative error of the runtime at one batch size."""
    other = resized(arguments, batch)
    with torch.no_grad():
        outputs = model(*other.args, **other.kwargs)
    expected = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    feeds = session_feeds(session, other.arguments)
    try:
        found = session.run(None, feeds)
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


def _output_error(
    where: str, tensor: Tensor, found: Array, rtol: float | None, atol: float | None
) -> tuple[float, float]:
    """Absolute and relative error of one output, or an ExportError when it is too large."""
    expected = as_array(tensor)
    if expected.shape != found.shape:
        raise ExportError(
            f"onnxruntime gives shape {found.shape}, PyTorch {expected.shape}",
            where=where,
            remedy="the model's code may fix a size that follows the batch",
        )
    default_rtol, default_atol = TOLERANCES.get(tensor.dtype, (0.0, 0.0))
    rtol = default_rtol if rtol is None else rtol
    atol = default_atol if atol is None else atol
    both = expected.astype(np.float64), found.astype(np.float64)
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


def _publish(draft: Path, target: Path) -> int:
    """Move the finished file, its external data first, to its place; the bytes that it takes."""
    files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.replace(target.parent / file.name)
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user: failures raise all the same."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # torch.export prints the graph that it gave up on; the error raised says enough.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by its formula: no fused kernel has an ONNX form.

    nn.MultiheadAttention has an inference path of its own; and a graph that is captured with the
    strides of a fused kernel holds views that those of the formula do not allow.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
