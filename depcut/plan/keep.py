"""Kept units as an evaluation of the terms: counts, indices, and new size literals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from depcut import axes
from depcut.axes import Dims, Indices, Term
from depcut.axes.rows import Rows, Selection, broadcastable, fitted, indices_along, indices_by_dim
from depcut.coupling.groups import Coupling
from depcut.graph.liveness import Bypass, Gone, gone
from depcut.ops.registry import Effects, Literal


@dataclass(frozen=True, eq=False, repr=False)
class Keep:
    """Which units of each group stay.

    Attributes:
        coupling: The groups.
        units: Ascending kept indices by group number, a list or one for each row of the group's
            outer axis; groups not in it keep everything.
        bypass: Additions whose branch is dropped, with the operand that takes their place.
    """

    coupling: Coupling
    units: Mapping[int, Indices]
    bypass: Bypass = field(default_factory=dict)

    @cached_property
    def calls(self) -> tuple[Keep, ...]:
        """The same units as each example call sees them: its inputs, graph and module calls."""
        return (self, *(replace(self, coupling=c) for c in self.coupling.calls[1:]))

    @cached_property
    def gone(self) -> Gone:
        """Nodes, modules and tensors that dropped branches leave unused."""
        return gone(self.coupling.program, self.bypass)

    @cached_property
    def chosen(self) -> Selection:
        """Kept indices of each narrowed axis."""
        groups = self.coupling.groups
        rows = {
            groups[i].axis: Rows(outer, kept)
            for i, kept in self.units.items()
            if kept.ndim == 2 and (outer := groups[i].row_axis) is not None
        }
        same = {groups[i].axis: kept for i, kept in self.units.items() if kept.ndim == 1}
        return Selection(same, rows)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Kept count of each group."""
        out = np.array([g.size for g in self.coupling.groups], dtype=np.int64)
        for i, kept in self.units.items():
            out[i] = kept.shape[-1]
        return out

    def count(self, term: Term) -> int:
        """How many indices of a term stay."""
        return axes.count(axes.resolve(term), self.chosen.count)

    def narrows(self, term: Term) -> bool:
        """Whether an index of the term goes."""
        return self.chosen.narrows(axes.resolve(term))

    def indices(self, term: Term) -> Indices | None:
        """Kept indices of a term that holds the outer axes of its rows; None for all."""
        term = axes.resolve(term)
        return self.chosen.indices(term) if self.chosen.narrows(term) else None

    def indices_by_dim(
        self, dims: Dims, shape: tuple[int, ...] | None = None
    ) -> tuple[Indices | None, ...]:
        """Kept indices of each dimension of a tensor, see `depcut.axes.rows`.

        Args:
            dims: Terms of its dimensions.
            shape: Its sizes, where the batch may be another than the captured one.
        """
        resolved = tuple(map(axes.resolve, dims))
        return indices_by_dim(resolved if shape is None else fitted(resolved, shape), self.chosen)

    def stays(self, dims: Dims, dim: int) -> NDArray[np.bool_]:
        """Whether the indices of one dimension of a dense tensor stay.

        Args:
            dims: Terms of its dimensions.
            dim: Which of them.

        Returns:
            An array of the tensor's rank that broadcasts to its shape: of size 1 along the
            dimensions that make no difference.
        """
        terms = tuple(map(axes.resolve, dims))
        kept = indices_along(terms, dim, self.chosen, dense=True)
        kept = broadcastable(kept, terms[dim].size, dim, len(terms))
        shape = [terms[dim].size if i == dim else n for i, n in enumerate(kept.shape)]
        out = np.zeros(shape, dtype=bool)
        np.put_along_axis(out, kept, values=True, axis=dim)
        return out

    @cached_property
    def tensors(self) -> dict[str, tuple[Indices | None, ...]]:
        """Kept indices of every dimension of every narrowed parameter, buffer or constant."""
        out = {}
        for name, dims in self.coupling.dims.items():
            picked = self.indices_by_dim(dims)
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
