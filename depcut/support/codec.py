"""Nested states on disk: tensors as safetensors, everything else as JSON. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from depcut.errors import InputError
from depcut.support import files
from depcut.support.weights import read_tensors, write_tensors

_TENSORS, _PLAIN = "state.safetensors", "state.json"


def save(tree: Any, folder: Path) -> None:
    """Write a state as two files.

    Args:
        tree: Dictionaries, lists, tuples, tensors, numbers, strings, None.
        folder: Where; it exists.

    Raises:
        InputError: Something else is in it.
        DepcutError: A file cannot be written.
    """
    plain, tensors = encoded(tree)
    write_tensors(tensors, folder / _TENSORS)
    files.write_json(folder / _PLAIN, plain, indent=1)


def load(folder: Path) -> Any:
    """Read a state that `save` wrote; its tensors are on the CPU.

    Args:
        folder: Where it was saved.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged.
    """
    return decoded(_plain(folder), read_tensors(folder / _TENSORS))


def load_entry(folder: Path, key: str) -> Any:
    """One entry of a dictionary that `save` was given, read without the file of tensors.

    Args:
        folder: Where it was saved.
        key: Of an entry that holds no tensors.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or has no such entry.
    """
    plain = _plain(folder)
    try:
        return decoded(dict(plain["dict"])[key], {})
    except (KeyError, TypeError) as error:
        raise ValueError(f"it has no entry {key!r}") from error


def encoded(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into plain data for JSON and tensors for safetensors.

    Args:
        tree: Dictionaries, lists, tuples, tensors, numbers, strings, None.

    Returns:
        Plain data, and the tensors that it refers to by name: copies on the CPU.

    Raises:
        InputError: Something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    return _encoded(tree, "", tensors), tensors


def _encoded(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = path
        while name in tensors:  # "a/b" beside "b" in "a"
            name += "'"
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        items = tree.items()
        keys = [_encoded(key, f"{path}/{key}", tensors) for key in tree]
        values = [_encoded(value, f"{path}/{key}", tensors) for key, value in items]
        return {"dict": [list(pair) for pair in zip(keys, values, strict=True)]}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_encoded(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise InputError(
        f"a {type(tree).__name__} cannot be written to a checkpoint: nothing is pickled",
        where=path or None,
        remedy="use an optimizer and a schedule whose states are plain data and tensors, or no "
        "checkpoint=",
    )


def decoded(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a state that `encoded` split together again.

    Args:
        plain: The plain data that it returned.
        tensors: The tensors that it returned.

    Raises:
        ValueError: They do not belong together.
    """
    if not isinstance(plain, dict):
        return plain
    try:
        ((kind, value),) = plain.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {decoded(k, tensors): decoded(v, tensors) for k, v in value}
        return {"list": list, "tuple": tuple}[kind](decoded(v, tensors) for v in value)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the state is damaged: {type(error).__name__}: {error}") from error


def _plain(folder: Path) -> Any:
    return files.read_json(folder / _PLAIN)
