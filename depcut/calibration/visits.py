"""One walk over the calibration data that shows the arguments of chosen nodes."""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Any

import torch
from torch import fx, nn

from depcut.calibration.cuts import cut, weights_of
from depcut.calibration.data import Calibration
from depcut.calibration.progress import bar
from depcut.calibration.shelf import Shelf
from depcut.calibration.store import Store
from depcut.calibration.walk import Graph, Walk
from depcut.capture.held import held_tensors
from depcut.capture.program import Program, where
from depcut.coupling.groups import Coupling
from depcut.errors import InputError
from depcut.graph.arguments import Call, bound
from depcut.graph.interpreter import Paused
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, Tensors
from depcut.support.torch_private import pytree

STRETCHES = 4  # a stretch may cost the memory budget divided by it


def visits(
    coupling: Coupling,
    model: nn.Module | Tensors,
    calibration: Calibration,
    nodes: Collection[fx.Node],
    label: str = "statistics",
) -> Generator[tuple[int, fx.Node, Call]]:
    """(number of the batch, node, values of its arguments) whenever the dense model runs a node.

    All batches come to a node before any comes to one of the next stretch. To be closed, which
    removes what was kept on the disk.

    Args:
        coupling: The analysed model.
        model: The model, or its tensors by name, each of which is asked for when it is first read
            in a stretch; only read.
        calibration: The batches.
        nodes: The nodes to stop before.
        label: What the progress bar says.

    Raises:
        InputError: The model turns the data into NaN or infinite values.
    """
    program, wanted = coupling.program, set(nodes)
    shelf = Shelf(held_tensors(model) if isinstance(model, nn.Module) else model)
    # Tensors that are in memory anyway need no stretches.
    cost = {} if isinstance(model, nn.Module) else weights_of(program)
    cuts = cut(program, cost, calibration.memory // STRETCHES)
    graph = Graph(Reference(Keep(coupling, {}), shelf))
    with Store(calibration.memory) as store, bar(calibration) as progress:
        walk = Walk(calibration, [graph], _stretches(program, wanted, cuts), store, [shelf])
        task = progress.add_task(label, total=len(walk.pauses) * len(calibration.batches))
        for _ in walk.stretches():
            last = -1
            for number, node, (run,) in walk.batches():
                progress.advance(task, number != last)
                last = number
                if node in wanted:
                    paused = run.paused(node)
                    yield number, node, checked_call(paused, calibration.numbers[number])


def _stretches(
    program: Program, wanted: Collection[fx.Node], cuts: Collection[fx.Node]
) -> list[list[fx.Node]]:
    """Where to pause: before what is wanted, and at the cuts, each of which ends a stretch."""
    out: list[list[fx.Node]] = [[]]
    for node in program.graph.graph.nodes:
        if node in wanted or node in cuts:
            out[-1].append(node)
        if node in cuts:
            out.append([])
    while out and not any(node in wanted for node in out[-1]):
        out.pop()
    return out


def checked_call(paused: Paused, number: int) -> Call:
    """The arguments of a node, all finite and without gradients.

    Args:
        paused: The node.
        number: Of the batch.

    Raises:
        InputError: Some are not finite.
    """
    args, kwargs = pytree.tree_map(_detached, (paused.args, paused.kwargs))
    call = bound(paused.node, args, kwargs)
    for value in call.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            check_finite(value, number, paused.node)
    return call


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def check_finite(value: torch.Tensor, number: int, node: fx.Node) -> None:
    """Refuse activations that are not finite; minus infinity is left to masks.

    Args:
        value: An argument of a node.
        number: Of the batch.
        node: The node.

    Raises:
        InputError: It holds NaN or plus infinity.
    """
    if bool(torch.isfinite(value.sum())):
        return
    bad = torch.isnan(value) | (value == float("inf"))
    if bool(bad.any()):
        raise InputError(
            f"{int(bad.sum())} of {value.numel()} activations are NaN or infinite for item "
            f"{number} of the data",
            where=where(node),
            remedy="look for extreme values in that item, or for a model that overflows",
        )
