"""A model as its class builds it: tensors, plain attributes, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from depcut.plan.stacks import Stack
from depcut.rebuild.numbering import plain_kind

# What each module has beside the attributes of its class; none of it is built from a config.
_OWN = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str, bool, type(None), complex, torch.dtype, torch.Size)
_DEEPEST = 6

Place = tuple[str, tuple[Any, ...]]  # a module's name, and the path from its attributes
MISSING = object()
_ValueT = TypeVar("_ValueT")


@dataclass(frozen=True, eq=False)
class Twin:
    """What a class was built with.

    Attributes:
        model: The module, its large tensors on the meta device.
        kinds: Class of every module.
        shapes: Of every parameter and buffer, under each of its names.
        attributes: Plain values (numbers, names, lists of them) of every module and of the objects
            that hang from it, by path.
    """

    model: nn.Module
    kinds: Mapping[str, type]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[tuple[Any, ...], Any]]


def twin_of(model: nn.Module) -> Twin:
    """What a model consists of, tensors' values aside.

    Args:
        model: It is only read.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers(model)}
    seen: dict[int, tuple[Any, dict[tuple[Any, ...], Any]]] = {}
    return Twin(
        model,
        {name: _kind(m) for name, m in modules.items()},
        {name: tuple(t.shape) for name, t in tensors.items()},
        {name: _attributes(m, seen) for name, m in modules.items()},
    )


def _kind(module: nn.Module) -> type:
    """Its class; torch makes one anew for every parametrized module, of which it is the base."""
    kind = type(module)
    return kind.__bases__[0] if is_parametrized(module) else plain_kind(kind)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every buffer under each of its names."""
    return dict(model.named_buffers(remove_duplicate=False))


def _attributes(
    module: nn.Module, seen: dict[int, tuple[Any, dict[tuple[Any, ...], Any]]]
) -> dict[tuple[Any, ...], Any]:
    out: dict[tuple[Any, ...], Any] = {}
    for name, value in vars(module).items():
        if name not in _OWN and name != "_depcut_report":
            out.update({(name, *path): leaf for path, leaf in _leaves(value, seen, _DEEPEST)})
    return out


def _leaves(
    value: Any, seen: dict[int, tuple[Any, dict[tuple[Any, ...], Any]]], deep: int
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Plain values in a value, by path; a list of plain values is one."""
    if isinstance(value, _PLAIN):
        yield (), value
    elif isinstance(value, list | tuple | set | frozenset):
        if all(isinstance(item, _PLAIN) for item in value):
            yield (), value
    elif isinstance(value, dict):
        for key, item in value.items():
            if deep and isinstance(key, str | int):
                yield from (((key, *p), leaf) for p, leaf in _leaves(item, seen, deep - 1))
    elif deep and hasattr(value, "__dict__") and not isinstance(value, _OTHERS):
        if id(value) not in seen:
            seen[id(value)] = (value, {})
            found = {
                (key, *path): leaf
                for key, item in vars(value).items()
                for path, leaf in _leaves(item, seen, deep - 1)
            }
            seen[id(value)][1].update(found)
        yield from seen[id(value)][1].items()


_OTHERS = (nn.Module, torch.Tensor, type, type(twin_of), type(torch))


def changes(before: Twin, after: Twin) -> dict[Place, Any]:
    """New plain values, by place, of two twins of the same structure; MISSING: gone."""
    out: dict[Place, Any] = {}
    for name, new in after.attributes.items():
        old = before.attributes[name]
        for path in {**old, **new}:
            was, now = old.get(path, MISSING), new.get(path, MISSING)
            if not same(was, now):
                out[name, path] = now
    return out


def same(a: Any, b: Any) -> bool:
    """Whether two plain values are equal, in type, too; NaN equals itself."""
    return type(a) is type(b) and (a == b or str(a) == str(b) == "nan")


def without(twin: Twin, stacks: tuple[Stack, ...]) -> Twin:
    """A twin without the layers that are gone.

    Args:
        twin: Of the dense model.
        stacks: Which layers stay.
    """
    if not stacks:
        return twin
    gone = tuple(f"{h}.{i}." for s in stacks for h in s.holders for i in s.gone)

    def left(values: Mapping[str, _ValueT]) -> dict[str, _ValueT]:
        return {name: v for name, v in values.items() if not f"{name}.".startswith(gone)}

    return Twin(twin.model, left(twin.kinds), left(twin.shapes), left(twin.attributes))


def alike(before: Twin, after: Twin) -> bool:
    """Whether two twins have the same modules, classes and names of tensors."""
    return before.kinds == after.kinds and before.shapes.keys() == after.shapes.keys()


def settle(model: nn.Module, values: Mapping[Place, Any]) -> None:
    """Set plain values in a model's modules and in the objects that hang from them.

    Args:
        model: It is changed.
        values: New values by place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for (name, path), value in values.items():
        holder: Any = vars(modules[name])
        for step in path[:-1]:
            held = holder[step]
            holder = held if isinstance(held, dict) else vars(held)
        if value is MISSING:
            holder.pop(path[-1], None)
        else:
            holder[path[-1]] = value
