"""ONNX files as candidates: whether they are there, how large they are, what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depcut.capture.inputs import arguments
from depcut.errors import InputError


def file_arguments(inputs: Any) -> inspect.BoundArguments:
    """Inputs of a file, which has no signature: they count by name, or else in their order.

    Args:
        inputs: A tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        InputError: They hold no tensors.
    """
    arguments(inputs)  # refuses what holds no tensors
    values = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    return inspect.BoundArguments(inspect.Signature(), values)


def existing(path: Path, name: str) -> Path:
    """The path, if there is a file.

    Args:
        path: Of the file.
        name: The candidate's name, for messages.

    Raises:
        InputError: There is none.
    """
    if not path.is_file():
        raise InputError(f"no file {path}", where=f"candidate {name!r}", remedy="export it first")
    return path


def file_bytes(path: Path) -> int:
    """Bytes on disk, external data included.

    Args:
        path: Of the file.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    beside = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))
