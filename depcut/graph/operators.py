"""Names of the operators of a captured graph, and their properties by schema and tags."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from depcut.graph.arguments import schema
from depcut.support.torch_private import enter_autocast, exit_autocast, schema_of

_ARITHMETIC = frozenset({operator.mul, operator.add, operator.sub, operator.floordiv})
_SIZES = frozenset({torch.ops.aten.sym_size.int, torch.ops.aten.sym_size.default})
_CASTS = frozenset({"to", "contiguous", "type_as"})  # they may return the very tensor they got
MODE_FLAGS = ("train", "training")  # flags without which a dropout draws nothing
# Arguments by which an operator that may draw does not: a mode, or a probability of zero.
_SWITCHES = frozenset({*MODE_FLAGS, "p", "dropout", "dropout_p"})


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator with a schema, no Python function."""
    return node.op == "call_function" and schema_of(node.target) is not None


@lru_cache(maxsize=4096)
def names_of(target: Any) -> tuple[str, ...]:
    """Names of an operator from the narrowest to the widest.

    E.g. "aten.addmm_.default", "aten.addmm_" and, as it works in place of it, "aten.addmm".
    """
    full = str(target)
    space, _, rest = full.partition(".")
    name, _, overload = rest.partition(".")
    wide = f"{space}.{name}"
    plain = f"{space}.{_functional(name)}"
    return tuple(dict.fromkeys([full, *([wide, plain] if overload else [])]))


@lru_cache(maxsize=4096)
def in_any_layout(target: Any) -> Any:
    """The operator that computes the same wherever its operands lie in memory.

    The layouts of a capture, after which `contiguous` leaves no node, are not those of a run.
    """
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


def base_of(target: Any) -> str:
    """An operator's name without namespace, overload and the mark of working in place."""
    return _functional(str(target).partition(".")[2].partition(".")[0])


def _functional(name: str) -> str:
    """A name without the mark of working in place."""
    return name if name.startswith("__") else name.rstrip("_")


def base_name(node: fx.Node) -> str:
    """An operator's name without namespace, overload and the mark of working in place.

    E.g. "add" of aten.add_.Tensor; "" of a Python function such as operator.getitem.
    """
    return base_of(node.target) if node.op == "call_function" else ""


def is_aten(node: fx.Node, *names: str) -> bool:
    """Whether a node calls one of torch's own operators of these base names."""
    return base_name(node) in names and names_of(node.target)[0].startswith("aten.")


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one item of a list that an operator returned."""
    return node.target is operator.getitem


def is_arithmetic(node: fx.Node) -> bool:
    """Whether a node is Python arithmetic, as that of dynamic sizes is."""
    return node.target in _ARITHMETIC


def is_size(node: fx.Node) -> bool:
    """Whether a node reads a size off a tensor or computes with such sizes.

    Where the tensor is dead, the size can be had elsewhere.
    """
    if node.target in _SIZES:
        return True
    return is_arithmetic(node) and isinstance(node.meta.get("val"), torch.SymInt | int)


def is_mutating(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    operator_schema = schema_of(node.target)
    return operator_schema is not None and operator_schema.is_mutable


def enters_autocast(node: fx.Node) -> bool:
    """Whether an autocast region begins at a node, which is its token then."""
    return node.target is enter_autocast


def leaves_autocast(node: fx.Node) -> bool:
    """Whether the autocast region whose token is a node's first input ends there."""
    return node.target is exit_autocast


@lru_cache(maxsize=4096)
def has_tag(target: Any, tag: torch.Tag) -> bool:
    """Whether torch tags an operator so; functions without tags have none."""
    return tag in getattr(target, "tags", ())


def is_pointwise(target: Any) -> bool:
    """Whether torch says that an operator works element by element."""
    return has_tag(target, torch.Tag.pointwise)


def may_draw(node: fx.Node) -> bool:
    """Whether torch says that an operator draws random numbers, in some mode at least."""
    return has_tag(node.target, torch.Tag.nondeterministic_seeded)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers: dropouts do in training, with a probability."""
    return draws(node.target, node.args, node.kwargs)


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers: dropouts do in training.

    Args:
        target: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if not has_tag(target, torch.Tag.nondeterministic_seeded):
        return False
    for name, known in schema(target).items():
        if name in _SWITCHES:
            given = args[known.position] if known.position < len(args) else kwargs.get(name)
            off = known.default if given is None else given
            if isinstance(off, bool | int | float) and not off:
                return False
    return True


def returns_its_input(node: fx.Node) -> bool:
    """Whether a cast gives back the very tensor that it got."""
    if not is_aten(node, *_CASTS):
        return False
    source = node.args[0]
    was = source.meta.get("val") if isinstance(source, fx.Node) else None
    now = node.meta.get("val")
    if not isinstance(was, torch.Tensor) or not isinstance(now, torch.Tensor):
        return False
    same = (was.dtype, was.device, was.layout) == (now.dtype, now.device, now.layout)
    return same and tuple(map(str, was.stride())) == tuple(map(str, now.stride()))
