"""Nested values as plain data, beside the bytes of their tensors; nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from depcut.calibration.packing import View

_ITSELF = (bool, int, float, str, type(None))


class NotPlainError(TypeError):
    """A value that has no plain form."""


def plain_form(value: Any) -> Any:
    """What JSON holds of a nested value.

    Args:
        value: Numbers, text, nodes, dtypes, devices, views of bytes, and tuples, lists and dicts
            of them.

    Raises:
        NotPlainError: There is something else.
    """
    if isinstance(value, _ITSELF):
        return value
    if isinstance(value, dict):
        return {"dict": [[plain_form(k), plain_form(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return {"list": [plain_form(v) for v in value]}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple):
        return {"tuple": [plain_form(v) for v in value]}
    for kind, name, form in _LEAVES:
        if isinstance(value, kind):
            return {name: form(value)}
    if isinstance(value, torch.Tensor) and not value.numel() and not value.is_meta:
        return {"empty": [list(value.shape), _name(value.dtype)]}
    raise NotPlainError(type(value).__name__)


def from_plain_form(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The nested value that `plain_form` was given.

    Args:
        data: What it returned.
        nodes: Of the graph, by name.

    Raises:
        KeyError: It is of another graph.
    """
    if not isinstance(data, dict):
        return data
    ((name, held),) = data.items()
    if name == "dict":
        return {from_plain_form(k, nodes): from_plain_form(v, nodes) for k, v in held}
    if name in ("list", "tuple"):
        found = [from_plain_form(v, nodes) for v in held]
        return found if name == "list" else tuple(found)
    if name == "node":
        return nodes[held]
    return _MAKERS[name](held)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise KeyError(name)
    return found


def _of_view(view: View) -> list[Any]:
    return [view.run, _name(view.dtype), view.offset, list(view.size), list(view.stride)]


def _view(held: list[Any]) -> View:
    run, dtype, offset, size, stride = held
    return View(run, _dtype(dtype), offset, torch.Size(size), tuple(stride))


_LEAVES: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (fx.Node, "node", lambda node: node.name),
    (View, "view", _of_view),
    (torch.dtype, "dtype", _name),
    (torch.device, "device", str),
    (np.integer, "integer", int),
)
_MAKERS: dict[str, Callable[[Any], Any]] = {
    "size": torch.Size,
    "view": _view,
    "dtype": _dtype,
    "device": torch.device,
    "integer": np.int64,
    "empty": lambda held: torch.empty(held[0], dtype=_dtype(held[1])),
}
