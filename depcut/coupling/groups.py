"""Groups of coupled dimensions, and frozen ones with reasons, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from depcut import axes
from depcut.axes import Axis, Concat, Dims, Product, Term
from depcut.capture.program import Program, layer_of, where
from depcut.ops.registry import Effects, Output

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

    @property
    def rows(self) -> int:
        """Number of rows in which it chooses units; 1 without a row axis."""
        return 1 if self.row_axis is None else self.row_axis.size

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs it narrows."""
        seen = dict.fromkeys(layer_of(m.tensor) for m in self.members if m.role == "producer")
        return tuple(seen)


@dataclass(frozen=True)
class Frozen:
    """A dimension of a parameter of which some indices must stay, with the reason."""

    tensor: str
    dim: int
    size: int
    reason: str
    where: str


@dataclass(frozen=True)
class Coupling:
    """The result of inference over a program: groups, terms and effects.

    Attributes:
        program: The captured model.
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
        nodes = {n.name: n for n in self.program.graph.graph.nodes}
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

    @cached_property
    def group_of(self) -> dict[Axis, Group]:
        """The group that an axis is."""
        return {g.axis: g for g in self.groups}


def _is_inner(term: Term) -> bool:
    """A product with a free factor: its width can shrink, though one factor stays."""
    return isinstance(term, Product)
