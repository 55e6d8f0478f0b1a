"""From a model to an ONNX file: capture with a free batch size, conversion, metadata, weights."""

from __future__ import annotations

import contextlib
import inspect
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depcut.apply.report import lineage_of
from depcut.capture.batches import Batch, dynamic_shapes, widened
from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.eager import refuse_failing_call
from depcut.capture.process_state import converting
from depcut.capture.results import EVERY, Viewer
from depcut.capture.signature import name_keywords
from depcut.deploy.runtime import batch_size, bind_inputs
from depcut.deploy.translations import translating
from depcut.errors import ExportError, InputError
from depcut.support.checks import check_integer
from depcut.support.failures import first_line, reraise_fatal, shown
from depcut.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

# The newest operator set that the exporter translates to; see `depcut.export`.
OPSET = 23
# The one before: some kernels of onnxruntime stop short of operators that are newer than 21.
OLDER_OPSET = 20
# What onnxscript converts between: the exporter writes none below, and renumbers above OPSET.
OPSETS = range(18, 26)

# Protobuf stops at 2 GiB; the graph itself and its names need some of that.
_EXTERNAL_DATA_FROM = 2**31 - 2**26

# The exporter's notes quote source lines and the paths of the machine, up to a tenth of a file.
_NOTES = ("pkg.", "namespace")
_KEPT_NOTE = "pkg.torch.onnx.name_scopes"


def draft(
    model: nn.Module,
    inputs: Any,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    opset: int | None = None,
    free_batch: bool = True,
) -> inspect.BoundArguments:
    """Write `model` in evaluation mode as ONNX, unchecked, and in place of what is there.

    This is `depcut.export` without its checks, for files that are only timed or inspected. A free
    batch size makes the captured graph symbolic, which takes longer to decompose.

    Args:
        model: The model; it is only read.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; None infers them.
        path: The file to write.
        metadata: Entries for the file's metadata, beside depcut's version and the plan's digest and
            request.
        opset: Version of the operator set; None: the newest that the exporter translates to.
        free_batch: Whether the file takes any batch size, or the one of `inputs` only, which is
            converted faster.

    Returns:
        The arguments that the model was captured with: two rows at least where the batch is free.

    Raises:
        ExportError: The model cannot be captured or converted, or the file not be written.
        InputError: `inputs` does not fit the model's forward, or an option is wrong.
    """
    version, entries = _checked_opset(opset), _checked_metadata(metadata)
    arguments = bind_inputs(model, inputs)
    with converting():
        try:
            arguments, program = captured(model, arguments, free_batch=free_batch)
        except ExportError:
            refuse_failing_call(model, ("inputs=", arguments.args, arguments.kwargs))
            raise
        lineage = {"depcut_version": __version__, **lineage_of(model)}
        _convert(program, Path(path), {**lineage, **entries}, version)
    return arguments


