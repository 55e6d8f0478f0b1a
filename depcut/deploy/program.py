"""A model as a program of torch.export: a file that loads without depcut and without its class."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.process_state import converting
from depcut.capture.random_state import preserved
from depcut.deploy.convert import captured
from depcut.deploy.output_check import TOLERANCES, model_outputs
from depcut.deploy.runtime import batch_size, bind_inputs, resized
from depcut.errors import ExportError
from depcut.support.closeness import gap
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree


def write_program(model: nn.Module, path: Path, inputs: Any) -> tuple[int, ...]:
    """Write what a model computes in evaluation mode, compared with the model before it is left.

    `torch.export.load(path).module()` takes what the model takes; results of a class of its own
    come as dictionaries. The batch is free where the model's code leaves it free.

    Args:
        model: The model; it is only read.
        path: The file to write.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; None infers them.

    Returns:
        The batch sizes at which it was compared.

    Raises:
        ExportError: torch.export cannot capture or store the model, or the file computes something
            else.
        InputError: The inputs do not fit.
        OSError: The file cannot be written.
    """
    with preserved(), converting():
        keywords = frozenset(inputs) if isinstance(inputs, Mapping) else frozenset[str]()
        seen = _as_called(model, keywords)
        arguments, program = captured(seen, bind_inputs(seen, inputs))
        try:
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
        except OSError:
            raise
        except Exception as error:
            reraise_fatal(error)
            raise ExportError(
                f"torch.export cannot store the program: {first_line(error)}",
                where=type(model).__name__,
                remedy='save without standalone="program"',
            ) from error
        sizes = [batch_size(arguments)]
        if program.range_constraints:
            sizes.append(sizes[0] + 1)
        for size in sizes:
            _compare(model, loaded, resized(arguments, size), f"batch size {size}")
    return tuple(sizes)


def _as_called(model: nn.Module, keywords: Collection[str]) -> nn.Module:
    """A clone whose forward takes keywords as such, and returns Python's own containers.

    A program is called in the form in which it was captured, in processes that know no others.
    """
    seen = clone(model)
    forward = seen.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return _plain(forward(*args, **kwargs))

    given = inspect.signature(forward)
    kept = [p for name, p in given.parameters.items() if name not in keywords]
    named = [
        given.parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name in given.parameters
        if name in keywords
    ]
    last = [p for p in kept if p.kind is inspect.Parameter.VAR_KEYWORD]
    first = [p for p in kept if p.kind is not inspect.Parameter.VAR_KEYWORD]
    plain.__signature__ = given.replace(parameters=[*first, *named, *last])  # type: ignore
    seen.forward = plain
    return seen


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _compare(
    model: nn.Module, loaded: nn.Module, arguments: inspect.BoundArguments, where: str
) -> None:
    wanted = model_outputs(model, (arguments.args, arguments.kwargs))
    args, kwargs = cloned_arguments((arguments.args, arguments.kwargs))
    try:
        with torch.no_grad():
            results = pytree.tree_leaves(loaded(*args, **kwargs))
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"the exported program stops: {first_line(error)}",
            where=where,
            remedy="please report the model",
        ) from error
    got = [leaf for leaf in results if isinstance(leaf, Tensor)]
    if [t.shape for t in got] != [t.shape for t in wanted]:
        raise ExportError(
            "the exported program returns other tensors than the model",
            where=where,
            remedy="please report the model",
        )
    for number, (expected, value) in enumerate(zip(wanted, got, strict=True)):
        if not expected.is_floating_point():
            same = torch.equal(expected, value)
        else:
            found = gap(expected.cpu(), value.cpu())
            rtol, atol = TOLERANCES.get(expected.dtype, (0.0, 0.0))
            same = found.worst <= atol + rtol * found.scale
        if not same:
            raise ExportError(
                "the exported program and the model compute different values",
                where=f"output {number}, {where}",
                remedy="a model that draws random numbers cannot be compared",
            )
