"""What a module tree is, as plain data: classes by name, patches, attributes, tensors by number.

Atoms of JSON and lists are themselves; everything else is an object of one entry, whose name says
what it is. Modules, objects and tensors stand in tables and are referred to by number, so that what
is shared is shared again.
"""

from __future__ import annotations

import enum
import functools
import math
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from depcut.capture.references import referent_of
from depcut.rewrite.attention import SlimMultiheadAttention
from depcut.rewrite.generated import GeneratedModule
from depcut.rewrite.patches import PATCHES
from depcut.storage import graphs
from depcut.storage.edits import patch_data
from depcut.storage.names import name_of
from depcut.storage.tensors import TensorTable
from depcut.support.refusal import Refusal
from depcut.support.torch_private import (
    buffers_of,
    children_of,
    hooks_of,
    non_persistent_of,
    parameters_of,
    registries,
)

_MOST_OBJECTS = 10_000  # what refers to more is no part of a model: it is known by its class alone
_SCALARS = (torch.dtype, torch.layout, torch.memory_format)


class Description:
    """The tables of a model; the model itself is the first module.

    Args:
        model: The model; it is only read.

    Attributes:
        modules: Class, patches, children, tensors and attributes of each module.
        objects: Class and attributes of each object that a module refers to; None for the
            attributes of one that is known by its class alone.
        tensors: Parameters, buffers and other tensors.

    Raises:
        InputError: A tensor cannot be stored.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self.tensors = TensorTable()
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._state(model)
        self._module(model, "")

    def data(self) -> dict[str, Any]:
        """The tables as plain data."""
        return {"modules": self.modules, "objects": self.objects, "tensors": self.tensors.slots}

    def _state(self, model: nn.Module) -> None:
        """Number the tensors of the model's state first, by the names that they have there."""
        for path, module in model.named_modules():
            for held in (parameters_of, buffers_of):
                for name, tensor in held(module).items():
                    if tensor is not None and name not in non_persistent_of(module):
                        self.tensors.add(tensor, _joined(path, name), True)

    def _module(self, module: nn.Module, path: str) -> int:
        known = self._numbers.get(id(module))
        if known is not None:
            return known
        self._alive.append(module)
        number = self._numbers[id(module)] = len(self.modules)
        record: dict[str, Any] = {"path": path}
        self.modules.append(record)
        record.update(_class_of(module))
        for key, held in (("parameters", parameters_of), ("buffers", buffers_of)):
            record[key] = {
                name: None
                if tensor is None
                else self.tensors.add(tensor, _joined(path, name), False)
                for name, tensor in held(module).items()
            }
        record["transient"] = sorted(non_persistent_of(module))
        record["children"] = {
            name: None if child is None else self._module(child, _joined(path, name))
            for name, child in children_of(module).items()
        }
        record["hooks"] = {n: [name_of(f) for f in v] for n, v in hooks_of(module).items()}
        skipped = registries() | (graphs.OWN if isinstance(module, GeneratedModule) else set())
        record["attributes"] = {
            name: self.value(value, _joined(path, name))
            for name, value in vars(module).items()
            if name not in skipped
        }
        if isinstance(module, GeneratedModule):
            record["generated"] = graphs.generated_data(module, self.value)
        return number

    def value(self, value: Any, path: str) -> Any:
        """Any value as plain data.

        Args:
            value: What a module, an object or a container holds.
            path: Where, for the names of tensors.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is list:
            return [self.value(v, f"{path}.{i}") for i, v in enumerate(value)]
        for type_, describe in _KINDS.items():
            if isinstance(value, type_):
                return describe(self, value, path)
        return {"object": self._object(value, path)}

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        return {"tensor": self.tensors.add(value, path, False)}

    def _module_value(self, value: nn.Module, path: str) -> Any:
        return {"module": self._module(value, path)}

    def _tuple(self, value: tuple[Any, ...], path: str) -> Any:
        items = [self.value(v, f"{path}.{i}") for i, v in enumerate(value)]
        return {"tuple": items} if type(value) is tuple else {"tuple": items, "of": _kind(value)}

    def _mapping(self, value: dict[Any, Any], path: str) -> Any:
        pairs = [[self.value(k, path), self.value(v, f"{path}.{k}")] for k, v in value.items()]
        return {"dict": pairs} if type(value) is dict else {"dict": pairs, "of": _kind(value)}

    def _set(self, value: set[Any] | frozenset[Any], path: str) -> Any:
        items = [self.value(v, path) for v in value]
        return {"set": sorted(items, key=repr), "of": _kind(value)}

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        try:
            tensor = torch.from_numpy(np.array(value))
        except TypeError:  # of texts, or objects
            return {"object": self._object(value, path)}
        return {"array": self.tensors.add(tensor, path, False)}

    def _partial(self, value: functools.partial[Any], path: str) -> Any:
        parts = (value.func, tuple(value.args), value.keywords)
        return {"partial": [self.value(part, path) for part in parts]}

    def _method(self, value: types.MethodType, path: str) -> Any:
        return {"method": [self.value(value.__self__, path), value.__name__]}

    def _weak(self, value: Any, path: str) -> Any:
        return {"weak": self.value(referent_of(value), path)}

    def _object(self, value: Any, path: str) -> int:
        known = self._numbers.get(id(value))
        if known is not None:
            return known
        self._alive.append(value)
        number = self._numbers[id(value)] = len(self.objects)
        record: dict[str, Any] = {"path": path, "class": _kind(value), "attributes": None}
        self.objects.append(record)
        if is_plain_object(value) and len(self.objects) < _MOST_OBJECTS:
            record["attributes"] = {
                name: self.value(held, f"{path}.{name}") for name, held in vars(value).items()
            }
        return number


def class_name(description: Description) -> str:
    """The name of the class that a model has, or had before it was generated.

    Args:
        description: Of the model.
    """
    first = description.modules[0]
    if "generated" not in first:
        return str(first["class"])
    module, _, name = str(first["generated"]["replaces"]).rpartition(".")
    return f"{module}:{name}"


def is_plain_object(value: Any) -> bool:
    """Whether an object is what its attributes say: its class adds no state or protocol.

    Args:
        value: The object.
    """
    kind: Any = type(value)
    usual = kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
    return usual and hasattr(value, "__dict__") and not isinstance(value, types.ModuleType)


def _class_of(module: nn.Module) -> dict[str, Any]:
    """The class of a module, and what depcut made of it."""
    kind, patches = getattr(type(module), PATCHES, (type(module), ()))
    record: dict[str, Any] = {}
    if issubclass(kind, SlimMultiheadAttention):
        record["slim_attention"] = True
        kind = getattr(kind, "slim_of", nn.MultiheadAttention)
    record["class"] = name_of(kind)
    if patches:
        record["patches"] = [patch_data(patch) for patch in patches]
    return record


def _kind(value: object) -> str:
    return name_of(type(value))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _scalar(_: Description, value: Any, __: str) -> Any:
    return {"torch": str(value).removeprefix("torch.")}


_KINDS: dict[Any, Any] = {
    torch.Tensor: Description._tensor,
    nn.Module: Description._module_value,
    _SCALARS: _scalar,
    torch.device: lambda _, value, __: {"device": str(value)},
    enum.Enum: lambda _, value, __: {"enum": value.name, "of": _kind(value)},
    (bool, int): lambda _, value, __: {"int": int(value), "of": _kind(value)},
    float: lambda _, value, __: {"float": repr(float(value)), "of": _kind(value)},
    str: lambda _, value, __: {"text": str.__str__(value), "of": _kind(value)},
    tuple: Description._tuple,
    list: lambda self, value, path: {
        "list": [self.value(v, path) for v in value],
        "of": _kind(value),
    },
    dict: Description._mapping,
    (set, frozenset): Description._set,
    (range, slice): lambda _, value, __: {
        type(value).__name__: [value.start, value.stop, value.step]
    },
    complex: lambda _, value, __: {"complex": repr(value)},
    (bytes, bytearray): lambda _, value, __: {"bytes": bytes(value).hex()},
    np.ndarray: Description._array,
    Refusal: lambda _, value, __: {"refusal": vars(value)},
    functools.partial: Description._partial,
    types.MethodType: Description._method,
    (weakref.ref, *weakref.ProxyTypes): Description._weak,
    (type, types.FunctionType, types.BuiltinFunctionType): lambda _, value, __: {
        "name": name_of(value)
    },
}
