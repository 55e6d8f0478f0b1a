"""Constant propagation: which values of a captured graph do not depend on the model's inputs.

The graph runs on its example inputs, and beside every tensor runs its taint (`depcut.ops.taint`):
what is not tainted has the value seen for every input of these shapes. Views of taint follow views
of values, so that writes in place reach all who read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from depcut.capture.held import held_tensors
from depcut.capture.program import Program
from depcut.coupling.groups import Coupling
from depcut.graph.arguments import written
from depcut.graph.interpreter import Interpreter
from depcut.graph.operators import is_item
from depcut.ops.taint import TaintedOp, derived, is_moved, tainted
from depcut.plan.keep import Keep
from depcut.reference.run import Tensors, example
from depcut.support.torch_private import pytree


def interpret(
    coupling: Coupling,
    model: nn.Module | Tensors,
    look: Callable[[TaintedOp], None],
    leaves: Sequence[Any] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Run the captured graph on its example inputs, with the taint of every value.

    Args:
        coupling: The analysed architecture.
        model: The model whose tensors are read, or these by name; none is changed.
        look: Is shown every operator before it is executed.
        leaves: Flat inputs to run on; left out, the captured example.

    Returns:
        Flat outputs, and their taints.
    """
    held = held_tensors(model) if isinstance(model, nn.Module) else model
    run = _Run(coupling.program, held, look)
    if leaves is None:
        leaves = pytree.tree_leaves(example(Keep(coupling, {})))
    with torch.no_grad():
        outputs = run.run(leaves)
    return outputs, run.marks


class _Run(Interpreter):
    """One run on the example inputs, which computes a taint beside every value.

    Args:
        program: The captured graph.
        held: Every tensor that the model holds, by name.
        look: Is shown every operator before it is executed.

    Attributes:
        taints: Of the nodes that ran and are still needed.
        marks: Taints of the flat outputs, once there are any.
    """

    def __init__(
        self, program: Program, held: Mapping[str, Tensor], look: Callable[[TaintedOp], None]
    ) -> None:
        super().__init__(program)
        self.held, self.look = held, look
        self.taints: dict[fx.Node, Any] = {}
        self.marks: list[Any] = []

    def given(self, node: fx.Node, value: Any) -> Any:
        """Inputs are tainted throughout."""
        self.taints[node] = _filled(value, 1.0)
        return value

    def tensor(self, node: fx.Node, name: str) -> Any:
        """The model's own tensor, which is not tainted."""
        held = self.program.constants if name in self.program.anonymous else self.held
        source = held[name].detach()
        # Buffers may be written to in place.
        value = source if name in self.program.parameters else source.clone()
        self.taints[node] = _filled(value, 0.0)
        return value

    def constant(self, node: fx.Node) -> Any:
        """Attributes of the graph are not tainted."""
        value = super().constant(node)
        self.taints[node] = _filled(value, 0.0)
        return value

    def call(self, node: fx.Node) -> Any:
        """The value of an operator; its taint is derived beside it."""
        op = TaintedOp(node, self.values, self.taints)
        self.look(op)
        value, self.taints[node] = _executed(op)
        return value

    def made(self, node: fx.Node) -> None:
        """Note the taints of the outputs."""
        if node.op == "output":
            results: Any = node.args[0]
            self.marks = [
                self.taints.get(n, 0.0) if isinstance(n, fx.Node) else 0.0 for n in results
            ]

    def free(self, node: fx.Node) -> None:
        """Taints live as long as values."""
        super().free(node)
        self.taints.pop(node, None)


def _filled(value: Any, number: float) -> Any:
    """Taint of one degree, laid out in memory as the value is."""
    if not isinstance(value, Tensor):
        return number
    return torch.empty_like(value, dtype=torch.float32).fill_(number)


def _executed(op: TaintedOp) -> tuple[Any, Any]:
    """The value of a node, and its taint."""
    node = op.node
    if is_item(node):
        source, index = node.args[0], cast(int, node.args[1])
        assert isinstance(source, fx.Node)
        value, taint = op.values[source][index], op.taints[source]
        return value, taint[index] if isinstance(taint, list | tuple) else taint
    # First of all, as the operator may overwrite its operands.
    derived_taint = derived(op)
    value = op.run(lambda n: op.values[n])
    if isinstance(value, list | tuple):
        each = (
            derived_taint
            if isinstance(derived_taint, list | tuple)
            else [derived_taint] * len(value)
        )
        return value, [
            _settled(op, v, t) if isinstance(v, Tensor) else t
            for v, t in zip(value, each, strict=True)
        ]
    if not isinstance(value, Tensor):
        return value, 1.0 if derived_taint is None or tainted(derived_taint) else 0.0
    return value, _settled(op, value, derived_taint)


def _settled(op: TaintedOp, value: Tensor, derived_taint: Any) -> Tensor:
    """The derived taint as a tensor that shares memory with other taints just as the value does."""
    taint = _whole(value, derived_taint)
    if not is_moved(op.node):
        taint = torch.maximum(taint, value.isnan().float())
    elif any(
        _shared(mark, taint) and not _shared(old, value)
        for source in op.inputs
        for old, mark in _pairs(op, source)
    ):
        taint = taint.clone()
    overwritten = set(written(op.node))
    for source in op.inputs:
        for old, mark in _pairs(op, source):
            if _same(old, value):
                taint = mark.copy_(taint) if mark.shape == taint.shape else mark.fill_(1)
                overwritten.discard(source)
            elif _shared(old, value) and not (is_moved(op.node) and _shared(mark, taint)):
                mark.fill_(1)
                taint = torch.ones_like(taint)
    for source in overwritten:
        for mark in _tensors(op.taints[source]):
            mark.fill_(1)
    return taint


def _whole(value: Tensor, taint: Tensor | float | None) -> Tensor:
    """A derived taint in the shape of the value; ones where it does not broadcast to it."""
    if isinstance(taint, Tensor) and not taint.is_complex() and _fits(taint, value):
        if taint.shape == value.shape:
            return taint
        spread: Tensor = _filled(value, 0.0)
        return spread.copy_(taint)
    whole: Tensor = _filled(value, taint if isinstance(taint, float) else 1.0)
    return whole


def _fits(taint: Tensor, value: Tensor) -> bool:
    pairs = zip(reversed(taint.shape), reversed(value.shape), strict=False)
    return taint.ndim <= value.ndim and all(n in (1, m) for n, m in pairs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _pairs(op: TaintedOp, source: fx.Node) -> list[tuple[Tensor, Tensor]]:
    """Values of an operand with their taints."""
    both = _tensors(op.values[source]), _tensors(op.taints[source])
    return list(zip(*both, strict=False))


def _shared(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
