"""Models, data, functions and example inputs that the command line names; nothing is unpickled."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depcut.errors import InputError
from depcut.support.failures import first_line, reraise_fatal, shown

_MOST = 2**28  # elements of an example
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")
}


def build_model(target: str) -> nn.Module:
    """Import `package.module:factory` and call the factory without arguments.

    Args:
        target: The import path; the factory may be a function, a class or an attribute path such
            as `models:Net.tiny`. Modules in the current folder are found.

    Returns:
        The model that the factory returns.

    Raises:
        InputError: The path cannot be imported, the factory fails, or it returns no module.
    """
    model = _called(target, "the model")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the factory returned a {type(model).__name__}",
            where=target,
            remedy="it must return a torch.nn.Module",
        )
    return model


def build_data(target: str) -> Any:
    """Import `package.module:factory` and call it: calibration data.

    Args:
        target: The import path, as for `build_model`.

    Raises:
        InputError: The path cannot be imported, or the factory fails.
    """
    return _called(target, "the data")


def import_function(target: str) -> Callable[..., Any]:
    """Import a function by `package.module:name`, e.g. torch.nn.functional:cross_entropy.

    Args:
        target: The import path.

    Raises:
        InputError: The path cannot be imported, or its object cannot be called.
    """
    try:
        function = _imported(target)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        reraise_fatal(error)
        raise InputError(
            f"cannot import it: {first_line(error)}",
            where=target,
            remedy="write package.module:function, e.g. torch.nn.functional:cross_entropy",
        ) from error
    if not callable(function):
        raise InputError(
            f"a {type(function).__name__} cannot be called", where=target, remedy="name a function"
        )
    return function  # type: ignore[no-any-return]


def _imported(target: str) -> Any:
    module_name, _, attributes = target.partition(":")
    if not module_name or not attributes:
        raise InputError(
            f"{target!r} is no import path", remedy="write package.module:factory, e.g. models:net"
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109  (sys.path holds strings)
        # A console script's path starts at its own folder, not at the user's.
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    value: Any = importlib.import_module(module_name)
    for name in attributes.split("."):
        value = getattr(value, name)
    return value


def _called(target: str, what: str) -> Any:
    """What the factory at an import path returns."""
    try:
        return _imported(target)()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a module may be a script that ends the process
        reraise_fatal(error)
        raise InputError(
            f"cannot build {what}: {first_line(error)}",
            where=target,
            remedy="the factory must be importable from here and take no arguments",
        ) from error


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
