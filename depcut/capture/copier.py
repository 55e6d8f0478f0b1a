"""Copies of a module tree; subclasses say whether tensors are shared or copied.

Modules, containers and objects are made empty, remembered, and filled from a list of what is still
to be done: deep structures need no deep recursion, and each object is visited once.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from depcut.capture.references import ATOMS, reaches, referent_of
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import COMPILED_CALL, buffers_of, parameters_of

# A change of these would not be seen in the model, or they cannot exist twice.
_SHARED = (type, enum.Enum, np.generic, np.dtype, np.memmap, fx.Graph, fx.Node)
_REGISTRIES = frozenset(("_parameters", "_buffers", "_modules"))  # of a module, never caches
_ATTEMPTS = 8  # at reading a container that another thread is writing to


class Copier:
    """Copies modules and all that they refer to; what cannot be copied is shared.

    Locks, files, generators and the like cannot be copied, nor is what has a finalizer: it would
    run twice. Bound methods, partial functions, weak references and the functions that close over
    something copied are bound to the copies.

    Args:
        memo: Copies by the id of their original, as of `copy.deepcopy`; grows.
    """

    def __init__(self, memo: dict[int, Any] | None = None) -> None:
        self.memo: dict[int, Any] = {} if memo is None else memo
        self._alive: list[Any] = []  # an id stays one object's as long as that lives
        self._open: list[tuple[Any, Any]] = []
        self._inside: set[int] = set()
        self._outside: set[int] = set()  # leads to nothing inside

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor that takes the place of one: itself, or a copy."""
        raise NotImplementedError

    def follows(self, value: Any) -> bool:
        """Whether a function gets a copy of its own of a value that it closes over."""
        raise NotImplementedError

    def leads_inside(self, value: Any) -> bool:
        """Whether a value refers to a module, a tensor or a container of the tree copied."""
        return reaches(value, self._inside, self._outside)

    def as_its_class_says(self, kind: type) -> bool:
        """Whether `__getstate__`, `__setstate__` and, for modules, `__deepcopy__` are heeded."""
        raise NotImplementedError

    def entries(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """The entries of a dictionary that are to be copied: a new dictionary."""
        return value.copy()

    def __call__(self, value: Any) -> Any:
        """The copy of a value and all that it refers to."""
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._inside.add(id(module))
                fields = [v for v in vars(module).values() if isinstance(v, dict | list | set)]
                self._inside.update(map(id, fields))
                for held in (parameters_of(module), buffers_of(module)):
                    self._inside.update(id(t) for t in held.values() if t is not None)
        copied = self._copy_of(value)
        self._fill()
        return copied

    def _copy_of(self, value: Any) -> Any:
        """The copy of a value; if it holds others, they may still be missing."""
        kind = type(value)
        if kind in ATOMS:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known
        self._alive.append(value)
        make = _MAKERS.get(kind)
        if make is not None:
            copied = make(self, value)
        elif isinstance(value, torch.Tensor):
            copied = self.tensor(value)
        elif isinstance(value, _SHARED):
            copied = value
        elif isinstance(value, nn.Module):
            copied = self._module(value)
        else:
            copied = self._object(value)
        return self.memo.setdefault(id(value), copied)

    def _shell(self, value: Any, empty: Any) -> Any:
        """Remember an empty copy, to be filled later."""
        self.memo[id(value)] = empty
        self._open.append((value, empty))
        return empty

    def _fill(self) -> None:
        """Fill all empty copies, those that are added meanwhile included."""
        while self._open:
            value, copied = self._open.pop()
            kind = type(value)
            if kind is list:
                copied.extend(map(self._copy_of, value[:]))
            elif kind in (dict, OrderedDict):
                for key, item in self.entries(value).items():
                    copied[self._key(key)] = self._copy_of(item)
            elif kind is set:
                copied.update(map(self._key, value.copy()))
            else:
                self._fill_object(value, copied)

    def _fill_object(self, value: Any, copied: Any) -> None:
        fields = copied.__dict__ if hasattr(value, "__dict__") else {}
        for key, item in dict(getattr(value, "__dict__", ())).items():
            if key == COMPILED_CALL and isinstance(value, nn.Module):
                continue  # of the original's code; torch's own copies are without it, too
            if key in _REGISTRIES and type(item) is dict and isinstance(value, nn.Module):
                fields[key] = {name: self._copy_of(held) for name, held in item.copy().items()}
            else:
                fields[key] = self._copy_of(item)
        for slot in _slots(cast(Any, type(value))):
            try:
                item = slot.__get__(value)
            except AttributeError:
                continue
            slot.__set__(copied, self._copy_of(item))

    def _key(self, value: Any) -> Any:
        """What stands for a key or a member of a set: what has a hash by value never changes."""
        if isinstance(value, tuple):
            return self._copy_of(value)
        usual: tuple[Any, ...] = (object.__hash__, torch.Tensor.__hash__)
        by_identity = type(value).__hash__ in usual
        return self._copy_of(value) if by_identity else value

    def _list(self, value: list[Any]) -> Any:
        return value[:] if ATOMS.issuperset(map(type, value)) else self._shell(value, [])

    def _dict(self, value: dict[Any, Any]) -> Any:
        flat = ATOMS.issuperset(map(type, value.copy().values()))
        flat = flat and ATOMS.issuperset(map(type, value.copy()))
        return value.copy() if flat else self._shell(value, type(value)())

    def _set(self, value: set[Any]) -> Any:
        return self._shell(value, set())

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        copies = tuple(map(self._copy_of, value))
        return value if all(map(operator.is_, copies, value)) else copies

    def _frozenset(self, value: frozenset[Any]) -> Any:
        return frozenset(map(self._key, value))

    def _method(self, value: types.MethodType) -> Any:
        owner = self._copy_of(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)

    def _builtin(self, value: types.BuiltinMethodType) -> Any:
        owner = self._copy_of(value.__self__)
        return value if owner is value.__self__ else getattr(owner, value.__name__)

    def _cached(self, value: Any) -> Any:
        """A function with a cache of its own, if it is one of an object that is copied."""
        wrapped = self._copy_of(value.__wrapped__)
        if wrapped is value.__wrapped__:
            return value
        return functools.lru_cache(**value.cache_parameters())(wrapped)

    def _weak(self, value: Any) -> Any:
        referent = referent_of(value)
        if id(referent) not in self._inside and id(referent) not in self.memo:
            return value
        copied = self._copy_of(referent)
        if copied is referent:
            return value
        return weakref.ref(copied) if type(value) is weakref.ref else weakref.proxy(copied)

    def _generator(self, value: torch.Generator) -> Any:
        return value.clone_state()

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        return value.copy() if value.dtype.kind != "O" else copy.deepcopy(value, self.memo)

    def _function(self, value: types.FunctionType) -> Any:
        cells, given = value.__closure__ or (), value.__kwdefaults__ or {}
        if not (cells or given or value.__defaults__ or value.__dict__):
            return value
        new_cells = tuple(map(self._cell, cells))
        defaults = value.__defaults__ and self._closed_over(value.__defaults__)
        keywords = {k: self._closed_over(v) for k, v in given.items()}
        attributes = {k: self._closed_over(v) for k, v in value.__dict__.items()}
        old = (*cells, value.__defaults__, *given.values(), *value.__dict__.values())
        new = (*new_cells, defaults, *keywords.values(), *attributes.values())
        if all(map(operator.is_, new, old)):
            return value
        copied = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, defaults, new_cells
        )
        copied.__kwdefaults__ = keywords or None
        copied.__qualname__, copied.__module__ = value.__qualname__, value.__module__
        copied.__doc__, copied.__annotations__ = value.__doc__, value.__annotations__
        copied.__dict__.update(attributes)
        return copied

    def _closed_over(self, value: Any) -> Any:
        if type(value) is tuple:
            copies = tuple(map(self._closed_over, value))
            return value if all(map(operator.is_, copies, value)) else copies
        callable_ = isinstance(value, types.FunctionType | types.MethodType | functools.partial)
        return self._copy_of(value) if callable_ or self.follows(value) else value

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A variable of an enclosing function: functions that share it share the copy."""
        known = self.memo.get(id(cell))
        if known is not None:
            return known  # type: ignore[no-any-return]
        self._alive.append(cell)
        copied = self.memo[id(cell)] = types.CellType()
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            self.memo[id(cell)] = cell
            return cell
        copied.cell_contents = self._closed_over(content)
        if copied.cell_contents is content and not self._may_change(content):
            self.memo[id(cell)] = cell
            return cell
        return copied

    def _may_change(self, content: Any) -> bool:
        """Whether code may give a variable another value where a copy must not see it."""
        return type(content) in ATOMS and self.follows(content)

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, torch.jit.ScriptModule) or self.as_its_class_says(type(module)):
            self._meet_tensors(module)
            before = dict(self.memo)
            try:
                return copy.deepcopy(module, self.memo)
            except Exception as error:
                reraise_fatal(error)
                if isinstance(module, torch.jit.ScriptModule):
                    raise
                self.memo.clear()  # of copies that were not finished
                self.memo.update(before)
        return self._shell(module, object.__new__(type(module)))

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        if hasattr(kind, "__del__"):
            return value
        if hasattr(kind, "__deepcopy__"):
            return self._by_protocol(value, kind.__deepcopy__)
        own = kind.__reduce__ is not object.__reduce__
        own = own or kind.__reduce_ex__ is not object.__reduce_ex__
        if not own and not self.as_its_class_says(kind):
            if _is_constant(value):
                return value
            if not _holds_more(kind):
                with contextlib.suppress(TypeError):  # made in C
                    return self._shell(value, object.__new__(kind))
        return self._by_protocol(value, self._reduced)

    def _by_protocol(self, value: Any, copied: Callable[[Any, dict[int, Any]], Any]) -> Any:
        """A copy as the class of a value makes it; the value itself where that fails."""
        self._meet_tensors(value)
        for _ in range(_ATTEMPTS):
            try:
                return copied(value, self.memo)
            except Exception as error:  # noqa: BLE001, PERF203  (whatever it is: not to be copied)
                reraise_fatal(error)
                if "during iteration" not in first_line(error):
                    break
        self.memo[id(value)] = value
        return value

    def _meet_tensors(self, value: Any) -> None:
        """Remember what stands for the tensors that `copy.deepcopy` is about to see."""
        for holder in value.modules() if isinstance(value, nn.Module) else (value,):
            fields = dict(getattr(holder, "__dict__", ()))
            groups = [list(v.values()) for v in fields.values() if isinstance(v, dict)]
            groups += [v for v in fields.values() if isinstance(v, list)]
            for item in (item for group in (list(fields.values()), *groups) for item in group):
                if isinstance(item, torch.Tensor):
                    self._copy_of(item)

    def _reduced(self, value: Any, _: dict[int, Any]) -> Any:
        """A copy from what pickle would store."""
        recipe = value.__reduce_ex__(4)
        if isinstance(recipe, str):
            return value
        function, args, state, items, pairs = (*recipe, None, None, None)[:5]
        self._alive.append((args, state))
        items, pairs = list(items or ()), list(pairs or ())
        args = [self._copy_of(a) for a in args]
        self._fill()  # a constructor reads what it is given
        copied = function(*args)
        self.memo[id(value)] = copied
        if hasattr(copied, "__setstate__"):
            if state is not None:
                state = self._copy_of(state)
                self._fill()
                copied.__setstate__(state)
        else:
            plain, slots = state if isinstance(state, tuple) else (state, None)
            if plain:
                vars(copied).update({k: self._copy_of(v) for k, v in plain.items()})
            for name, item in (slots or {}).items():
                setattr(copied, name, self._copy_of(item))
        for item in items:
            copied.append(self._copy_of(item))
        for key, item in pairs:
            copied[self._key(key)] = self._copy_of(item)
        return copied


_MAKERS: dict[type, Callable[[Any, Any], Any]] = {
    list: Copier._list,
    dict: Copier._dict,
    OrderedDict: Copier._dict,
    set: Copier._set,
    tuple: Copier._tuple,
    frozenset: Copier._frozenset,
    types.MethodType: Copier._method,
    types.BuiltinMethodType: Copier._builtin,
    types.FunctionType: Copier._function,
    weakref.ref: Copier._weak,
    weakref.ProxyType: Copier._weak,
    weakref.CallableProxyType: Copier._weak,
    torch.Generator: Copier._generator,
    np.ndarray: Copier._array,
    type(functools.lru_cache(len)): Copier._cached,
}


@functools.cache
def _slots(kind: Any) -> tuple[Any, ...]:
    """Descriptors of the slots of a class."""
    return tuple(
        attribute
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for attribute in vars(base).values()
        if isinstance(attribute, types.MemberDescriptorType)
    )


def _holds_more(kind: Any) -> bool:
    """Whether objects of a class hold more than attributes and slots: what C code put there."""
    pointer = tuple.__itemsize__
    known = object.__basicsize__ + pointer * (2 + len(_slots(kind)))  # attributes, weak references
    return bool(kind.__basicsize__ > known)


def _is_constant(value: Any) -> bool:
    """Whether it has no state and is a global of its class's module: a name, compared by `is`."""
    if getattr(value, "__dict__", None) or _slots(cast(Any, type(value))):
        return False
    names = vars(sys.modules.get(type(value).__module__, types))
    return any(v is value for v in names.values())
