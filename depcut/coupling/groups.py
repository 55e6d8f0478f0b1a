"""Groups of coupled dimensions, and frozen ones with reasons, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import fx

from depcut import axes
from depcut.axes import Axis, Concat, Dims, Product, Term
from depcut.capture.program import Program, layer_of, where
from depcut.ops.registry import Effects, Output

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Coupling", "Frozen", "Group", "Member", "layer_of"]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer in which a group occurs."""

    tensor: str
    dim: int
    role: str


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can only be removed together, wherever they occur.

    Attributes:
        name: Layer that produces it; a bracketed number tells the factors of one layer apart.
        size: Number of units.
        members: Where it occurs, producers first.
        axis: Its axis in the terms.
        tied: Groups with the same number keep equally many units; None: free.
        index: Position in `Coupling.groups`.
        floor: Least number of units that must stay.
        row_axis: The axis in each of whose rows it may keep other units, equally many; None: it
            keeps the same ones everywhere.
        alone: Why there is no row axis.
        multiple: What the number of units that stay is a multiple of.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    axis: Axis
    tied: int | None
    index: int
    floor: int = 1
    row_axis: Axis | None = None
    alone: str = ""
    multiple: int = 1

    @property
    def rows(self) -> int:
        """Number of rows in which it chooses units; 1 without a row axis."""
        return 1 if self.row_axis is None else self.row_axis.size

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs it narrows."""
        seen = dict.fromkeys(layer_of(m.tensor) for m in self.members if m.role == "producer")
        return tuple(seen)

    def __repr__(self) -> str:
        return f"<Group {self.name}: {self.size} units, {len(self.members)} members>"


@dataclass(frozen=True)
class Frozen:
    """A dimension of a parameter of which some indices must stay, with the reason."""

    tensor: str
    dim: int
    size: int
    reason: str
    where: str


@dataclass(frozen=True, repr=False)
class Coupling:
    """The result of inference over a program: groups, terms and effects.

    Attributes:
        program: The captured model, by its first example call.
        dims: Resolved terms of every parameter, buffer and constant, by qualified name.
        env: Terms of every node.
        effects: Size literals, contractions, statistics and MACs, by node.
        groups: The groups, in the order of the model's parameters.
        unknown: Operators without a (working) rule, with their nodes.
    """

    program: Program
    dims: dict[str, Dims]
    env: dict[fx.Node, Output]
    effects: dict[fx.Node, Effects]
    groups: tuple[Group, ...]
    unknown: dict[str, list[str]]

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """Every dimension of a parameter that cannot shrink, fully or in part."""
        nodes = {n.name: n for p in self.program.captured for n in p.graph.graph.nodes}
        out = []
        for name, dims in self.dims.items():
            if name not in self.program.parameters:
                continue
            for i, term in enumerate(dims):
                stuck = [leaf for leaf in axes.leaves(term) if leaf.reason]
                if not stuck or (_is_inner(term) and not axes.is_frozen(term)):
                    continue
                reason = stuck[0].reason or axes.SINGLE
                node = nodes.get(reason.node) if reason.node else None
                place = where(node) if node is not None else (reason.node or name)
                size = sum(leaf.size for leaf in stuck) if isinstance(term, Concat) else term.size
                out.append(Frozen(name, i, size, reason.why, place))
        return tuple(out)

    @property
    def frozen_share(self) -> float:
        """Share of the parameters of which no index can be removed."""
        total = stuck = 0
        for name, dims in self.dims.items():
            if name in self.program.parameters:
                size = math.prod(t.size for t in dims)
                total += size
                stuck += size * all(map(axes.is_frozen, dims))
        return stuck / total if total else 1.0

    @cached_property
    def calls(self) -> tuple[Coupling, ...]:
        """The same groups as each example call sees them, which then is the program's first."""
        program = self.program
        others = (replace(self, program=program.led_by(i)) for i in range(1, len(program.examples)))
        return (self, *others)

    def graph(self) -> nx.DiGraph:
        """Layers and groups: edges from a layer to the groups it produces and to their readers."""
        import networkx as nx

        graph = nx.DiGraph()
        for group in self.groups:
            graph.add_node(group.name, kind="group", size=group.size, tied=group.tied)
            for member in group.members:
                layer = "layer:" + layer_of(member.tensor)
                graph.add_node(layer, kind="layer")
                ends = (layer, group.name) if member.role == "producer" else (group.name, layer)
                graph.add_edge(*ends, tensor=member.tensor, dim=member.dim)
        return graph

    @cached_property
    def weight_axes(self) -> frozenset[Axis]:
        """The free axes of parameters and buffers: what has them is as large in every call.

        No size of an input is among them; the rows of a table of positions, which are as many as
        an input is long, are frozen.
        """
        terms = (axes.resolve(term) for dims in self.dims.values() for term in dims)
        return frozenset(leaf for term in terms for leaf in axes.leaves(term) if not leaf.reason)

    @cached_property
    def group_of(self) -> dict[Axis, Group]:
        """The group that an axis is."""
        return {g.axis: g for g in self.groups}


def _is_inner(term: Term) -> bool:
    """A product with a free factor: its width can shrink, though one factor stays."""
    return isinstance(term, Product)
