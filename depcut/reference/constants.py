"""Constant propagation: which values of a captured graph do not depend on the model's inputs.

The graph runs on its example inputs, and beside every tensor runs its taint (`depcut.ops.taint`):
what is not tainted has the value seen for every input of these shapes. Views of taint follow views
of values, so that writes in place reach all who read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from depcut.capture.capture import held_tensors
from depcut.coupling.groups import Coupling
from depcut.ops.taint import Step, tainted
from depcut.ops.taint_rules import derived, is_view
from depcut.plan.keep import Keep
from depcut.reference.run import example, last_uses
from depcut.support.torch_private import pytree


def interpret(
    coupling: Coupling, model: nn.Module, look: Callable[[Step], None]
) -> tuple[list[Any], list[Any]]:
    """Run the captured graph on its example inputs, with the taint of every value.

    Args:
        coupling: The analysed architecture.
        model: The model whose tensors are read; none is changed.
        look: Is shown every operator before it is executed.

    Returns:
        Flat outputs, and their taints.
    """
    program = coupling.program
    held = held_tensors(model)
    given = iter(pytree.tree_leaves(example(Keep(coupling, {}))))
    values: dict[fx.Node, Any] = {}
    taints: dict[fx.Node, Any] = {}
    last = last_uses(program)
    outputs: list[fx.Node] = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            name = program.tensors.get(node)
            if name is None:
                values[node] = next(given)
            else:
                source = (program.constants if name in program.anonymous else held)[name].detach()
                # Buffers may be written to in place.
                values[node] = source if name in program.parameters else source.clone()
            taints[node] = _filled(values[node], float(name is None))
        elif node.op == "get_attr":
            values[node] = getattr(program.graph, str(node.target))
            taints[node] = _filled(values[node], 0.0)
        elif node.op == "call_function":
            step = Step(node, values, taints)
            with torch.no_grad():
                look(step)
                values[node], taints[node] = _executed(step)
        else:
            outputs = list(node.args[0])
        for done in last.get(node, ()):
            if node.op != "output":
                values.pop(done, None)
                taints.pop(done, None)
    nodes = [n if isinstance(n, fx.Node) else None for n in outputs]
    return (
        [values.get(n) if n is not None else o for n, o in zip(nodes, outputs, strict=True)],
        [taints.get(n, 0.0) if n is not None else 0.0 for n in nodes],
    )


def _filled(value: Any, number: float) -> Any:
    """Taint of one degree, laid out in memory as the value is."""
    if not isinstance(value, Tensor):
        return number
    return torch.empty_like(value, dtype=torch.float32).fill_(number)


def _executed(step: Step) -> tuple[Any, Any]:
    """The value of a node, and its taint."""
    node = step.node
    if getattr(node.target, "__name__", "") == "getitem":
        source, index = node.args[0], cast(int, node.args[1])
        assert isinstance(source, fx.Node)
        value, taint = step.values[source][index], step.taints[source]
        return value, taint[index] if isinstance(taint, list | tuple) else taint
    # First of all, as the operator may overwrite its operands.
    found = derived(step)
    value = step.run(lambda n: step.values[n])
    if isinstance(value, list | tuple):
        each = found if isinstance(found, list | tuple) else [found] * len(value)
        return value, [
            _settled(step, v, t) if isinstance(v, Tensor) else t
            for v, t in zip(value, each, strict=True)
        ]
    if not isinstance(value, Tensor):
        return value, 1.0 if found is None or tainted(found) else 0.0
    return value, _settled(step, value, found)


def _settled(step: Step, value: Tensor, found: Any) -> Tensor:
    """The derived taint as a tensor that shares memory with other taints just as the value does."""
    taint = _whole(value, found)
    if not is_view(step.node):
        taint = torch.maximum(taint, value.isnan().float())
    elif any(
        _shared(mark, taint) and not _shared(old, value)
        for source in step.inputs
        for old, mark in _pairs(step, source)
    ):
        taint = taint.clone()
    written = _written(step)
    for source in step.inputs:
        for old, mark in _pairs(step, source):
            if _same(old, value):
                taint = mark.copy_(taint) if mark.shape == taint.shape else mark.fill_(1)
                written.discard(source)
            elif _shared(old, value) and not (is_view(step.node) and _shared(mark, taint)):
                mark.fill_(1)
                taint = torch.ones_like(taint)
    for source in written:
        for mark in _tensors(step.taints[source]):
            mark.fill_(1)
    return taint


def _whole(value: Tensor, found: Tensor | float | None) -> Tensor:
    """A derived taint in the shape of the value; all of it where there is none that fits."""
    if isinstance(found, Tensor) and not found.is_complex() and _fits(found, value):
        if found.shape == value.shape:
            return found
        spread: Tensor = _filled(value, 0.0)
        return spread.copy_(found)
    whole: Tensor = _filled(value, found if isinstance(found, float) else 1.0)
    return whole


def _fits(found: Tensor, value: Tensor) -> bool:
    pairs = zip(reversed(found.shape), reversed(value.shape), strict=False)
    return found.ndim <= value.ndim and all(n in (1, m) for n, m in pairs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _pairs(step: Step, source: fx.Node) -> list[tuple[Tensor, Tensor]]:
    """Values of an operand with their taints."""
    both = _tensors(step.values[source]), _tensors(step.taints[source])
    return list(zip(*both, strict=False))


def _written(step: Step) -> set[fx.Node]:
    """Operands that the operator overwrites."""
    schema = getattr(step.node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return set()
    places = [step.arg(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return {n for n in pytree.tree_leaves(places) if isinstance(n, fx.Node)}


def _shared(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
