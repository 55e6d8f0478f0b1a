"""Patches of source code as data, and classes with patched methods.

A patch is positions and numbers. Applied to a class it gives a subclass of the same name, whose
methods are the original ones but for the numbers; its instances are copied, pickled and loaded like
those of the original, by the class and the patch.
"""

from __future__ import annotations

import difflib
import functools
import textwrap
import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from depcut.errors import PlanError
from depcut.rewrite.callees import by_name, exchanging
from depcut.rewrite.edits import HELPERS, FunctionPatch, Patch, level_of, patched_name, patched_text
from depcut.rewrite.functions import (
    NoSourceError,
    is_filled,
    reachable,
    recompiled,
    rewrapped,
    source_of,
)

# Of a patched class: the class that it was made of, and the patches one after the other.
PATCHES = "_depcut_patches"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def difference(kind: type, patch: Patch) -> str:
    """What a patch changes, as a unified diff without file names.

    Args:
        kind: The class that is patched.
        patch: The patch.
    """
    out = []
    for part, (function, _) in zip(patch, _functions(kind, patch), strict=True):
        source = source_of(function.__code__)
        before = textwrap.dedent(source.text).splitlines()
        after = textwrap.dedent(patched_text(source.text, part.edits)).splitlines()
        lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
        out += [part.qualname, *(line for line in lines if not line.startswith("@@"))]
    return "\n".join(out)


def _functions(kind: type, patch: Patch) -> list[tuple[types.FunctionType, Any]]:
    """Each function that is patched, with the attribute or global through which it is reached."""
    found: list[tuple[types.FunctionType, Any]] = []
    for part in patch:
        holder = _static(kind, part.name) if part.caller is None else None
        if part.caller is not None:
            holder = resolved(found[part.caller][0], part.name, kind)
        function = _inside(holder, part)
        if function is None:
            raise PlanError(
                f"{part.qualname} is not the function that was patched",
                where=f"{kind.__module__}.{kind.__qualname__}",
                remedy="use the code that the model was shrunk with, or shrink it again",
            )
        found.append((function, holder))
    return found


