"""Where in the source a number stands that a call of the torch API received."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depcut.capture.calls import Steps, TorchCall


@dataclass(frozen=True)
class Place:
    """An expression, and the item of its value.

    Attributes:
        node: The expression.
        steps: The item, where it gives a sequence.
    """

    node: ast.expr
    steps: Steps = ()


def place_of(call: TorchCall, steps: Steps) -> Place | None:
    """The expression that supplies a number; None where the call does not show it.

    Args:
        call: The call.
        steps: Where the number stands among its (args, kwargs).
    """
    node = call.frames[0].node if call.frames else None
    if isinstance(node, ast.Call):
        return _argument(node, call, steps)
    if isinstance(node, ast.Subscript) and steps[0] == 1:
        return _index(node.slice, steps[1:])
    if len(steps) != 1 or call.positional != 2:
        return None
    if isinstance(node, ast.AugAssign):
        return Place(node.value) if steps[0] == 1 else None
    if isinstance(node, ast.BinOp) and call.left is not None:
        return Place(node.left if call.left else node.right)
    if isinstance(node, ast.Compare) and call.left is not None:
        return Place(node.left if call.left else node.comparators[0])
    return None


def is_typed(node: ast.expr, function: ast.FunctionDef) -> bool:
    """Whether an expression is made of numbers typed in and attributes, so that no input matters.

    Args:
        node: The expression.
        function: The function it stands in, for the names that are assigned there once.
    """
    return _is_typed(node, function, frozenset())


def _is_typed(node: ast.expr, function: ast.FunctionDef, seen: frozenset[str]) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    if isinstance(node, ast.BinOp):
        return _is_typed(node.left, function, seen) and _is_typed(node.right, function, seen)
    if isinstance(node, ast.UnaryOp):
        return _is_typed(node.operand, function, seen)
    if isinstance(node, ast.Attribute):
        first = function.args.args[0].arg if function.args.args else None
        return isinstance(node.value, ast.Name) and node.value.id == first == "self"
    if isinstance(node, ast.Name) and node.id not in seen:
        values = _assigned(node.id, function)
        return len(values) == 1 and _is_typed(values[0], function, seen | {node.id})
    return False


def _assigned(name: str, function: ast.FunctionDef) -> list[ast.expr]:
    """What is assigned to a local name; twice the same where that cannot be told."""
    values: list[ast.expr] = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    ]
    plain = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == name
    ]
    return plain if len(plain) == len(values) else values * 2


def keyword_of(call: ast.Call, name: str) -> ast.expr | None:
    """What a call gives for a keyword."""
    return next((k.value for k in call.keywords if k.arg == name), None)


def _argument(node: ast.Call, call: TorchCall, steps: Steps) -> Place | None:
    names = _parameters(call.function)
    head = steps[0]
    name = head if isinstance(head, str) else (names[head] if head < len(names) else None)
    if name is not None:
        value = keyword_of(node, name)
        if value is not None:
            return _item(value, steps[1:])
    mappings = [k.value for k in node.keywords if k.arg is None]
    receiver = _receiver(node, call)
    if mappings:
        several = len(mappings) > 1 or any(isinstance(a, ast.Starred) for a in node.args)
        positional = not isinstance(head, str) and head - receiver < len(node.args)
        if several or (name is None and not positional):
            return None
        if not positional:
            return Place(mappings[0], (str(name), *steps[1:]))
    if isinstance(head, str):
        if head not in names:
            return None
        head = names.index(head)
    return _element(node.args, head - receiver, call.positional - receiver, steps[1:])


def _receiver(node: ast.Call, call: TorchCall) -> int:
    """1 where the first argument stands before the dot."""
    function = call.function
    if not isinstance(node.func, ast.Attribute):
        return 0
    name = getattr(function, "__name__", "")
    if getattr(torch.Tensor, name, None) is not function:
        return 0
    starred = any(isinstance(a, ast.Starred) for a in node.args)
    unbound = isinstance(node.func.value, ast.Attribute | ast.Name) and (
        ast.unparse(node.func.value).endswith("Tensor")
    )
    return 0 if unbound and not starred else 1


def _parameters(function: Any) -> list[str]:
    """Names of the parameters of a function of torch that is written in Python."""
    if not isinstance(function, types.FunctionType):
        return []
    return list(inspect.signature(function).parameters)


def _element(items: Sequence[ast.expr], index: int, count: int, steps: Steps) -> Place | None:
    """The item of a list of expressions that give `count` values, one of which may be starred."""
    starred = [i for i, item in enumerate(items) if isinstance(item, ast.Starred)]
    if not starred:
        return _item(items[index], steps) if index < len(items) else None
    [at, *others] = starred
    several = count - (len(items) - 1)
    if others or index < at:
        return _item(items[index], steps) if index < at else None
    if index < at + several:
        star: Any = items[at]
        return Place(star.value, (index - at, *steps))
    return _item(items[index - several + 1], steps)


def _item(node: ast.expr, steps: Steps) -> Place | None:
    """The expression of an item, as far as the code spells a sequence out."""
    if steps and isinstance(node, ast.Tuple | ast.List):
        before = node.elts[: int(steps[0]) + 1]
        if any(isinstance(e, ast.Starred) for e in before):
            return Place(node, steps)
        return _item(node.elts[int(steps[0])], steps[1:])
    if any(isinstance(step, str) for step in steps):
        return None
    return Place(node, steps)


def _index(node: ast.expr, steps: Steps) -> Place | None:
    """The expression of a bound of a slice, or of an index."""
    if not steps:
        return Place(node)
    if isinstance(node, ast.Tuple) and isinstance(steps[0], int):
        if any(isinstance(e, ast.Starred) for e in node.elts[: steps[0] + 1]):
            return None
        return _index(node.elts[steps[0]], steps[1:])
    if isinstance(node, ast.Slice):
        bound = {"start": node.lower, "stop": node.upper, "step": node.step}[str(steps[0])]
        return Place(bound) if bound is not None else None
    return None
