"""The model that a description tells of, made of a dense one (or of what is as it was then)."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from depcut.capture.references import referent_of
from depcut.errors import PlanError
from depcut.rewrite.attention_heads import make_slim
from depcut.rewrite.patches import patched_class
from depcut.storage import graphs
from depcut.storage.edits import patch_of
from depcut.storage.names import is_same, name_of
from depcut.storage.tensors import Loaded
from depcut.storage.values import is_plain_object
from depcut.support.refusal import Refusal
from depcut.support.torch_private import (
    buffers_of,
    children_of,
    hooks_of,
    non_persistent_of,
    parameters_of,
    pytree,
    registries,
)

_IDENTITY = name_of(nn.Identity)
_MISSING: Any = object()
# Of depcut itself, objects that hold plain data alone, and that no dense model has.
_OURS: dict[str, type] = {name_of(Refusal): Refusal}


class Rebuild:
    """Turns a freshly built model into the one described, module by module.

    What the description says, the model has afterwards: classes (patched again, from the hash of
    their source), children, tensors, attributes. Whatever cannot be made of plain data is taken
    from the built model, and must be of the same class.

    Args:
        data: The tables, as `Description.data`.
        tensors: The tensors.
        remedy: What to do where the built model is another architecture.
    """

    def __init__(self, data: dict[str, Any], tensors: Loaded, remedy: str) -> None:
        self._modules, self._objects = data["modules"], data["objects"]
        self._tensors, self._remedy = tensors, remedy
        self._made: dict[int, nn.Module] = {}
        self._used: dict[int, str] = {}
        self._alive: list[nn.Module] = []  # an id stays one module's as long as that lives
        self._copies: dict[int, Any] = {}

    def model(self, built: nn.Module) -> nn.Module:
        """The model.

        Args:
            built: The model that it is made of; it is used up.

        Raises:
            PlanError: It is another architecture, or its source is another one.
            ValueError: The description is damaged.
        """
        return self._module(0, built)

    def _differs(self, what: str, path: str) -> PlanError:
        return PlanError(
            f"the folder holds another architecture: {what}",
            where=path or "the model itself",
            remedy=self._remedy,
        )

    def _module(self, number: int, built: Any) -> nn.Module:
        if number in self._made:
            return self._made[number]
        record = self._modules[number]
        path = record["path"]
        generated = "generated" in record
        if not isinstance(built, nn.Module) and record["class"] != _IDENTITY:
            raise self._differs(f"there is no {record['class']} in the one at hand", path)
        if record["class"] == _IDENTITY and type(built) is not nn.Identity:
            built = nn.Identity()
        if self._used.setdefault(id(built), path) != path:
            raise self._differs(f"{self._used[id(built)]} is the same module as {path}", path)
        module: nn.Module | None = built
        if generated:
            module = graphs.generated_from(built, record["generated"])
        elif not is_same(record["class"], name_of(type(built))):
            module = None
        if module is None:
            wanted = record["generated"]["replaces"] if generated else record["class"]
            kinds = f"{name_of(type(built))} in place of {wanted}"
            raise self._differs(f"the one at hand has a {kinds}", path)
        self._made[number] = module
        self._alive.append(built)
        self._set_class(module, record)
        self._fill(module, record)
        if generated:
            value = functools.partial(self.value, path=path)
            graphs.restore_generated(module, record["generated"], value)
        return module

    def _set_class(self, module: nn.Module, record: dict[str, Any]) -> None:
        if record.get("slim_attention"):
            if not isinstance(module, nn.MultiheadAttention):
                raise ValueError(f"{record['path']} is no attention")
            make_slim(module, module)
        for data in record.get("patches", ()):
            patch = patch_of(data)
            module.__class__ = patched_class(type(module), patch)

    def _fill(self, module: nn.Module, record: dict[str, Any]) -> None:
        path = record["path"]
        hooks = {name: [name_of(f) for f in fs] for name, fs in hooks_of(module).items()}
        if hooks != record["hooks"]:
            text = f"hooks {hooks or 'none'} in place of {record['hooks'] or 'none'}"
            raise self._differs(f"the one at hand has the {text}", path)
        for key, held in (("parameters", parameters_of), ("buffers", buffers_of)):
            tensors: Any = held(module)
            new = {
                name: None if slot is None else self._tensors.get(slot, tensors.get(name))
                for name, slot in record[key].items()
            }
            tensors.clear()
            tensors.update(new)
        transient = non_persistent_of(module)
        transient.clear()
        transient.update(record["transient"])
        children = children_of(module)
        made = {
            name: None if number is None else self._module(number, children.get(name))
            for name, number in record["children"].items()
        }
        children.clear()
        children.update(made)
        fields = vars(module)
        values = {
            name: self.value(data, fields.get(name, _MISSING), f"{path}.{name}".lstrip("."))
            for name, data in record["attributes"].items()
        }
        for name in [*fields]:
            if name not in registries() and name not in graphs.OWN:
                del fields[name]
        fields.update(values)

    def value(self, data: Any, built: Any = _MISSING, path: str = "") -> Any:
        """The value that plain data describe.

        Args:
            data: The description.
            built: What the built model has in its place.
            path: Where it stands.
        """
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            items = built if type(built) is list else ()
            return [self.value(d, *_at(items, i), path) for i, d in enumerate(data)]
        kind = next(iter(data))
        make = _MAKERS.get(kind)
        if make is None:
            raise ValueError(f"{path} is described as a {kind!r}")
        return make(self, data, built, path)

    def _same_kind(self, data: dict[str, Any], built: Any, path: str) -> None:
        if built is _MISSING or not is_same(data["of"], name_of(type(built))):
            have = "nothing" if built is _MISSING else name_of(type(built))
            raise self._differs(f"the one at hand has {have} in place of {data['of']}", path)

    def _plain(self, data: Any, built: Any, path: str) -> Any:
        """A number or text of a class that is not Python's."""
        ((_, held), *_) = data.items()
        if "of" not in data:
            return float(held)
        self._same_kind(data, built, path)
        if repr(built) == repr(type(built)(held)):
            return built
        return type(built)(held)

    def _tuple(self, data: Any, built: Any, path: str) -> Any:
        items = built if isinstance(built, tuple) else ()
        new = tuple(self.value(d, *_at(items, i), path) for i, d in enumerate(data["tuple"]))
        if "of" not in data:
            return new
        if data["of"] == name_of(torch.Size):
            return torch.Size(new)
        self._same_kind(data, built, path)
        return type(built)(*new) if pytree.is_namedtuple_class(type(built)) else type(built)(new)

    def _list(self, data: Any, built: Any, path: str) -> Any:
        self._same_kind(data, built, path)
        new = copy.copy(built)
        new[:] = [self.value(d, *_at(built, i), path) for i, d in enumerate(data["list"])]
        return new

    def _mapping(self, data: Any, built: Any, path: str) -> Any:
        old = built if isinstance(built, dict) else {}
        new, keys = {}, list(old)
        for i, (key_data, held) in enumerate(data["dict"]):
            key = self.value(key_data, *_at(keys, i), path)
            new[key] = self.value(held, old.get(key, _MISSING), f"{path}[{key!r}]")
        if "of" not in data:
            return new
        if built is _MISSING and data["of"] == name_of(OrderedDict):
            return OrderedDict(new)
        self._same_kind(data, built, path)
        out = copy.copy(built)
        out.clear()
        out.update(new)
        return out

    def _set(self, data: Any, built: Any, path: str) -> Any:
        old = sorted(built, key=repr) if isinstance(built, set | frozenset) else []
        items = [self.value(d, *_at(old, i), path) for i, d in enumerate(data["set"])]
        if data["of"] in ("builtins:set", "builtins:frozenset"):
            return {"builtins:set": set, "builtins:frozenset": frozenset}[data["of"]](items)
        self._same_kind(data, built, path)
        return type(built)(items)

    def _enum(self, data: Any, built: Any, path: str) -> Any:
        self._same_kind(data, built, path)
        return type(built)[data["enum"]]

    def _torch(self, data: Any, _: Any, path: str) -> Any:
        value = getattr(torch, data["torch"], None)
        if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            raise ValueError(f"{path} is described as torch.{data['torch']}")
        return value

    def _tensor(self, data: Any, built: Any, _: str) -> Any:
        return self._tensors.get(data["tensor"], built if isinstance(built, torch.Tensor) else None)

    def _array(self, data: Any, built: Any, _: str) -> Any:
        if self._tensors.is_meta:
            return built
        return self._tensors.get(data["array"], None).cpu().numpy()

    def _weak(self, data: Any, built: Any, path: str) -> Any:
        weak = isinstance(built, weakref.ref | weakref.ProxyType | weakref.CallableProxyType)
        referent = self.value(data["weak"], referent_of(built) if weak else _MISSING, path)
        if referent is None:
            return built if weak else None
        is_proxy = weak and not isinstance(built, weakref.ref)
        return weakref.proxy(referent) if is_proxy else weakref.ref(referent)

    def _partial(self, data: Any, built: Any, path: str) -> Any:
        if not isinstance(built, functools.partial):
            raise self._differs("the one at hand has no function there", path)
        old = (built.func, built.args, built.keywords)
        function, args, keywords = (
            self.value(d, b, path) for d, b in zip(data["partial"], old, strict=True)
        )
        return type(built)(function, *args, **keywords)

    def _refusal(self, data: Any, _: Any, __: str) -> Any:
        """What stands in place of a method that would save what cannot be loaded."""
        return Refusal(**data["refusal"])

    def _method(self, data: Any, built: Any, path: str) -> Any:
        owner_data, name = data["method"]
        if not isinstance(built, types.MethodType) or built.__name__ != name:
            raise self._differs(f"the one at hand has no method {name} there", path)
        owner = self.value(owner_data, built.__self__, path)
        return built if owner is built.__self__ else types.MethodType(built.__func__, owner)

    def _named(self, data: Any, built: Any, path: str) -> Any:
        """A class or a function: that of the built model, where it has the name."""
        if built is not _MISSING and is_same(name_of(built), data["name"]):
            return built
        have = "nothing" if built is _MISSING else name_of(built)
        raise self._differs(f"the one at hand has {have} in place of {data['name']}", path)

    def _object(self, data: Any, built: Any, path: str) -> Any:
        number = data["object"]
        if number in self._copies:
            return self._copies[number]
        record = self._objects[number]
        if built is _MISSING and record["class"] in _OURS:
            built = object.__new__(_OURS[record["class"]])
        if built is _MISSING or not is_same(record["class"], name_of(type(built))):
            have = "nothing" if built is _MISSING else name_of(type(built))
            raise self._differs(f"the one at hand has {have} in place of {record['class']}", path)
        attributes = record["attributes"]
        if attributes is None or not is_plain_object(built):
            self._copies[number] = built
            return built
        new = self._copies[number] = copy.copy(built)
        fields = dict(vars(built))
        vars(new).clear()
        for name, held in attributes.items():
            vars(new)[name] = self.value(held, fields.get(name, _MISSING), f"{path}.{name}")
        return new


def _at(items: Any, index: int) -> tuple[Any]:
    return (items[index] if index < len(items) else _MISSING,)


_MAKERS: dict[str, Callable[[Rebuild, Any, Any, str], Any]] = {
    "float": Rebuild._plain,
    "int": Rebuild._plain,
    "text": Rebuild._plain,
    "tuple": Rebuild._tuple,
    "list": Rebuild._list,
    "dict": Rebuild._mapping,
    "set": Rebuild._set,
    "enum": Rebuild._enum,
    "torch": Rebuild._torch,
    "device": lambda _, data, __, ___: torch.device(data["device"]),
    "range": lambda _, data, __, ___: range(*data["range"]),
    "slice": lambda _, data, __, ___: slice(*data["slice"]),
    "complex": lambda _, data, __, ___: complex(data["complex"]),
    "bytes": lambda _, data, __, ___: bytes.fromhex(data["bytes"]),
    "tensor": Rebuild._tensor,
    "array": Rebuild._array,
    "module": lambda self, data, built, _: self._module(data["module"], built),
    "object": Rebuild._object,
    "name": Rebuild._named,
    "partial": Rebuild._partial,
    "refusal": Rebuild._refusal,
    "method": Rebuild._method,
    "weak": Rebuild._weak,
}
