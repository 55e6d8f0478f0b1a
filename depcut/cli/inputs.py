"""Example inputs: made of the shapes on the command line, and said in words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.inputs import Inputs, arguments, infer_inputs
from depcut.capture.program import Program
from depcut.cli.output import Output
from depcut.errors import InputError
from depcut.plan.fingerprint import described
from depcut.support.failures import shown
from depcut.support.torch_private import pytree

_MADE = "made up; --input-shape gives others"
_MOST = 2**28  # elements of an example
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")
}


def example_inputs(shapes: Sequence[str]) -> tuple[Tensor, ...] | None:
    """Random tensors of the shapes written on the command line.

    Args:
        shapes: One entry per positional argument: sizes, and after a colon the data type if it is
            not float32, as in "2,3,224,224" and "2,32:int64".

    Returns:
        The tensors: normal deviates, or zeros and ones for integers and booleans, which are valid
        indices of any table. None when there are no shapes.

    Raises:
        InputError: A shape cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(text, generator) for text in shapes) or None


def _example(text: str, generator: torch.Generator) -> Tensor:
    """One random tensor."""
    sizes, _, name = text.partition(":")
    dtype = _DTYPES.get(name or "float32")
    parts = [part.strip() for part in sizes.split(",")]
    sizes_read = all(part.isdecimal() and len(part) < 20 and int(part) > 0 for part in parts)
    if dtype is None or not sizes_read:
        raise InputError(
            f"cannot read the input shape {shown(text)}",
            where="--input-shape",
            remedy=f"write sizes like 2,3,224,224 or 2,32:int64; types: {', '.join(_DTYPES)}",
        )
    shape = [int(part) for part in parts]
    if math.prod(shape) > _MOST:
        raise InputError(
            f"the input shape {text!r} has {math.prod(shape):.3g} elements",
            where="--input-shape",
            remedy=f"at most {_MOST} are made up here; use Python for larger inputs",
        )
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def in_words(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Example inputs by their data types and sizes, such as `float32[2, 3, 224, 224]`.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    named = [f"{name}: {_kind(value)}" for name, value in kwargs.items()]
    return ", ".join([*map(_kind, args), *named])


def _kind(value: Any) -> str:
    """A tensor's data type and sizes; anything else as it is written."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_kind, value))}]"
    return shown(value)


def outputs_of(options: argparse.Namespace) -> tuple[str | int, ...] | None:
    """The outputs that count, by names and positions; None: as the model's library has it.

    Args:
        options: Of a command with `outputs`.
    """
    named = [int(name) if name.isdecimal() else name for name in options.outputs]
    return tuple(named) or None


def say_inputs(output: Output, options: argparse.Namespace, program: Program) -> None:
    """Say which example inputs a model was captured with, where they were not given as such.

    Args:
        output: Of the command.
        options: Its options.
        program: The captured model.
    """
    origin = "first item of the data" if getattr(options, "data", None) else _MADE
    _say(output, options, program.args, program.kwargs, origin)


def given_or_made(output: Output, options: argparse.Namespace, model: nn.Module) -> Inputs:
    """Example inputs of the shapes that were given; made up for the model, and said, where none is.

    Args:
        output: Of the command.
        options: Its options.
        model: What takes the inputs.

    Raises:
        InputError: They cannot be read, or cannot be made up.
    """
    inputs: Inputs = example_inputs(options.input_shape)
    inputs = infer_inputs(model) if inputs is None else inputs
    _say(output, options, *arguments(inputs), _MADE)
    return inputs


def _say(
    output: Output,
    options: argparse.Namespace,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    origin: str,
) -> None:
    recorded = pytree.tree_map(described, {"args": list(args), "kwargs": kwargs})
    if options.input_shape:
        output.entry("inputs", recorded)
    else:
        output.say("inputs", recorded, f"inputs: {in_words(args, kwargs)} ({origin})")
