"""Taint: which elements of a tensor depend on the model's inputs. The table of its rules.

Taint is 1 where an element depends on an input (or on random numbers), 0 where it is the same for
every input. It is derived from the operator, never from how values look; an operator without a rule
taints all that it returns. A product is not tainted where one factor is an untainted zero: what the
other factor holds is taken to be finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from depcut.graph.arguments import argument, has_argument, with_changes
from depcut.graph.operators import is_operator, may_draw
from depcut.ops.registry import Table, is_pointwise_rule
from depcut.support.torch_private import pytree

TaintRule = Callable[["TaintedOp"], Any]

TAINTS: Table[TaintRule] = Table("taint rule")

ALL = 1.0  # the taint of a result of which every element is tainted
NOTHING = 0.0


def taints(*targets: str) -> Callable[[TaintRule], TaintRule]:
    """Register a taint rule; returning None taints everything.

    Args:
        targets: Operator names as for `rule`.

    Raises:
        RuleError: One of the targets has a taint rule already.
    """
    return TAINTS.register(*targets)


class TaintedOp:
    """One node as its taint rule sees it, before it is executed.

    Attributes:
        node: The graph node.
        values: Values of the nodes before it.
        taints: Their taints: float32 tensors of the same shapes, numbers for numbers.
    """

    def __init__(self, node: fx.Node, values: dict[fx.Node, Any], taints: dict[fx.Node, Any]):
        self.node, self.values, self.taints = node, values, taints

    def arg(self, name: str) -> Any:
        """The argument of that name as the graph has it, its default, or None: there is none."""
        return argument(self.node, name) if has_argument(self.node, name) else None

    def value(self, given: Any) -> Any:
        """The value of an argument."""
        return self.values[given] if isinstance(given, fx.Node) else given

    def taint(self, given: Any) -> Any:
        """The taint of an argument; 0 for what is no node."""
        return self.taints[given] if isinstance(given, fx.Node) else NOTHING

    def nonzero(self, given: Any) -> Any:
        """1 where an argument is not an untainted zero."""
        value = self.value(given)
        if not isinstance(value, Tensor):
            return float(value != 0)
        return torch.maximum(self.taint(given), (value != 0).float())

    def run(self, pick: Callable[[fx.Node], Any], changes: Mapping[str, Any] | None = None) -> Any:
        """The operator on other tensors; `changes` replaces arguments by name."""

        def choose(node: fx.Node) -> Any:
            return pick(node) if isinstance(self.values[node], Tensor) else self.values[node]

        replaced: Any = fx.map_arg(with_changes(self.node, changes or {}), choose)
        return self.node.target(*replaced[0], **replaced[1])  # type: ignore[operator]

    @property
    def inputs(self) -> list[fx.Node]:
        """Input nodes whose value is not None."""
        return [n for n in self.node.all_input_nodes if self.values.get(n) is not None]


def tainted(taint: Any) -> bool:
    """Whether any element of a taint is positive."""
    return any(bool((torch.as_tensor(leaf) > 0).any()) for leaf in pytree.tree_leaves(taint))


def derived(op: TaintedOp) -> Any:
    """Taint of an operator's result as its rule has it: None for all of it, 0.0 for nothing."""
    node = op.node
    rule = TAINTS.find(node.target)
    if rule is None and may_draw(node):
        return None
    if rule is None and is_operator(node) and is_pointwise_rule(node.target):
        rule = TAINTS["pointwise"]
    taint = None
    if rule is not None:
        try:
            taint = rule(op)
        except Exception:  # a form of the operator that the rule does not know
            if os.environ.get("DEPCUT_STRICT"):
                raise
    clean = not may_draw(node) and not any(tainted(op.taint(n)) for n in op.inputs)
    return NOTHING if taint is None and clean else taint


# What rules of several families share ----------------------------------------------------------


def moved(op: TaintedOp) -> Any:
    """Every element of the result is an element of an operand, or a zero."""
    return op.run(op.taint)


def is_moved(node: fx.Node) -> bool:
    """Whether the taint of an operator's result may be a view of its operand's, as its value is."""
    return TAINTS.find(node.target) is moved


def multilinear(op: TaintedOp, names: Sequence[str], *, added: str = "", bare: bool = False) -> Any:
    """Count the tainted products of every sum by running the operator on ones and zeros.

    Args:
        op: An operator that sums products of operands.
        names: Those of the operands.
        added: Name of an argument that is added, and is left aside.
        bare: A constant operand is tainted, too, unless it is zero.
    """
    operands = [op.arg(name) for name in names]
    filled = [op.nonzero(operand) for operand in operands]
    changes = {added: None} if added and op.arg(added) is not None else {}

    def count(factors: Sequence[Any]) -> Any:
        return op.run(op.taint, {**dict(zip(names, factors, strict=True)), **changes})

    total = count(filled) if bare else count([op.taint(operands[0]), *filled[1:]])
    for i in range(1, 0 if bare else len(operands)):
        if tainted(op.taint(operands[i])):
            total = total + count([*filled[:i], op.taint(operands[i]), *filled[i + 1 :]])
    # The sums are whole numbers; fast algorithms of convolution return them rounded.
    return (total > 0.5).float()


def varying(op: TaintedOp, node: Any) -> Any:
    """1 where a column is tainted or differs from row to row; of one row for all of them."""
    value, taint = op.value(node), op.taint(node)
    same = torch.isclose(value, value[..., :1, :], rtol=resolution(value), atol=0)
    return torch.maximum(taint, (~same).float()).amax(-2, keepdim=True)


def resolution(value: Tensor) -> float:
    """The relative difference that two computations of one number may show."""
    return 16 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
