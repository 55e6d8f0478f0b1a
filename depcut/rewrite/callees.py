"""Functions that are called through a value: a local name, an attribute, an object's `__call__`.

Such a function is named by its module and qualified name; which one a call expression gives is seen
when it runs.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from depcut.errors import InputError
from depcut.rewrite.functions import holds, method_holding, reachable, rewrapped, with_code

# Functions of this process that no other process can import, by name.
_LOCAL: dict[str, types.FunctionType] = {}


def importable_name(module: str, code: types.CodeType) -> str | None:
    """The name "module:qualname" of what leads to a function with some code; None without one.

    Args:
        module: Name of the module in which the function was made.
        code: The function's code.
    """
    for name, value in list(vars(sys.modules.get(module, types.ModuleType(""))).items()):
        if isinstance(value, type) and value.__module__ == module:
            found = method_holding(value, code)
            if found is not None:
                return f"{module}:{name}.{found[0]}"
        elif callable(value) and reachable(value, code) is not None:
            return f"{module}:{name}"
    # One made by a function, or held by an object alone.
    for made in gc.get_referrers(code):
        if isinstance(made, types.FunctionType) and holds(made.__code__, code):
            name = f"{module}:{made.__qualname__}"
            if "<" in name and _LOCAL.setdefault(name, made) is made:
                return name
    return None


def by_name(name: str) -> Any:
    """What a name "module:qualname" stands for; None where it is not at hand."""
    if name in _LOCAL:
        return _LOCAL[name]
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
    except ImportError:
        return None
    for step in path.split("."):
        value = getattr(value, step, None)
    return value


def exchanging(
    holder: Any, whole: Any, old: types.FunctionType, new: types.FunctionType, *, others: bool
) -> Callable[[Any], Any]:
    """A function from what a call expression gives to what is called in its place.

    Args:
        holder: What the original function is reached through: itself, or what wraps it.
        whole: The same with the patched function inside.
        old: The original.
        new: The patched function.
        others: Whether the expression gave other functions as well, which are left as they are.
    """

    def exchange(value: Any) -> Any:
        if value is holder:
            return whole
        if getattr(type(value), "__call__", None) is holder:  # noqa: B004
            return functools.partial(whole, value)
        if getattr(value, "__func__", None) is holder:
            return functools.partial(whole, value.__self__)
        return _alike(value, old, new, others)

    return exchange


def _alike(value: Any, old: types.FunctionType, new: types.FunctionType, others: bool) -> Any:
    """In place of another function of the same code, or of what wraps the original."""
    found = reachable(value, old.__code__)
    if found is not None:
        return rewrapped(value, found, new if found is old else _with_cells(found, new))
    called = getattr(type(value), "__call__", None)  # noqa: B004
    if reachable(called, old.__code__) is not None:
        return functools.partial(_alike(called, old, new, others), value)
    if others:
        return value
    raise InputError(
        f"the code calls {getattr(value, '__qualname__', type(value).__qualname__)} where it "
        f"called {old.__qualname__} in the example call, in which widths were patched",
        where="a patched module",
        remedy="shrink the model with the function that it is to call",
    )


def _with_cells(function: types.FunctionType, new: types.FunctionType) -> types.FunctionType:
    """A function with the code of the patched one, and its own free variables."""
    cells = dict(zip(new.__code__.co_freevars, new.__closure__ or (), strict=True))
    own = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    wanted = new.__code__.co_freevars
    return with_code(function, new.__code__, tuple(own.get(n, cells[n]) for n in wanted))
