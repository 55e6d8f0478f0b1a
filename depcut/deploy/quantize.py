"""From a float ONNX file to one that computes in int8, by onnxruntime's own quantizer."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.process_state import as_captured
from depcut.deploy import bias_correction
from depcut.deploy.convert import write_graph
from depcut.deploy.feeds import Fed, fed
from depcut.deploy.int8_check import distance, kernels, metric_of
from depcut.deploy.quantization import (
    STATIC,
    Quantization,
    Request,
    check_weights,
    chosen_scheme,
    needs_seven_bits,
    quantizer,
)
from depcut.deploy.runtime import Array, open_session, session_feeds
from depcut.errors import DepcutError, ExportError
from depcut.support import files
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

# Operators that onnxruntime's CPU kernels compute in int8, or that only move what they get; ranges
# around any other would round its values and gain nothing.
_STATIC = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm",
    "GlobalAveragePool", "LeakyRelu", "MatMul", "MaxPool", "Mul", "Relu", "Reshape", "Resize",
    "Sigmoid", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
# The quantizer takes its Attention for that of onnxruntime, which is another operator.
_DYNAMIC = ("Conv", "Gather", "LSTM", "MatMul")


def quantize_file(
    model: nn.Module,
    file: Path,
    session: InferenceSession,
    arguments: Sequence[inspect.BoundArguments],
    request: Request,
) -> Quantization:
    """Replace a float file, alone in its folder but for its weights, by one that computes in int8.

    Args:
        model: What the file was made from.
        file: The float file.
        session: It, loaded.
        arguments: Example arguments, at each batch size that the file is to take.
        request: What the caller asks for.

    Returns:
        What the new file is like.

    Raises:
        ExportError: The quantizer fails, or what it makes does not run or does not compute in
            int8. The float file is still there then.
        InputError: The data does not fit.
    """
    import onnx

    feeds = [session_feeds(session, one.arguments) for one in arguments]
    examples = [Fed(one, tuple(session.run(None, dict(one)))) for one in feeds]
    data = fed(model, session, request.data, request.batches) if request.data is not None else []
    original = onnx.load(str(file), load_external_data=False)
    check_weights(original.graph)
    stored = [one for one in file.parent.iterdir() if one.is_file()]
    large = len(stored) > 1  # the weights lie beside the graph
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        folder = Path(name)
        prepared, graph = _prepared(file, folder, large=large)
        scheme, why = chosen_scheme(request, graph.graph)
        if scheme == STATIC:
            result, fixed = _static(prepared, graph, folder, data, large=large)
        else:
            result, fixed = _dynamic(prepared, folder, large=large), False
        final = folder / "final" / file.name
        final.parent.mkdir()
        notes = {entry.key: entry.value for entry in original.metadata_props}
        write_graph(result, final, {**notes, "depcut_quantization": scheme})
        with _quantizing():
            onnx.checker.check_model(str(final))
        made = open_session(final)
        distance(made, examples)  # shapes, and finite values, at every batch size
        found = distance(made, data or examples)
        in_int8, in_float = kernels(final, examples[0].feeds)
        metric = _metrics(model, arguments[0], request, (session, made), data)
        del made  # some systems cannot rename a file that is mapped
        float_bytes = sum(one.stat().st_size for one in stored)
        _replace(file, stored, final)
    return Quantization(
        scheme=scheme,
        why=why,
        kernels=in_int8,
        float_kernels=in_float,
        batches=len(data),
        max_abs_error=found.max_abs_error,
        max_rel_error=found.max_rel_error,
        rms_error=found.rms_error,
        corrected=fixed,
        seven_bits=needs_seven_bits(),
        float_bytes=float_bytes,
        metric=metric,
    )


def _replace(file: Path, stored: Sequence[Path], final: Path) -> None:
    """Put a finished file, and the weights beside it, in the place of another."""
    for old in stored:
        old.unlink()
    for new in final.parent.iterdir():
        if not new.name.startswith("profile"):
            files.move(new, file.parent / new.name)


def _prepared(file: Path, folder: Path, *, large: bool) -> tuple[Path, onnx.ModelProto]:
    """The file with constants folded, shapes inferred and a bias in every convolution."""
    import onnx

    path = folder / "prepared.onnx"
    with _quantizing():
        quantizer().quant_pre_process(
            str(file),
            str(path),
            skip_optimization=large,  # it would need the whole graph in one protobuf
            skip_symbolic_shape=True,
            save_as_external_data=large,
        )
        model = onnx.load(str(path))
        bias_correction.with_biases(model)
        if not large:
            onnx.save(model, str(path))
    return path, model


def _static(
    prepared: Path, model: onnx.ModelProto, folder: Path, data: Sequence[Fed], *, large: bool
) -> tuple[Path, bool]:
    """The int8 graph with ranges from data; biases are corrected where that brings it nearer."""
    import onnx

    plain, better = folder / "static.onnx", folder / "corrected.onnx"
    module = quantizer()
    with _quantizing():
        module.quantize_static(
            str(prepared),
            str(plain),
            _Batches(data),
            quant_format=module.QuantFormat.QDQ,
            op_types_to_quantize=list(_STATIC),
            per_channel=True,
            reduce_range=needs_seven_bits(),
            activation_type=module.QuantType.QUInt8,
            weight_type=module.QuantType.QInt8,
            use_external_data_format=large,
        )
        rounded = onnx.load(str(plain))
        feeds = [batch.feeds for batch in data]
        if not bias_correction.corrected(model, rounded, feeds, folder):
            return plain, False
        onnx.save(rounded, str(better))
    errors = [_rms(path, data) for path in (plain, better)]
    return (better, True) if errors[1] < errors[0] else (plain, False)


def _rms(path: Path, data: Sequence[Fed]) -> float:
    return distance(open_session(path), data).rms_error


def _dynamic(prepared: Path, folder: Path, *, large: bool) -> Path:
    """The int8 graph that takes the ranges of its activations anew at each call."""
    result = folder / "dynamic.onnx"
    module = quantizer()
    with _quantizing():
        module.quantize_dynamic(
            str(prepared),
            str(result),
            op_types_to_quantize=list(_DYNAMIC),
            per_channel=True,
            reduce_range=needs_seven_bits(),
            weight_type=module.QuantType.QInt8,
            use_external_data_format=large,
        )
    return result


class _Batches:
    """What the quantizer reads its ranges from.

    Args:
        data: Batches.
    """

    def __init__(self, data: Sequence[Fed]) -> None:
        self._left = iter(data)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch; None after the last."""
        batch = next(self._left, None)
        return None if batch is None else dict(batch.feeds)


