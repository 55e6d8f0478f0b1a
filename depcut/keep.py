"""Kept units as an evaluation of the terms: counts, indices, and new size literals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from depcut import axes
from depcut.axes import Axis, Indices, Term
from depcut.coupling import Coupling
from depcut.liveness import Bypass, Gone, gone
from depcut.ops.registry import Effects, Literal


@dataclass(frozen=True, eq=False)
class Keep:
    """Which units of each group stay.

    Attributes:
        coupling: The groups.
        units: Ascending kept indices by group number; groups not in it keep everything.
        bypass: Additions whose branch is dropped, with the operand that takes their place.
    """

    coupling: Coupling
    units: Mapping[int, Indices]
    bypass: Bypass = field(default_factory=dict)

    @cached_property
    def gone(self) -> Gone:
        """What dropped branches leave without a use."""
        return gone(self.coupling.program, self.bypass)

    @cached_property
    def by_axis(self) -> dict[Axis, Indices]:
        """Kept indices of each narrowed axis."""
        return {self.coupling.groups[i].axis: kept for i, kept in self.units.items()}

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Kept count of each group."""
        out = np.array([g.size for g in self.coupling.groups], dtype=np.int64)
        for i, kept in self.units.items():
            out[i] = len(kept)
        return out

    def count(self, term: Term) -> int:
        """How many indices of a term stay."""
        return axes.count(axes.resolve(term), self._count_axis)

    def _count_axis(self, axis: Axis) -> int:
        kept = self.by_axis.get(axis)
        return axis.size if kept is None else len(kept)

    def narrows(self, term: Term) -> bool:
        """Whether an index of the term goes."""
        return any(leaf in self.by_axis for leaf in axes.leaves(axes.resolve(term)))

    def indices(self, term: Term) -> Indices | None:
        """Kept indices of a term, None for all."""
        term = axes.resolve(term)
        return axes.indices(term, self.by_axis) if self.narrows(term) else None

    @cached_property
    def tensors(self) -> dict[str, tuple[Indices | None, ...]]:
        """Kept indices of every dimension of every narrowed parameter, buffer or constant."""
        out = {}
        for name, dims in self.coupling.dims.items():
            picked = tuple(map(self.indices, dims))
            if any(p is not None for p in picked):
                out[name] = picked
        return out

    def literals(self, node: fx.Node) -> Iterator[tuple[Literal, Any, int, int]]:
        """(literal, its dense value or node, dense count, new count) of a node's size literals."""
        if node in self.gone.nodes:
            return
        effects = self.coupling.effects.get(node)
        for literal in effects.literals if effects else ():
            value = at_path(node, literal.path)
            dense = axes.resolve(literal.term).size
            yield literal, value, dense, self.count(literal.term)

    def pins(self, node: fx.Node) -> dict[str, float]:
        """Arguments of a node whose default would change with the widths."""
        effects = self.coupling.effects.get(node)
        if effects is None or not effects.pins or node in self.gone.nodes:
            return {}
        narrowed = any(self.narrows(t) for t in _contracted(self.coupling, effects))
        return effects.pins if narrowed else {}


def _contracted(coupling: Coupling, effects: Effects) -> Iterator[Term]:
    for node, dim in effects.contracts:
        dims = coupling.env[node]
        if isinstance(dims, tuple):
            yield dims[dim]


def at_path(node: fx.Node, path: tuple[int | str, ...]) -> Any:
    """The (item of an) argument of a node at a path."""
    head, *rest = path
    value: Any = node.args[head] if isinstance(head, int) else node.kwargs[head]
    for step in rest:
        value = value[step]
    return value
