"""What an object refers to, directly or through others: containers, objects, functions."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch

# Of exactly these types, nothing can change, and they refer to nothing.
ATOMS: frozenset[type] = frozenset(
    (
        *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, slice, object),
        *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
        *(types.ModuleType, types.CodeType, type),
    )
)
_LIMIT = 20_000  # objects looked at; what holds more is no part of a model


def reaches(value: Any, targets: Container[int], clear: set[int]) -> bool:
    """Whether a value leads to one of some objects.

    Args:
        value: Where to begin.
        targets: Ids of the objects.
        clear: Ids of living objects that are known to lead to none; grows.
    """
    seen: set[int] = set()
    alive: list[Any] = []  # what has been made for the walk alone keeps its id
    pending = [value]
    while pending and len(seen) < _LIMIT:
        item = pending.pop()
        if type(item) in ATOMS or id(item) in clear or id(item) in seen:
            continue
        if id(item) in targets:
            return True
        seen.add(id(item))
        alive.append(item)
        pending.extend(_referents(item))
    clear |= seen
    return False


def referent_of(value: Any) -> Any:
    """What a weak reference or proxy stands for; None where that is gone."""
    if isinstance(value, weakref.ref):
        return value()
    try:
        return value.__repr__.__self__  # attributes of a proxy are those of its referent
    except ReferenceError:
        return None


def _referents(value: Any) -> Iterable[Any]:
    if isinstance(value, types.FunctionType):  # not its globals, which lead everywhere
        return (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
    if type(value) in (weakref.ref, *weakref.ProxyTypes):
        return (referent_of(value),)
    if isinstance(value, type | types.ModuleType):
        return ()
    return gc.get_referents(value)
