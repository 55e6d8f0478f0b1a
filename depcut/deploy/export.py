"""ONNX files that are checked before they appear: the format, the runtime, two batch sizes."""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from depcut.calibration.data import BATCHES, Calibration, Data, read_with_inputs
from depcut.calibration.self_made import Auto, given_data
from depcut.capture.plain import check_whole
from depcut.capture.random_state import preserved
from depcut.deploy.convert import OLDER_OPSET, draft
from depcut.deploy.feeds import call_of, made_data
from depcut.deploy.output_check import TOLERANCES, compare_outputs
from depcut.deploy.publish import publish
from depcut.deploy.quantization import (
    DYNAMIC,
    STATIC,
    Metric,
    Quantization,
    Request,
    checked_request,
)
from depcut.deploy.quantize import quantize_file
from depcut.deploy.runtime import batch_size, open_session, resized
from depcut.errors import ExportError
from depcut.support import files
from depcut.support.checks import check_number, check_path
from depcut.support.failures import first_line

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

__all__ = ["TOLERANCES", "ExportReport", "draft", "export"]

_COARSE = 0.1  # root mean square error of an int8 file, by its outputs', that is warned of


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
        quantization: What the int8 file is like, if one was asked for; the errors above are then of
            the float file that it was made from.
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
    quantization: Quantization | None = None

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batch_sizes))
        batch = "any batch size" if len(self.batch_sizes) > 1 else "this batch size only"
        which = "agrees" if self.quantization is None else "the float file agrees"
        line = (
            f"{self.path}: {self.bytes / 1e6:.2f} MB, opset {self.opset}, {batch}; "
            f"{which} with PyTorch at batch {sizes} "
            f"(largest error {self.max_abs_error:.1e}, relative {self.max_rel_error:.1e})"
        )
        return line if self.quantization is None else f"{line}\n{self.quantization}"


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int | None = None,
    quantize: str | None = None,
    data: Data | Calibration | Auto | None = None,
    batches: int = BATCHES,
    metric: Metric | None = None,
) -> ExportReport:
    """Write `model` in evaluation mode as an ONNX file, checked in onnxruntime against PyTorch.

    The file appears under `path` only after it passed `onnx.checker` and agreed with PyTorch in
    onnxruntime at two batch sizes. Weights that exceed 2 GB go into a file beside it, whose name
    begins with the file's; an older one goes once nothing refers to it. The metadata tell depcut's
    version and, for a model that a plan made, the plan's digest, its ratio and of what.

    The operator set is 23, the newest that torch 2.13 has translations of its own for: attention
    and RMS norms are one operator each in it. 24 and 25 only renumber operators, and split RMS
    norms up again. The runtime has no kernels for random numbers above 21; a file that it does not
    load is written anew with opset 20.

    An int8 file is made from the float one that passed these checks, by onnxruntime's quantizer,
    and stands in its place only if the runtime's profile shows int8 kernels. Of "int8-static",
    weights (by channel) and activations are in int8, with ranges from the data, and biases make up
    for what rounding the weights adds to the means (Nagel et al., Data-Free Quantization, ICCV
    2019), if that brings the outputs on the data nearer; of "int8-dynamic", weights and what
    matrix products read, with ranges taken anew at each call. "int8" is the first where more than
    half of the layers are convolutions and there is data, else the second.

    Args:
        model: The model; it is only read.
        path: The file to write, in an existing folder.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; when left out, the
            first item of the data, or inferred from the first layer. Dimension 0 of the tensors is
            the batch.
        rtol: Error allowed relative to an output's largest magnitude; by default 1e-4 in float32,
            2e-2 in float16, 5e-2 in bfloat16 and 1e-6 in float64.
        atol: Error allowed on top of that; by default 1e-5, 1e-3, 1e-2 and 1e-8.
        metadata: Further entries for the file's metadata; they go before depcut's own.
        opset: Version of the operator set, from 18 to 25; left out, 23, or 20 if only that loads.
        quantize: "int8", "int8-static" or "int8-dynamic"; left out, the file stays in floating
            point.
        data: Of an int8 file, calibration data: any iterable of what the model takes, or of (input,
            target) pairs; "auto": inputs are made from what a trained model knows of them. Errors
            are reported on it; without, on the example inputs.
        batches: How many items of the data to read at most.
        metric: A function of (output, target) that returns the mean over the batch, to be reported
            on the data for the float and the int8 file.

    Returns:
        What was written and how closely it agrees.

    Raises:
        ExportError: The model cannot be captured or converted, the file is not valid ONNX, the
            runtime lacks a kernel for it (for bfloat16 it nearly always does), or it disagrees
            with PyTorch; or no kernel of the int8 file computes in int8. Nothing has been written
            then.
        InputError: `inputs` or the data does not fit the model's forward, or an option is wrong.
    """
    model = check_whole(model)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            check_number(value, name, "pass a number that is not negative", least=0)
    started = time.perf_counter()
    request = checked_request(quantize, data, batches, metric)
    path = _checked_name(path)
    request, inputs = _with_data(model, inputs, request)
    with files.workplace(path, "ONNX file", ExportError) as (target, folder), preserved():
        file = folder / target.name
        arguments, proto, session = _loaded(model, inputs, file, metadata, opset)
        sizes = _batch_sizes(proto, arguments)
        errors = [
            compare_outputs(model, session, arguments, size, rtol=rtol, atol=atol) for size in sizes
        ]
        quantization = None
        if request is not None:
            examples = [resized(arguments, size) for size in sizes]
            quantization = quantize_file(model, file, session, examples, request)
        _check_link(path, target, folder)
        del session  # some systems cannot rename a file that is mapped
        written = publish(file, target)
    if quantization is not None and quantization.rms_error > _COARSE:
        warnings.warn(_coarse(quantization), stacklevel=2)
    return ExportReport(
        path=path,
        bytes=written,
        opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
        inputs=tuple(entry.name for entry in proto.graph.input),
        outputs=tuple(entry.name for entry in proto.graph.output),
        batch_sizes=sizes,
        max_abs_error=max(absolute for absolute, _ in errors),
        max_rel_error=max(relative for _, relative in errors),
        seconds=time.perf_counter() - started,
        quantization=quantization,
    )


