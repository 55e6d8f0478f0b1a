"""Which plan made a model: remembered beside it, so that its class and state stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import nn

Origin: TypeAlias = "Callable[[], Mapping[str, str]]"

# By identity: a user's class may compare by value, or not be hashable at all.
_ORIGINS: dict[int, tuple[weakref.ref[nn.Module], Origin]] = {}


def record_origin(model: nn.Module, origin: Origin) -> None:
    """Remember where a model comes from, for as long as this very object lives.

    Copies of the model, and what is loaded from a file, have no origin.

    Args:
        model: The model.
        origin: Gives what there is to say about it, when somebody asks; replaces what was said
            before. It must not refer to the model.
    """
    key = id(model)
    _ORIGINS[key] = (weakref.ref(model, lambda _: _ORIGINS.pop(key, None)), origin)


def origin_of(model: nn.Module) -> dict[str, str]:
    """What `record_origin` was told about this very object.

    Args:
        model: The model.

    Returns:
        The entries; none for a model of unknown origin.
    """
    reference, origin = _ORIGINS.get(id(model), (None, None))
    known = reference is not None and reference() is model
    return dict(origin()) if known and origin is not None else {}
