"""Biases of an int8 graph that make up for what rounding the weights adds to the means.

A weight that is rounded changes the mean of a layer's outputs by its error times the mean of its
inputs; the bias takes that off. The mean is measured: the float graph gets a copy of each layer
whose weight is the rounding error, so that padding, strides and groups are the layer's own.

Source: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from depcut.deploy.runtime import Array, open_session

if TYPE_CHECKING:
    import onnx

# Operators with a bias of their own, and whether their channels are the second dimension.
_BIASED = {"Conv": True, "Gemm": False}
_MARK = "depcut_rounding_"


def with_biases(model: onnx.ModelProto) -> None:
    """Give layers without a bias one of zeros, in place: what is to be corrected must be there.

    Args:
        model: A float graph.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None and len(node.input) == 2:
            name = f"{_MARK}{node.name}_bias"
            zeros = np.zeros(weight.dims[0], numpy_helper.to_array(weight).dtype)
            model.graph.initializer.append(numpy_helper.from_array(zeros, name))
            node.input.append(name)


def corrected(
    model: onnx.ModelProto,
    rounded: onnx.ModelProto,
    batches: Sequence[Mapping[str, Array]],
    folder: Path,
) -> bool:
    """Correct the biases of an int8 graph in place.

    Args:
        model: The float graph that it was made from; it is not changed.
        rounded: The int8 graph, with its weights and biases behind DequantizeLinear.
        batches: What to measure the means on: arrays by the names of the inputs.
        folder: For a file that is removed with it.

    Returns:
        Whether there was a bias to correct.
    """
    from onnx import numpy_helper

    layers = _layers(model, rounded)
    if not layers:
        return False
    means = _means(model, layers, batches, folder)
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    for name, (_, bias, scale) in layers.items():
        steps = means[name] / numpy_helper.to_array(tensors[scale])
        held = numpy_helper.to_array(tensors[bias])
        limits = np.iinfo(held.dtype)
        moved = np.clip(held - np.rint(steps), limits.min, limits.max).astype(held.dtype)
        tensors[bias].CopyFrom(numpy_helper.from_array(moved, bias))
    return True


def _layers(model: onnx.ModelProto, rounded: onnx.ModelProto) -> dict[str, tuple[Array, str, str]]:
    """Rounding error of the weight, integer bias and its scale, by the name of the node."""
    from onnx import numpy_helper

    exact = {tensor.name: tensor for tensor in model.graph.initializer}
    named = {node.name: node for node in model.graph.node if node.op_type in _BIASED}
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    made_by: dict[str, onnx.NodeProto] = {node.output[0]: node for node in rounded.graph.node}
    layers = {}
    for node in rounded.graph.node:
        float_node = named.get(node.name)
        if float_node is None or len(node.input) < 3 or float_node.input[1] not in exact:
            continue
        weight, bias = made_by.get(node.input[1]), made_by.get(node.input[2])
        if weight is None or bias is None:
            continue
        if not _is_stored(weight, tensors) or not _is_stored(bias, tensors):
            continue
        error = _value(weight, tensors) - numpy_helper.to_array(exact[float_node.input[1]])
        layers[node.name] = (error, bias.input[0], bias.input[1])
    used = [name for node in rounded.graph.node for name in node.input]
    return {n: layer for n, layer in layers.items() if used.count(layer[1]) == 1}


def _is_stored(node: onnx.NodeProto, tensors: Mapping[str, Any]) -> bool:
    """Whether a node only turns stored integers into real numbers."""
    return node.op_type == "DequantizeLinear" and all(name in tensors for name in node.input)


def _value(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> Array:
    """The real numbers that a DequantizeLinear makes of what is stored."""
    from onnx import numpy_helper

    stored, scale, *zero = (numpy_helper.to_array(tensors[name]) for name in node.input)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * stored.ndim
    if scale.size > 1:
        shape[axis] = -1
    shift = zero[0].astype(np.float64).reshape(shape) if zero else 0.0
    value: Array = (stored.astype(np.float64) - shift) * scale.astype(np.float64).reshape(shape)
    return value.astype(np.float32)


def _means(
    model: onnx.ModelProto,
    layers: Mapping[str, tuple[Array, str, str]],
    batches: Iterable[Mapping[str, Array]],
    folder: Path,
) -> dict[str, Array]:
    """What the rounding errors alone compute of the layers' float inputs: the mean by channel."""
    import onnx

    measured = onnx.ModelProto()
    measured.CopyFrom(model)
    del measured.graph.output[:]
    for node in [node for node in measured.graph.node if node.name in layers]:
        _measure(measured.graph, node, layers[node.name][0])
    path = folder / "rounding.onnx"
    onnx.save(measured, str(path))
    session = open_session(path)
    names = [entry.name for entry in session.get_outputs()]
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    rows = 0
    for feeds in batches:
        count = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
        for name, mean in zip(names, session.run(None, dict(feeds)), strict=True):
            sums[name] = sums[name] + count * mean.astype(np.float64)
        rows += count
    return {name.removeprefix(_MARK): total / rows for name, total in sums.items()}


def _measure(graph: onnx.GraphProto, node: onnx.NodeProto, error: Array) -> None:
    """Add a copy of a layer with the rounding error as its weight, and the mean of its result."""
    from onnx import TensorProto, helper, numpy_helper

    name = f"{_MARK}{node.name}"
    axes = [0, *range(2, error.ndim)] if _BIASED[node.op_type] else [0]
    copy = helper.make_node(
        node.op_type, [node.input[0], f"{name}_weight"], [f"{name}_result"], f"{name}_copy"
    )
    copy.attribute.extend(node.attribute)
    mean = helper.make_node("ReduceMean", [copy.output[0], f"{name}_axes"], [name], keepdims=0)
    graph.initializer.extend(
        [
            numpy_helper.from_array(error, f"{name}_weight"),
            numpy_helper.from_array(np.array(axes, np.int64), f"{name}_axes"),
        ]
    )
    graph.node.extend([copy, mean])
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]))
