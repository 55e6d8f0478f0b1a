"""Activations as the operators that sum over them read them, shown batch by batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import fx, nn

from depcut import axes
from depcut.calibration.data import Calibration
from depcut.calibration.visits import visits
from depcut.coupling.groups import Coupling
from depcut.graph.ancestry import reached
from depcut.graph.arguments import bound
from depcut.graph.operators import is_operator
from depcut.support.torch_private import pytree


@dataclass(frozen=True)
class Activation:
    """One dimension of one activation.

    Attributes:
        source: Node that makes the activation.
        dim: Its dimension.
        reader: Node that takes it.
        groups: Numbers of the groups in that dimension.
    """

    source: fx.Node
    dim: int
    reader: fx.Node
    groups: frozenset[int]


def find_activations(coupling: Coupling) -> list[Activation]:
    """Every activation dimension that an operator sums over, once, with the groups in it.

    Of a group that nothing sums over (the state of a recurrent layer that is only read within it),
    the last activation in which it occurs.

    Args:
        coupling: The analysed model.
    """
    nodes = coupling.program.graph.graph.nodes
    dependent = _dependent_on_inputs(coupling)
    activations: dict[tuple[fx.Node, int], Activation] = {}
    for node in nodes:
        effects = coupling.effects.get(node)
        for place in effects.contracts if effects else ():
            for source, dim in (place, effects.counterparts.get(place, place)) if effects else ():
                groups = _groups(coupling, source, dim)
                if source in dependent and groups and (source, dim) not in activations:
                    activations[source, dim] = Activation(source, dim, node, groups)
    missing = {g.index for g in coupling.groups} - {
        i for r in activations.values() for i in r.groups
    }
    for source in reversed(nodes):
        reader = next((u for u in source.users if is_operator(u)), None)
        dims = coupling.env.get(source)
        if not missing or source not in dependent or reader is None or not isinstance(dims, tuple):
            continue
        for dim in range(len(dims)):
            groups = _groups(coupling, source, dim) & missing
            if groups:
                activations[source, dim] = Activation(source, dim, reader, groups)
                missing -= groups
    return list(activations.values())


def _dependent_on_inputs(coupling: Coupling) -> set[fx.Node]:
    """Floating-point tensors that depend on an input of the model."""
    program = coupling.program
    values = {n: n.meta.get("val") for n in reached(program, program.inputs)}
    return {n for n, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def _groups(coupling: Coupling, node: fx.Node, dim: int) -> frozenset[int]:
    dims = coupling.env.get(node)
    if not isinstance(dims, tuple):
        return frozenset()
    leaves = axes.leaves(axes.resolve(dims[dim]))
    index = coupling.group_of
    return frozenset(index[leaf].index for leaf in leaves if leaf in index)


def shown(
    coupling: Coupling,
    model: nn.Module,
    calibration: Calibration,
    activations: list[Activation],
    label: str,
) -> Generator[tuple[Activation, torch.Tensor]]:
    """(activation, its values) of every batch, in one walk over the data; to be closed.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.
        calibration: The batches.
        activations: What to show.
        label: What the progress bar says.
    """
    by_reader: dict[fx.Node, list[Activation]] = {}
    for activation in activations:
        by_reader.setdefault(activation.reader, []).append(activation)
    with closing(visits(coupling, model, calibration, by_reader, label)) as found:
        for _, node, call in found:
            sources = pytree.tree_leaves(dict(bound(node, node.args, node.kwargs)))
            values = pytree.tree_leaves(dict(call))
            for activation in by_reader[node]:
                yield activation, values[sources.index(activation.source)]