@contextmanager
def _quantizing() -> Iterator[None]:
    """Other people's code: it leaves logging as it is, and its errors become one that names it.

    Where the root logger has no handler, the first message that goes to it would install one.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"onnxruntime's quantizer fails: {first_line(error)}",
            where="quantize=",
            remedy="leave quantize= out, or choose the other scheme; it takes float32 models",
        ) from error
    finally:
        root.removeHandler(silent)


def _metrics(
    model: nn.Module,
    arguments: inspect.BoundArguments,
    request: Request,
    sessions: tuple[InferenceSession, InferenceSession],
    data: Sequence[Fed],
) -> tuple[float, float] | None:
    """The metric of the float and of the int8 file."""
    if request.metric is None:
        return None
    structure = _structure(model, arguments)
    before, after = (metric_of(request.metric, s, data, structure) for s in sessions)
    return before, after


def _structure(
    model: nn.Module, arguments: inspect.BoundArguments
) -> Callable[[list[Tensor]], Any]:
    """Makes what the model returns of the tensors in it; a list where it is of no known form."""
    args, kwargs = cloned_arguments((arguments.args, arguments.kwargs))
    with torch.no_grad(), as_captured():
        leaves, spec = pytree.tree_flatten(clone(model, buffers=True)(*args, **kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def build(tensors: list[Tensor]) -> Any:
        if len(tensors) != len(places):
            return tensors
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return pytree.tree_unflatten(filled, spec)

    return build
