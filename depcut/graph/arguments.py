"""The arguments of a node by the names that its operator's schema gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import fx

from depcut.support.torch_private import schema_of

Call = Mapping[str, Any]  # an operator's arguments by schema name
Path = tuple[int | str, ...]  # to an argument of a node, or into one: args[0][1] is (0, 1)


@dataclass(frozen=True)
class Argument:
    """One argument of an operator.

    Attributes:
        position: Among all arguments; a keyword-only one has a position, too.
        default: None where there is none.
        aliased: Whether a result may share its storage, or it is written to.
        written: Whether the operator writes to it.
    """

    position: int
    default: Any
    aliased: bool
    written: bool


@lru_cache(maxsize=4096)
def schema(target: Any) -> dict[str, Argument]:
    """The arguments of an operator in their order; empty for a function without a schema."""
    operator_schema = schema_of(target)
    return {
        a.name: Argument(
            i,
            a.default_value if a.has_default_value() else None,
            a.alias_info is not None,
            a.alias_info is not None and a.alias_info.is_write,
        )
        for i, a in enumerate(operator_schema.arguments if operator_schema is not None else ())
    }


def has_argument(node: fx.Node, name: str) -> bool:
    """Whether the operator's schema has an argument of that name."""
    return name in schema(node.target)


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name as the graph has it, or its default.

    Raises:
        KeyError: The operator has no such argument.
    """
    known = schema(node.target)[name]
    if known.position < len(node.args):
        return node.args[known.position]
    return node.kwargs.get(name, known.default)


def bound(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Values of a node's arguments by schema name, defaults included.

    Args:
        node: The node.
        args: Values of its positional arguments.
        kwargs: Values of its keyword arguments.
    """
    known = schema(node.target)
    given = {**dict(zip(known, args, strict=False)), **kwargs}
    return {name: given.get(name, a.default) for name, a in known.items()}


def path_of(node: fx.Node, name: str, *sub: int) -> Path | None:
    """Where an argument, or an item of it, stands in the node; None where it is left to default."""
    position = schema(node.target)[name].position
    if position < len(node.args):
        return (position, *sub)
    return (name, *sub) if name in node.kwargs else None


def with_changes(
    node: fx.Node, changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of a node with some of them replaced, by schema name.

    Args:
        node: The node.
        changes: New values; names that the operator does not have are left out.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changes.items():
        known = schema(node.target).get(name)
        if known is not None and known.position < len(args):
            args[known.position] = value
        elif known is not None:
            kwargs[name] = value
    return tuple(args), kwargs


def replaced(container: Any, path: Path, value: Any) -> Any:
    """A copy of nested lists with the item at a path replaced.

    Args:
        container: Lists or tuples of anything.
        path: Positions from the outermost list inwards; empty: `value` itself is returned.
        value: What to put there.
    """
    if not path:
        return value
    items: Any = list(container)
    items[path[0]] = replaced(items[path[0]], path[1:], value)
    return items


def values_of(
    node: fx.Node, values: Mapping[fx.Node, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of a node with values in place of nodes."""
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    return tuple(args), dict(kwargs)


def sources_of_storage(node: fx.Node) -> Iterator[tuple[bool, fx.Node]]:
    """(whether it is written to, node) for the arguments whose storage a node uses."""
    for name, known in schema(node.target).items() if node.op == "call_function" else ():
        value = argument(node, name) if known.aliased else None
        for leaf in value if isinstance(value, list | tuple) else (value,):
            if isinstance(leaf, fx.Node):
                yield known.written, leaf


def written(node: fx.Node) -> list[fx.Node]:
    """Arguments that a node changes in place."""
    return [source for is_written, source in sources_of_storage(node) if is_written]
