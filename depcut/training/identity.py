"""What tells one training from another: functions, data and structure as short texts.

The same program gives the same texts in another process. What a function changes while it runs
(counters, lists that it collects in) is left aside.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from depcut.support.torch_private import pytree

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LEVELS = 6  # of functions, containers and objects in each other


def callable_text(function: Any) -> str | None:
    """A name for people, and a hash of the code, the defaults and what it closes over.

    Args:
        function: A function, a method, a partial function, a module or any callable object; None.
    """
    if function is None:
        return None
    return f"{_name(function)} {_hash([_token(function, _LEVELS)])}"


def data_text(items: Iterable[Any]) -> str:
    """A hash of tensors, arrays and numbers in nested containers.

    Args:
        items: Batches.
    """
    return _hash([_leaf(leaf) for leaf in pytree.tree_leaves(list(items))])


def structure_text(model: nn.Module) -> str:
    """The class of a model, and a hash of the names and classes of its modules.

    Args:
        model: The model; it is only read.
    """
    parts = [f"{name}: {_name(type(module))}" for name, module in model.named_modules()]
    return f"{type(model).__name__} {_hash(parts)}"


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _name(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"partial of {_name(value.func)}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _leaf(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        bits = plain.flatten().view(torch.uint8).numpy().tobytes() if not value.is_meta else b""
        digest = hashlib.sha256(bits).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {digest}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value) if isinstance(value, _ATOMS) else _name(type(value))


def _token(value: Any, levels: int) -> str:
    """A value as a text without addresses; of what may grow or cannot be told, the class alone."""
    if isinstance(value, types.FunctionType) and levels:
        return _function(value, levels - 1)
    if isinstance(value, types.MethodType) and levels:
        return f"{_token(value.__func__, levels)} of {_token(value.__self__, levels - 1)}"
    if isinstance(value, functools.partial) and levels:
        given = (*value.args, *(item for pair in sorted(value.keywords.items()) for item in pair))
        return " ".join(_token(part, levels - 1) for part in (value.func, *given))
    if isinstance(value, types.BuiltinFunctionType | type):
        return _name(value)
    if isinstance(value, (torch.Tensor, np.ndarray, *_ATOMS)):
        return _leaf(value)
    if isinstance(value, tuple):
        return f"({', '.join(_token(part, levels) for part in value)})" if levels else "tuple"
    if isinstance(value, nn.Module):
        tensors = data_text([*value.parameters(), *value.buffers()])
        return f"{structure_text(value)} {_plain_fields(value)} {tensors}"
    return f"{_name(type(value))} {_plain_fields(value)}"


def _plain_fields(value: Any) -> str:
    """The options of an object: its plain attributes that no name marks as its own business."""
    fields = sorted(getattr(value, "__dict__", {}).items())
    return repr([(k, repr(v)) for k, v in fields if type(v) in _ATOMS and k[:1] != "_"])


def _function(function: types.FunctionType, levels: int) -> str:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    stored = set(_stored(function.__code__))
    closed = [f"{n}={_content(c, levels)}" for n, c in cells if n not in stored]
    given = [_token(v, levels) for v in function.__defaults__ or ()]
    given += [
        f"{k}={_token(v, levels)}" for k, v in sorted((function.__kwdefaults__ or {}).items())
    ]
    return " ".join([_name(function), _code(function.__code__), *closed, *given])


def _content(cell: types.CellType, levels: int) -> str:
    try:
        return _token(cell.cell_contents, levels)
    except ValueError:  # not assigned yet
        return "empty"


def _code(code: types.CodeType) -> str:
    """A hash of what a function does; of its text, only what it does counts."""
    constants = [
        _code(c)
        if isinstance(c, types.CodeType)
        else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return _hash([code.co_code.hex(), *code.co_names, *code.co_varnames, *constants])


def _stored(code: types.CodeType) -> list[str]:
    """Variables of enclosing functions that a function, or one in it, gives another value."""
    out = [str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"]
    for inner in code.co_consts:
        out += _stored(inner) if isinstance(inner, types.CodeType) else []
    return out