def _checked_opset(opset: int | None) -> int:
    """The operator set to write."""
    if opset is None:
        return OPSET
    return check_integer(
        opset,
        "opset",
        OPSETS[0],
        OPSETS[-1],
        what=f"opset={shown(opset)} cannot be written",
        remedy=f"pass an integer from {OPSETS[0]} to {OPSETS[-1]}, or leave it out for {OPSET}",
    )


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """The user's entries, all of them texts."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InputError(
            f"metadata is a {type(metadata).__name__}",
            where="metadata=",
            remedy="pass texts by name, such as {'author': 'me'}",
        )
    entries = dict(metadata or {})
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(
                f"the entry {shown(key)}: {shown(value)} is no pair of texts",
                where="metadata=",
                remedy="ONNX holds texts only: pass str(value)",
            )
    return entries


def captured(
    model: nn.Module, arguments: inspect.BoundArguments, *, free_batch: bool = True
) -> tuple[inspect.BoundArguments, torch.export.ExportedProgram]:
    """The exported program of a model in evaluation mode, and the arguments it was made with.

    Args:
        model: The model; it is only read.
        arguments: What `bind_inputs` returned.
        free_batch: Whether dimension 0 is free, where the model's code allows that.

    Raises:
        ExportError: torch.export cannot capture the model.
    """
    args, kwargs = widened(model, arguments.args, arguments.kwargs)
    wide = arguments.signature.bind(*args, **kwargs)
    if free_batch and batch_size(wide) > batch_size(arguments):
        # torch.export takes a dimension of one for a constant.
        with contextlib.suppress(ExportError):
            return captured(model, wide)
    # Kernels are chosen by what is to be differentiated: here and in the conversion, nothing.
    seen = clone(model, requires_grad=False)
    args, kwargs = cloned_arguments((arguments.args, arguments.kwargs))
    Viewer(seen, EVERY)
    name_keywords(seen, kwargs)
    shapes = dynamic_shapes(seen, args, kwargs, Batch.FREE if free_batch else Batch.FIXED)
    try:
        with torch.no_grad():
            program = torch.export.export(seen, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"torch.export cannot capture the model: {first_line(error)}",
            where=type(model).__name__,
            remedy="its forward must not branch on the values of tensors; see the chained error",
        ) from error
    return arguments, program


def _convert(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str], opset: int
) -> None:
    """Write the program as ONNX to `path`, with its metadata."""
    try:
        with translating():
            converted = torch.onnx.export(
                program, dynamo=True, optimize=True, verbose=False, opset_version=opset
            )
        if converted is None:
            raise ExportError("torch.onnx.export returned nothing", where=path.name)
        model = converted.model
        written = model.opset_imports.get("")
        if written != opset:
            raise ExportError(
                f"the model cannot be converted to opset {opset}; the exporter stays at {written}",
                where="opset=",
                remedy=f"leave it out for {OPSET}, or pass {written}",
            )
        _strip_notes(model)
        model.metadata_props.update(metadata)
        _settle_sizes([*model.graph.inputs, *model.graph.outputs])
        _save(model, path)
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(
            f"the file cannot be written: {error}",
            where=path.name,
            remedy="free some space, or choose a folder that can be written to",
        ) from error
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"torch.onnx cannot convert the model: {first_line(_innermost(error))}",
            where=path.name,
            remedy="the chained error names the operator; replace it or update onnxscript",
        ) from error


def write_graph(source: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph anew, with weights beside it where they are large, and with other metadata.

    Args:
        source: A file of ONNX.
        path: The file to write.
        metadata: All entries that it is to have.
    """
    import onnx_ir as ir

    model = ir.load(source)
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    _save(model, path)


def _save(model: ir.Model, path: Path) -> None:
    """Write a graph, with weights beside it where they are large."""
    import onnx_ir as ir

    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    ir.save(model, path, external_data=_data_name(path) if weights > _EXTERNAL_DATA_FROM else None)


def _data_name(path: Path) -> str:
    """A name for the weights beside a graph that no earlier graph refers to."""
    return f"{path.name}.{secrets.token_hex(4)}.data"


def _innermost(error: BaseException) -> BaseException:
    """What started a chain of errors: the exporter's own ones only name their step."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _strip_notes(model: ir.Model) -> None:
    """Drop what the exporter noted about its own work, all but the module that a node is from."""
    import onnx_ir as ir

    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in nodes for output in node.outputs]
    noted = [model.graph.metadata_props, *(node.metadata_props for node in nodes)]
    noted += [value.metadata_props for value in values]
    for notes in noted:
        for key in [k for k in notes if k.startswith(_NOTES) and k != _KEPT_NOTE]:
            del notes[key]


def _settle_sizes(values: Iterable[ir.Value | None]) -> None:
    """Write sizes that the model's code fixed as numbers; the exporter names them "3"."""
    import onnx_ir as ir

    for value in values:
        if value is None or value.shape is None:
            continue
        for place, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and (size.value or "").isdecimal():
                value.shape[place] = int(size.value or "")
