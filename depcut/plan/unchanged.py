"""Refuse a plan on a model that computes something else than when it was analysed."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from depcut.capture.capture import capture
from depcut.capture.program import Program
from depcut.capture.structure import changes, structure_of
from depcut.errors import CaptureError, InputError, PlanError, listed
from depcut.graph.operators import enters_autocast, is_aten, leaves_autocast

_CASTS = ("to", "_to_copy")


def check_unchanged(program: Program, model: nn.Module) -> None:
    """Refuse a model whose graph is no longer the one that was captured.

    Where an attribute, a class or a hook is another one than then, the model is captured again:
    counters and caches change as well, and mean nothing. Other weights and modes are no change.

    Args:
        program: The captured model.
        model: The model as it is now; it is only read.

    Raises:
        PlanError: It computes something else; names what has changed.
    """
    found = changes(program.structure, structure_of(model))
    if not found:
        return
    try:
        now = capture(model, program.kwargs or tuple(program.args))
        if _signature(program) == _signature(now):
            return
        problem = ""
    except (CaptureError, InputError) as error:
        problem = f": {error.what}"
    raise PlanError(
        f"the model has changed since it was analysed: {listed(found, 3)}{problem}",
        where=type(model).__name__,
        remedy="analyze it again, or apply plan.bind(model), which takes it as it is now",
    )


def _signature(program: Program) -> list[Any]:
    """What a graph computes; casts left aside, which wrappers for mixed precision add."""
    numbers: dict[fx.Node, int] = {}
    out: list[Any] = []
    for node in program.graph.graph.nodes:
        if enters_autocast(node) or leaves_autocast(node):
            continue
        if is_aten(node, *_CASTS):
            numbers[node] = numbers[node.all_input_nodes[0]]
            continue
        numbers[node] = len(out)
        given = fx.map_arg((node.args, node.kwargs), lambda n: f"node {numbers[n]}")
        what = program.tensors.get(node) or (node.op if node.op != "call_function" else "")
        out.append((what or str(node.target), repr(given), repr(program.sizes[node])))
    return out
