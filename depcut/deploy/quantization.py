"""What can be chosen of an int8 file, what is said of it afterwards, and the rule between them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depcut.errors import ExportError, InputError
from depcut.support.checks import check_function, check_integer
from depcut.support.failures import first_line, shown

if TYPE_CHECKING:
    import onnx

Metric = Callable[[Any, Any], Any]

STATIC, DYNAMIC = "int8-static", "int8-dynamic"
SCHEMES: Mapping[str, str] = {
    "int8": f"{STATIC} where most layers are convolutions and there is data, else {DYNAMIC}",
    STATIC: "weights and activations, with ranges of activations from data",
    DYNAMIC: "weights and inputs of matrix products, with ranges taken anew at each call",
}

# Operators that multiply by weights, as the exporter writes them.
CONVOLUTIONS = ("Conv", "ConvTranspose")
LAYERS = (*CONVOLUTIONS, "Gemm", "MatMul", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Quantization:
    """What an int8 file is like.

    Attributes:
        scheme: "int8-static" or "int8-dynamic".
        why: Why this one.
        kernels: How many kernels of each int8 operator the runtime's own profile shows.
        float_kernels: The same for products that it still computes in floating point.
        batches: Batches of data that errors and metric are of; 0: the example inputs.
        max_abs_error: Largest difference from the float file, over all outputs.
        max_rel_error: The same divided by the largest magnitude of its output.
        rms_error: Root of the mean square of the difference, divided by that of the output; of the
            worst output.
        corrected: Whether biases took what rounding the weights added to the means.
        seven_bits: Whether weights use seven of the eight bits, for this processor's sums of
            products of bytes overflow otherwise.
        float_bytes: Size of the float file.
        metric: The metric on the data, of the float and of the int8 file, if one was given.
    """

    scheme: str
    why: str
    kernels: Mapping[str, int]
    float_kernels: Mapping[str, int]
    batches: int
    max_abs_error: float
    max_rel_error: float
    rms_error: float
    corrected: bool
    seven_bits: bool
    float_bytes: int
    metric: tuple[float, float] | None = None

    @property
    def share(self) -> float:
        """Share of the kernels that multiply matrices or convolve which do so in int8."""
        whole = sum(self.kernels.values())
        return whole / (whole + sum(self.float_kernels.values()))

    def __str__(self) -> str:
        named = ", ".join(f"{count} {name}" for name, count in self.kernels.items())
        left = ", ".join(f"{count} {name}" for name, count in self.float_kernels.items())
        data = f"{self.batches} batches of data" if self.batches else "the example inputs"
        lines = [
            f"  {self.scheme}: {self.why}",
            f"  int8 kernels in the runtime's profile: {named} ({self.share:.0%} of the products)"
            + (f"; in floating point: {left}" if left else ""),
            f"  against the float file ({self.float_bytes / 1e6:.2f} MB), on {data}: root mean "
            f"square error {self.rms_error:.1e}, largest {self.max_rel_error:.1e}"
            + (", biases corrected" if self.corrected else "")
            + (", weights of seven bits" if self.seven_bits else ""),
        ]
        if self.metric:
            lines.append("  metric: {:.6g} in float, {:.6g} in int8".format(*self.metric))
        return "\n".join(lines)


@dataclass(frozen=True)
class Request:
    """What a caller asks of an int8 file.

    Attributes:
        scheme: A key of `SCHEMES`.
        data: As a user passes it, or None.
        batches: How many items of it to read at most.
        metric: A function of (output, target), or None.
    """

    scheme: str
    data: Any
    batches: int
    metric: Metric | None


def checked_request(
    quantize: Any, data: Any, batches: int, metric: Metric | None
) -> Request | None:
    """What a caller asks for; None: no int8 file.

    Args:
        quantize: A key of `SCHEMES`, or None.
        data: Calibration data, or None.
        batches: How many items of it to read at most.
        metric: A function of (output, target), or None.

    Raises:
        InputError: There is no such scheme, or data is missing, or given for nothing.
        ExportError: onnxruntime's quantizer is not installed.
    """
    if quantize is None:
        for name, value in (("data", data), ("metric", metric)):
            if value is not None:
                raise InputError(
                    f"{name} is given, and nothing is quantized",
                    where=f"{name}=",
                    remedy='pass quantize="int8" too, or leave it out',
                )
        return None
    if not isinstance(quantize, str) or quantize not in SCHEMES:
        raise InputError(
            f"quantize is {shown(quantize)}",
            where="quantize=",
            remedy=f"use one of {', '.join(SCHEMES)}, or leave it out for floating point",
        )
    if data is None:
        lacking = [n for n in (STATIC,) if quantize == n] + ["metric"] * (metric is not None)
        if lacking:
            raise InputError(
                f"{lacking[0]} needs data, and there is none",
                where="data=",
                remedy="pass batches of what the model takes, such as a DataLoader"
                + (f', or quantize="{DYNAMIC}"' if quantize == STATIC else ""),
            )
    if metric is not None:
        check_function(metric, "metric", "pass a function of (output, target)")
    quantizer()
    return Request(quantize, data, check_integer(batches, "batches", 1), metric)


def quantizer() -> Any:
    """The module of onnxruntime's quantizer.

    Raises:
        ExportError: It cannot be imported.
    """
    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise ExportError(
            f"onnxruntime's quantizer cannot be imported: {first_line(error)}",
            where="quantize=",
            remedy="pip install onnxruntime, or leave quantize= out",
        ) from error
    return quantization


def check_weights(graph: onnx.GraphProto) -> None:
    """Refuse weights of another kind than float32.

    Args:
        graph: The float graph.

    Raises:
        ExportError: Names the kinds.
    """
    import onnx

    kinds = onnx.TensorProto.DataType
    found = {kinds.Name(tensor.data_type) for tensor in graph.initializer if len(tensor.dims) > 1}
    other = sorted(found & {"FLOAT16", "BFLOAT16", "DOUBLE"})
    if other:
        raise ExportError(
            f"the model's weights are {', '.join(other).lower()}, and int8 is made of float32",
            where="quantize=",
            remedy="export model.float()",
        )


def chosen_scheme(request: Request, graph: onnx.GraphProto) -> tuple[str, str]:
    """Which scheme a request comes to for a graph, and why.

    Args:
        request: What the caller asks for.
        graph: The float graph.

    Raises:
        ExportError: No layer of the graph multiplies by weights.
    """
    weights = {tensor.name for tensor in graph.initializer}
    layers = [
        node.op_type
        for node in graph.node
        if node.op_type in LAYERS and any(name in weights for name in node.input)
    ]
    if not layers:
        raise ExportError(
            "no layer of the model multiplies by weights: there is nothing to quantize",
            where="quantize=",
            remedy="leave quantize= out",
        )
    if request.scheme != "int8":
        return request.scheme, "as asked for"
    convolutions = sum(kind in CONVOLUTIONS for kind in layers)
    counted = f"{convolutions} of {len(layers)} layers are convolutions"
    if 2 * convolutions <= len(layers):
        return DYNAMIC, counted
    if request.data is None:
        return DYNAMIC, f"{counted}, but there is no data to take ranges from"
    return STATIC, f"{counted}, and there is data to take ranges from"


def needs_seven_bits() -> bool:
    """Whether sums of products of bytes overflow on this processor unless weights have seven bits.

    onnxruntime multiplies unsigned by signed bytes; x86 adds pairs of these products in 16 bits
    unless it has VNNI.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "darwin":
        return False
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return "vnni" not in line
    return False
