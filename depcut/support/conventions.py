"""Adapters that know what a library expects of its models beside their forward, by library.

An adapter is a module (or any object) with functions that stages look up by name, each optional;
the stage that calls one documents it (`convention`: `depcut.capture.convention`, `recipe`:
`depcut.rebuild.recipe`, `finish`: `depcut.rewrite.finish`). Stages find adapters
here, so that none of them imports one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_LOADERS: dict[str, Callable[[], Any]] = {}


def register(library: str, load: Callable[[], Any]) -> None:
    """Say how the adapter of a library is loaded.

    Args:
        library: Name of the package that defines the classes of the models.
        load: Returns the adapter; called for models of that library alone.
    """
    _LOADERS[library] = load


def adapters(model: nn.Module) -> Iterator[Any]:
    """The adapters of all libraries that a model's classes, or bases of them, are from.

    Args:
        model: The model; its submodules count.
    """
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    used = {kind.__module__.partition(".")[0] for kind in kinds}
    found = [load() for library, load in _LOADERS.items() if library in used]
    yield from {id(adapter): adapter for adapter in found}.values()  # one may serve several
