"""One place where weights multiply activations, as Y = X W^T + b over independent blocks.

Least squares, second moments and channel norms need the vectors that a weight is multiplied with:
the features of a linear layer, the patches of a convolution, what a recurrent cell reads. A site
extracts them from the arguments of one node of the captured graph, dense or sliced alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from depcut import axes
from depcut.axes import Axis, Indices, Term
from depcut.coupling.groups import Coupling, layer_of, origin
from depcut.ops.registry import Op

Call = Mapping[str, Any]  # an operator's arguments by schema name


class Family(Protocol):
    """How one family of operators multiplies; matrices are (blocks, out, in).

    Attributes:
        result: Dimension of the node's result that is blocks * out long, from the end; None where
            the products are not the result itself.
    """

    @property
    def result(self) -> int | None:
        """See above."""

    def inputs(self, call: Call) -> torch.Tensor:
        """X (blocks, vectors, in) from the values of the node's arguments."""

    def matrix(self, call: Call) -> torch.Tensor:
        """W (blocks, out, in) from the values of the node's arguments."""

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Write W into the tensors that the arguments are, or are views of."""


@dataclass(frozen=True, eq=False)
class Site:
    """One place where one or more parameters multiply activations.

    A convolution's groups are blocks; all else has a single one.

    Attributes:
        node: The graph node.
        weights: Parameters, side by side along the columns.
        biases: Parameters that are added to the result, of length blocks * out each.
        columns: For each weight, the terms whose row-major product numbers its columns.
        rows: Term of the results, of length blocks * out.
        family: How to extract X and W.
        own: How many of the last weights read what the site itself computed one step before.
        absorbed: Whether all that reads its results are batch norms, whose mean takes a constant.
    """

    node: fx.Node
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    columns: tuple[tuple[Term, ...], ...]
    rows: Term
    family: Family
    own: int = 0
    absorbed: bool = False

    @property
    def takes_shift(self) -> bool:
        """Whether a constant can be added to its results."""
        return bool(self.biases) or self.absorbed

    @property
    def name(self) -> str:
        """The layer."""
        return layer_of(self.weights[0])

    @property
    def term(self) -> Term:
        """The columns as one term."""
        return axes.concat(*(axes.product(*map(axes.resolve, c)) for c in self.columns))

    def units(self, axis: Axis) -> Indices:
        """Which unit of an axis each column belongs to, -1 for none."""
        return axes.units(self.term, axis)


class Place(Op):
    """A node with a contraction: its arguments by name, their terms, the parameters behind them.

    Args:
        coupling: The analysed model.
        node: The node.
    """

    def __init__(self, coupling: Coupling, node: fx.Node) -> None:
        super().__init__(node, coupling.env, coupling.program.sizes)
        self.coupling = coupling

    def parameter(self, node: Any) -> str | None:
        """The parameter that an argument is, if it is one."""
        tensor = self.coupling.program.tensors.get(node) if isinstance(node, fx.Node) else None
        return tensor if tensor in self.coupling.program.parameters else None

    def biases(self, node: Any) -> tuple[str, ...] | None:
        """A bias argument as parameter names; None where it is computed or no vector."""
        if node is None:
            return ()
        found = self.parameter(node)
        return None if found is None or len(self.coupling.dims[found]) != 1 else (found,)

    def matrix(self, node: Any, dim: int) -> tuple[str, int] | None:
        """The two-dimensional parameter and its dimension behind an argument's contracted one."""
        if not isinstance(node, fx.Node) or len(self.dims(node)) != 2:
            return None
        found = origin(node, dim, self.coupling.program)
        if found is None or found[0] not in self.coupling.program.parameters:
            return None
        return found if len(self.coupling.dims[found[0]]) == 2 else None


def bound(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Values of a node's arguments by schema name, defaults included.

    Args:
        node: The node.
        args: Values of its positional arguments.
        kwargs: Values of its keyword arguments.
    """
    target: Any = node.target
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    return {
        a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
        for a in schema
    }