def _static(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _inside(holder: Any, part: FunctionPatch) -> types.FunctionType | None:
    """The function of that name and source within what wraps it."""
    pending, seen = [holder], set()
    while pending:
        value = pending.pop()
        if id(value) in seen or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if value.__qualname__ == part.qualname and _digest(value) == part.digest:
                return value
            cells = [c.cell_contents for c in value.__closure__ or () if is_filled(c)]
            pending += [c for c in cells if callable(c)]
        pending += [getattr(value, n, None) for n in ("__func__", "func", "__wrapped__", "fget")]
    return None


def _digest(function: types.FunctionType) -> str | None:
    try:
        return source_of(function.__code__).digest
    except Exception:  # noqa: BLE001
        return None


def resolved(function: types.FunctionType, name: str, kind: type) -> Any:
    """What a dotted name means in a function of a class; None where only a run can tell.

    Args:
        function: The function, for its globals and cells.
        name: Such as "helper", "module.helper", "self.helper" or "module:helper".
        kind: What `self` is an instance of.
    """
    if ":" in name:
        return by_name(name)
    head, *rest = name.split(".")
    if rest and head == next(iter(function.__code__.co_varnames), None):
        value = _static(kind, rest[0])
        return value if len(rest) == 1 else None
    if head in function.__code__.co_varnames:
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if head in cells:
        value = cells[head].cell_contents if is_filled(cells[head]) else None
    else:
        value = function.__globals__.get(head)
    for step in rest:
        if not isinstance(value, types.ModuleType | type):
            return None
        value = getattr(value, step, None)
    return value


_CLASSES: dict[tuple[type[nn.Module], Patch], type[nn.Module]] = {}


def patched_class(kind: type[nn.Module], patch: Patch) -> type[nn.Module]:
    """The subclass of a class with patched methods; the same one for the same patch.

    Args:
        kind: The class.
        patch: The patch.

    Raises:
        PlanError: The class, or a function that it calls, has another source.
    """
    if (kind, patch) not in _CLASSES:
        _CLASSES[kind, patch] = _subclass(kind, patch)
    return _CLASSES[kind, patch]


def _subclass(kind: type[nn.Module], patch: Patch) -> type[nn.Module]:
    functions = _functions(kind, patch)
    new: dict[int, Any] = {}
    exchanges: dict[int, Callable[..., Any]] = {}
    methods: dict[str, Any] = {}
    # A function is called by one that stands before it.
    for number in reversed(range(len(patch))):
        part, (function, holder) = patch[number], functions[number]
        text = source_of(function.__code__).text
        level = level_of(text)
        called = {
            patched_name(edit, level): new[int(edit.new)]
            if edit.kind == "function"
            else exchanges[int(edit.new)](others=bool(edit.name))
            for edit in part.edits
            if edit.kind in {"function", "callee"}
        }
        text = patched_text(text, part.edits)
        helpers = {name: helper for name, helper in HELPERS.items() if name in text}
        if part.caller is None:
            original, holder = holder, methods.get(part.name, holder)
            # An earlier one may have been exchanged among those that this one closes over.
            function = reachable(_getter(holder), function.__code__) or function
        compiled = recompiled(function, text, {**helpers, **called})
        whole = _exchanged(holder, function, compiled)
        if part.caller is None:
            methods |= dict.fromkeys(_names(kind, original), whole)
        new[number] = whole.__func__ if isinstance(whole, staticmethod | classmethod) else whole
        exchanges[number] = functools.partial(exchanging, holder, whole, function, compiled)
    origin, before = getattr(kind, PATCHES, (kind, ()))
    patches = (*before, patch)
    namespace = {
        **methods,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduction(origin, patches),
        PATCHES: (origin, patches),
    }
    try:
        made: type[nn.Module] = types.new_class(
            kind.__name__, (_Unannounced, kind), exec_body=lambda body: body.update(namespace)
        )
        made.__bases__ = (kind,)
    except Exception as error:  # of a metaclass
        raise NoSourceError(f"a subclass of {kind.__qualname__} cannot be made: {error}") from error
    return made


class _Unannounced:
    """Keeps the making of a subclass from the original class, which may register it or refuse."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass


def _names(kind: type, value: Any) -> list[str]:
    """All names under which a class has an attribute."""
    names = {name for base in kind.__mro__ for name, held in vars(base).items() if held is value}
    return [name for name in names if _static(kind, name) is value]


def _getter(holder: Any) -> Any:
    return holder.fget if isinstance(holder, property) else holder


def _exchanged(holder: Any, old: types.FunctionType, new: types.FunctionType) -> Any:
    if isinstance(holder, property):
        return property(rewrapped(holder.fget, old, new), holder.fset, holder.fdel, holder.__doc__)
    return rewrapped(holder, old, new)


def _reduction(origin: type[nn.Module], patches: tuple[Patch, ...]) -> Callable[..., Any]:
    """`__reduce_ex__` that names the original class and the patches, not the subclass."""

    def reduce(self: Any, protocol: Any) -> Any:
        recipe = origin.__reduce_ex__(self, protocol)
        if isinstance(recipe, str):
            return recipe
        function, args, *rest = recipe
        args = tuple(origin if arg is type(self) else arg for arg in args)
        return (_rebuilt, (origin, patches, function, args), *rest)

    return reduce


def _rebuilt(
    origin: type[nn.Module], patches: tuple[Patch, ...], function: Any, args: tuple[Any, ...]
) -> Any:
    """What the original class's recipe makes, of the patched class."""
    kind = functools.reduce(patched_class, patches, origin)
    return function(*(kind if arg is origin else arg for arg in args))


def apply_patch(module: ModuleT, patch: Patch) -> ModuleT:
    """Make a module an instance of its class with patched methods.

    Args:
        module: The module; it is changed.
        patch: The patch.
    """
    module.__class__ = patched_class(type(module), patch)  # type: ignore[assignment]
    return module


def unpatch(module: nn.Module) -> None:
    """Undo the last `apply_patch`.

    Args:
        module: The module; it is changed.
    """
    kind = type(module)
    if PATCHES in vars(kind):
        module.__class__ = kind.__bases__[0]
