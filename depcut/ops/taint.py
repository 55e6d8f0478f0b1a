"""Taint: which elements of a tensor depend on the model's inputs. The table of its rules.

Taint is 1 where an element depends on an input (or on random numbers), 0 where it is the same for
every input. It is derived from the operator, never from how values look; an operator without a rule
taints all that it returns. A product is not tainted where one factor is an untainted zero: what the
other factor holds is taken to be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from depcut.support.torch_private import pytree

TaintRule = Callable[["Step"], Any]

RULES: dict[str, TaintRule] = {}


def base_name(node: fx.Node) -> str:
    """An operator's name without namespace, overload and the mark of working in place."""
    name = str(node.target).partition(".")[2].partition(".")[0]
    return name if name.startswith("__") else name.rstrip("_")


class Step:
    """One node as its taint rule sees it, before it is executed.

    Attributes:
        node: The graph node.
        values: Values of the nodes before it.
        taints: Their taints: float32 tensors of the same shapes, numbers for numbers.
    """

    def __init__(self, node: fx.Node, values: dict[fx.Node, Any], taints: dict[fx.Node, Any]):
        self.node, self.values, self.taints = node, values, taints

    def arg(self, name: str) -> Any:
        """The argument of that name as the graph has it, or its default."""
        for i, argument in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name == name:
                if i < len(self.node.args):
                    return self.node.args[i]
                return self.node.kwargs.get(name, argument.default_value)
        return None

    def value(self, argument: Any) -> Any:
        """The value of an argument."""
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def taint(self, argument: Any) -> Any:
        """The taint of an argument; 0 for what is no node."""
        return self.taints[argument] if isinstance(argument, fx.Node) else 0.0

    def nonzero(self, argument: Any) -> Any:
        """1 where an argument is not an untainted zero."""
        value = self.value(argument)
        if not isinstance(value, Tensor):
            return float(value != 0)
        return torch.maximum(self.taint(argument), (value != 0).float())

    def run(self, pick: Callable[[fx.Node], Any], changes: Mapping[str, Any] | None = None) -> Any:
        """The operator on other tensors; `changes` replaces arguments by name."""
        schema = getattr(self.node.target, "_schema", None)
        arguments = schema.arguments if changes and schema else ()
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for i, argument in enumerate(arguments):
            if changes and argument.name in changes:
                if i < len(args):
                    args[i] = changes[argument.name]
                else:
                    kwargs[argument.name] = changes[argument.name]

        def choose(node: fx.Node) -> Any:
            return pick(node) if isinstance(self.values[node], Tensor) else self.values[node]

        made: Any = fx.map_arg((args, kwargs), choose)
        return self.node.target(*made[0], **made[1])  # type: ignore[operator]

    @property
    def inputs(self) -> list[fx.Node]:
        """Nodes whose value the operator takes and that hold something."""
        return [n for n in self.node.all_input_nodes if self.values.get(n) is not None]


def tainted(taint: Any) -> bool:
    """Whether any element is."""
    return any(bool((torch.as_tensor(leaf) > 0).any()) for leaf in pytree.tree_leaves(taint))


def taints(*names: str) -> Callable[[TaintRule], TaintRule]:
    """Register a taint rule; returning None taints everything."""

    def register(rule: TaintRule) -> TaintRule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = rule
        return rule

    return register