def _coarse(made: Quantization) -> str:
    """What is said of an int8 file that is far from the float one."""
    data = f"{made.batches} batches of data" if made.batches else "the example inputs"
    advice = (
        f'more data, or quantize="{DYNAMIC}", which takes ranges at each call, may do better'
        if made.scheme == STATIC
        else "what its layers read spreads too widely for bytes"
    )
    return (
        f"int8 outputs are off by {made.rms_error:.0%} (root mean square, on {data}); measure the "
        f"file with metric= before you serve it: {advice}"
    )


def _with_data(
    model: nn.Module, inputs: Any, request: Request | None
) -> tuple[Request | None, Any]:
    """The request with its data read, and example inputs: as given, else of the first item."""
    if request is None or request.data is None:
        return request, inputs
    if given_data(request.data) is None:
        request = replace(request, data=made_data(model, inputs))
    if isinstance(request.data, Calibration):
        return request, call_of(model, request.data, 0) if inputs is None else inputs
    items, inputs = read_with_inputs(request.data, request.batches, inputs, model, pairs=False)
    return replace(request, data=items), inputs


def _checked_name(path: str | os.PathLike[str]) -> Path:
    """The path, refused where onnx cannot name it: it takes UTF-8 alone."""
    name = check_path(path, "path", ExportError)
    try:
        str(name.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ExportError(
            "the ONNX file cannot be written: its path is no valid UTF-8",
            where=ascii(str(name)),
            remedy="export to another folder, and move the file from there",
        ) from error
    return name


def _loaded(
    model: nn.Module,
    inputs: Any,
    file: Path,
    metadata: Mapping[str, str] | None,
    opset: int | None,
) -> tuple[inspect.BoundArguments, onnx.ModelProto, InferenceSession]:
    """The arguments of a draft that the runtime loads, its graph without weights, and its session.

    Where the caller leaves the operator set open, the older one is tried, too.
    """
    refusals: list[ExportError] = []
    for version in (None, OLDER_OPSET) if opset is None else (opset,):
        for refused in file.parent.iterdir():
            refused.unlink()
        arguments = draft(model, inputs, file, metadata, opset=version)
        proto = _checked(file)
        try:
            return arguments, proto, open_session(file)
        except ExportError as error:
            refusals.append(error)
    raise refusals[0]


def _checked(path: Path) -> onnx.ModelProto:
    """The file's graph without its weights, after onnx.checker accepted it."""
    import onnx

    try:
        onnx.checker.check_model(str(path))  # by path: the only way that takes more than 2 GB
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"onnx.checker refuses the file: {first_line(error)}",
            where=path.name,
            remedy="this is an error of the exporter; please report it with the model",
        ) from error
    return onnx.load(str(path), load_external_data=False)


def _check_link(path: Path, target: Path, folder: Path) -> None:
    """Refuse a link to another folder where weights lie beside the graph: no runtime finds them."""
    beside = any(file.name != target.name for file in folder.iterdir())
    if beside and path.parent.resolve() != target.parent.resolve():
        raise ExportError(
            "weights of more than 2 GB lie beside their graph, and are not found through a link",
            where=str(path),
            remedy=f"export to {target}",
        )


def _batch_sizes(proto: onnx.ModelProto, arguments: inspect.BoundArguments) -> tuple[int, ...]:
    """Batch sizes at which to compare: two of them unless the graph fixes one."""
    batch = batch_size(arguments)
    leading = [value.type.tensor_type.shape.dim[:1] for value in proto.graph.input]
    is_free = any(dims and dims[0].dim_param for dims in leading)
    return (batch, batch + 1) if is_free else (batch,)
