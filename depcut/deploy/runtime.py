"""What export and timing share: a model's arguments in order, onnxruntime sessions, their feeds."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from depcut.capture.inputs import (
    arguments,
    device_of,
    infer_inputs,
    only_call,
    refuse_without_values,
    with_settings,
)
from depcut.capture.refusals import check_module, signature_of
from depcut.errors import ExportError, InputError
from depcut.support.failures import first_line
from depcut.support.torch_private import pytree

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array: TypeAlias = "np.ndarray[Any, Any]"

_NO_KERNEL = re.compile(
    r"Could not find an implementation for (\w+)\((\d+)\) node with name '(.*?)'"
)


def bind_inputs(model: nn.Module, inputs: Any) -> inspect.BoundArguments:
    """The model's arguments in the order of its signature, whatever form they were given in.

    Args:
        model: The model whose forward takes them.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; None infers them.

    Returns:
        The arguments, bound to their names.

    Raises:
        InputError: The kind of `inputs` is none of these, forward does not take them, or they
            cannot be inferred.
    """
    model = check_module(model)
    args, kwargs = arguments(infer_inputs(model) if inputs is None else only_call(inputs))
    args, kwargs = with_settings(model, args, kwargs)
    refuse_without_values((args, kwargs), device_of(model))
    signature = signature_of(model)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit forward: {error}",
            where=f"{type(model).__name__}.forward{signature}",
            remedy="pass what a call of the model takes",
        ) from error


def open_session(
    path: str | os.PathLike[str],
    threads: int = 1,
    *,
    profile: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> InferenceSession:
    """An onnxruntime session with all optimisations and a stated number of threads.

    Args:
        path: The ONNX file.
        threads: Threads that one operator may use.
        profile: Where the session writes its profile, as the beginning of a file name; None: it
            takes none.
        providers: Execution providers; each node goes to the first that has a kernel for it.

    Returns:
        The session.

    Raises:
        ExportError: The runtime does not load the file.
    """
    import onnxruntime as ort
    from onnxruntime import InferenceSession

    options = ort.SessionOptions()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle workers that spin would take the cores from the other sessions of a comparison.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return InferenceSession(os.fspath(path), options, providers=list(providers))
    except Exception as error:
        missing = _NO_KERNEL.search(str(error))
        if missing:
            operator, version, node = missing.groups()
            raise ExportError(
                f"onnxruntime {ort.__version__} has no kernel for {operator} (opset {version}) in "
                f"the data type that it has here; the file computes in {_float_types(path)}",
                where=f"{Path(path).name}, node {node!r}",
                remedy="export model.float(); a lower opset= may have the kernel, too",
            ) from error
        raise ExportError(
            f"onnxruntime {ort.__version__} does not load the file: {first_line(error)}",
            where=Path(path).name,
            remedy="if the data type is the reason, export model.float()",
        ) from error


def _float_types(path: str | os.PathLike[str]) -> str:
    """The kinds of real numbers among a file's inputs and weights."""
    import onnx

    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in graph.input}
    names = sorted(onnx.TensorProto.DataType.Name(kind).lower() for kind in types)
    return ", ".join(name for name in names if "float" in name or name == "double") or "integers"


def session_feeds(session: InferenceSession, values: Mapping[str, Any]) -> dict[str, Array]:
    """The runtime's input dictionary for a model's arguments; see `session_tensors`.

    Args:
        session: The session to feed.
        values: Arguments by name.

    Returns:
        Arrays by input name.

    Raises:
        ExportError: The graph takes another number of tensors, or NumPy has no such data type.
        InputError: A tensor has no values.
    """
    return {name: as_array(value) for name, value in session_tensors(session, values).items()}


def session_tensors(session: InferenceSession, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a model's arguments by the names of the graph's inputs.

    Args:
        session: The session to feed.
        values: Arguments by name. Where the names are not the graph's (nested arguments have other
            ones there), their order counts; what is no tensor is part of the graph and left out.

    Returns:
        Tensors by input name.

    Raises:
        ExportError: The graph takes another number of tensors.
    """
    return named_tensors([entry.name for entry in session.get_inputs()], values)


def named_tensors(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a model's arguments by the names of a graph's inputs.

    Args:
        names: Of the inputs, in the order of the graph.
        values: As `session_tensors` takes them.

    Returns:
        Tensors by input name.

    Raises:
        ExportError: The graph takes another number of tensors.
    """
    if set(names) <= {name for name, value in values.items() if isinstance(value, Tensor)}:
        return {name: values[name] for name in names}
    tensors = [leaf for leaf in pytree.tree_leaves(dict(values)) if isinstance(leaf, Tensor)]
    if len(names) != len(tensors):
        raise ExportError(
            f"the graph takes {len(names)} tensors ({', '.join(names)}), not {len(tensors)}",
            remedy="pass the inputs that the file was exported with",
        )
    return dict(zip(names, tensors, strict=True))


def batch_size(arguments: inspect.BoundArguments) -> int:
    """Dimension 0 of the first tensor of two dimensions or more, else of the first vector.

    Args:
        arguments: What `bind_inputs` returned.

    Returns:
        The batch size.

    Raises:
        InputError: No argument is a tensor with a dimension.
    """
    leaves = pytree.tree_leaves(dict(arguments.arguments))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors:
        raise InputError("no tensor among the inputs", remedy="pass the tensors forward works on")
    # A vector of one number may belong to the whole call (the time of a diffusion step).
    return int(next((t for t in tensors if t.dim() > 1), tensors[0]).shape[0])


def single(model: nn.Module, given: Any) -> dict[str, Any] | tuple[Any, ...]:
    """Inputs of one call at a batch size of one.

    Args:
        model: The model; its signature is read.
        given: A tuple of positional or a dict of keyword arguments.
    """
    one = resized(bind_inputs(model, given), 1)
    return dict(one.arguments) if one.kwargs else tuple(one.args)


def resized(arguments: inspect.BoundArguments, batch: int) -> inspect.BoundArguments:
    """The same arguments at another batch size: rows repeated, in reverse order.

    Args:
        arguments: What `bind_inputs` returned.
        batch: The batch size to come to. Tensors whose dimension 0 is not the batch stay.

    Returns:
        New arguments; the given ones are left alone.
    """
    present = batch_size(arguments)

    def resize(leaf: Any) -> Any:
        if batch == present or not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.shape[0] != present:
            return leaf
        rows = torch.arange(batch - 1, -1, -1, device=leaf.device) % present
        return leaf.index_select(0, rows)

    values = pytree.tree_map(resize, dict(arguments.arguments))
    return inspect.BoundArguments(arguments.signature, values)


def as_array(tensor: Tensor) -> Array:
    """The tensor's values as the runtime takes them.

    Args:
        tensor: Any tensor, on any device.

    Returns:
        Its values in NumPy.

    Raises:
        ExportError: NumPy and the runtime have no such data type.
    """
    if tensor.dtype == torch.bfloat16:
        raise ExportError(
            "NumPy has no bfloat16, and onnxruntime's CPU provider hardly a kernel for it",
            remedy="use model.float() or model.half()",
        )
    try:
        values: Array = tensor.detach().cpu().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"NumPy cannot hold an input: {first_line(error)}",
            where="inputs=",
            remedy="pass dense tensors with values",
        ) from error
    return values
