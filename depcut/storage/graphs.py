"""Generated modules as plain data: their graph, and what they refuse calls by."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from depcut.errors import InputError
from depcut.rewrite.dropout import when_training
from depcut.rewrite.generated import GeneratedModule
from depcut.storage.names import is_same, name_of
from depcut.support.torch_private import enter_autocast, exit_autocast, pytree, schema_of

# What a generated module has beside the attributes of the one that it replaces; those that are not
# made from others.
_VALUES = ("replaces", "captured", "sizes", "precisions", "devices", "settings", "equal", "modal")
_SPECS = ("in_spec", "out_spec")
OWN = frozenset((*_VALUES, *_SPECS, "graph", "signature", "_run"))

# Functions that a graph may call beside operators of torch; no others are looked up by name.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator:{n}": getattr(operator, n) for n in dir(operator) if not n.startswith("_")},
    **{
        f"torch:{n}": f
        for n, f in vars(torch).items()
        if n.startswith("sym_") and callable(f) and n != "sym_fresh_size"
    },
    "depcut:when_training": when_training,
    "depcut:enter_autocast": enter_autocast,
    "depcut:exit_autocast": exit_autocast,
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_TEXTS = frozenset(("placeholder", "get_attr", "call_module", "output"))


def generated_data(module: GeneratedModule, described: Callable[[Any, str], Any]) -> dict[str, Any]:
    """What a generated module computes, as plain data.

    Args:
        module: The module.
        described: Gives a value, of the name that follows it, as plain data.

    Raises:
        InputError: Its graph calls a function that has no name.
    """
    data: dict[str, Any] = {n: described(vars(module)[n], n) for n in _VALUES}
    data |= {n: pytree.treespec_dumps(vars(module)[n]) for n in _SPECS}
    data["graph"] = [
        {
            "name": node.name,
            "kind": node.op,
            "target": _target(node),
            "args": described(_plain(node.args), node.name),
            "kwargs": described(_plain(node.kwargs), node.name),
        }
        for node in module.graph.nodes
    ]
    return data


class _Reference(str):
    """The name of a node among the arguments of another."""

    __slots__ = ()

    def __new__(cls, node: fx.Node) -> _Reference:
        """The reference to a node."""
        return super().__new__(cls, node.name)


def _plain(value: Any) -> Any:
    """Arguments with names in place of nodes, in Python's own containers."""
    if isinstance(value, fx.Node):
        return _Reference(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    return value


def _target(node: fx.Node) -> Any:
    schema = schema_of(node.target)
    if schema is not None:
        namespace, _, name = schema.name.partition("::")
        return {"operator": [namespace, name, schema.overload_name or "default"]}
    if isinstance(node.target, str):
        return node.target
    if node.target in _NAMES:
        return {"function": _NAMES[node.target]}
    raise InputError(
        f"a generated module calls {name_of(node.target)}, which cannot be stored by name",
        where=node.name,
        remedy='shrink with generated="never"',
    )


def generated_from(original: nn.Module, data: dict[str, Any]) -> GeneratedModule | None:
    """A generated module, still without a graph, that has all that the original has.

    Args:
        original: The module that it replaces.
        data: What `generated_data` gave.

    Returns:
        None: the original is of another class than the one that was replaced.
    """
    kind: type[nn.Module] = type(original)
    replaces = str(data["replaces"])
    if replaces == name_of(GeneratedModule).replace(":", "."):  # in its turn
        kind = GeneratedModule
    elif not is_same(f":{replaces.rpartition('.')[2]}", f":{kind.__name__}"):
        return None
    module = GeneratedModule.__new__(GeneratedModule)
    vars(module).update(vars(original))
    vars(module)["signature"] = inspect.signature(kind.forward)
    return module


def restore_generated(module: nn.Module, data: dict[str, Any], value: Callable[[Any], Any]) -> None:
    """Make a module what `generated_data` described.

    Args:
        module: Of the class `GeneratedModule`, with everything that the replaced one has.
        data: The description.
        value: Gives a value of its description.

    Raises:
        ValueError: The description is damaged.
    """
    fields = vars(module)
    fields |= {name: value(data[name]) for name in _VALUES}
    fields |= {name: pytree.treespec_loads(data[name]) for name in _SPECS}
    fields["graph"] = _graph(data["graph"], value)
    module._compile()  # type: ignore[operator]


def _graph(data: list[dict[str, Any]], value: Callable[[Any], Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def real(item: Any) -> Any:
        if isinstance(item, dict) and item.get("of") == name_of(_Reference):
            return nodes[item["text"]]
        if isinstance(item, list):
            return [real(each) for each in item]
        if isinstance(item, dict) and len(item) == 1:
            ((kind, held),) = item.items()
            if kind == "tuple":
                return tuple(map(real, held))
            if kind == "dict":
                return {real(k): real(v) for k, v in held}
            if kind == "slice":
                return slice(*map(real, held))
        return value(item)

    for each in data:
        name, kind = each["name"], each["kind"]
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"a node of a generated module is called {name!r}")
        target = _function(each["target"], kind)
        nodes[name] = graph.create_node(
            kind, target, real(each["args"]), real(each["kwargs"]), name
        )
    return graph


def _function(target: Any, kind: str) -> Any:
    """What a node refers to; what becomes source code is checked."""
    if isinstance(target, str):
        steps = target.split(".")
        if kind not in _TEXTS or not all(s.isidentifier() or s.isdecimal() for s in steps):
            raise ValueError(f"a node of a generated module has the target {target!r}")
        return target
    if kind != "call_function":
        raise ValueError(f"a node of a generated module is a {kind}")
    if "function" in target:
        return _FUNCTIONS[target["function"]]
    found: Any = torch.ops
    for step in target["operator"]:
        found = getattr(found, step)
    if schema_of(found) is None:
        raise ValueError(f"{'.'.join(target['operator'])} is no operator")
    return found
