"""One place where weights multiply activations, as Y = X W^T + b over independent blocks.

Least squares, second moments and channel norms need the vectors that a weight is multiplied with:
the features of a linear layer, the patches of a convolution, what a recurrent cell reads. A site
extracts them from the arguments of one node of the captured graph, dense or sliced alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from depcut import axes
from depcut.axes import Axis, Dims, Indices, Term
from depcut.capture.program import Program, layer_of
from depcut.graph.ancestry import parameter_dimension
from depcut.graph.arguments import Call
from depcut.ops.registry import Op, Output, Table


class Family(Protocol):
    """How one family of operators multiplies; matrices are (blocks, out, in).

    Attributes:
        result: Dimension of the node's result that is blocks * out long, from the end; None where
            the products are not the result itself.
    """

    @property
    def result(self) -> int | None:
        """Dimension of blocks * out in the node's result, from the end, or None."""

    def inputs(self, call: Call) -> torch.Tensor:
        """X (blocks, vectors, in) from the values of the node's arguments."""

    def reads(self, nodes: Call, call: Call) -> tuple[Hashable, ...] | None:
        """Equal where two nodes of any family read the same X; None: it is not known.

        The nodes whose values X is made of are among it.

        Args:
            nodes: The arguments of the graph node, nodes among them.
            call: Their values.
        """

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


class ContractionOp(Op):
    """A node with a contraction: its arguments by name, their terms, the parameters behind them.

    Args:
        node: The node.
        env: Terms of every node.
        program: The captured model.
        stored: Resolved terms of every parameter, buffer and constant, by qualified name.
    """

    def __init__(
        self,
        node: fx.Node,
        env: dict[fx.Node, Output],
        program: Program,
        stored: Mapping[str, Dims],
    ) -> None:
        super().__init__(node, env, program.sizes)
        self.program, self.stored = program, stored

    def parameter(self, node: Any) -> str | None:
        """The parameter that an argument is, if it is one."""
        tensor = self.program.tensors.get(node) if isinstance(node, fx.Node) else None
        return tensor if tensor in self.program.parameters else None

    def biases(self, node: Any) -> tuple[str, ...] | None:
        """A bias argument as parameter names; None where it is computed or no vector."""
        if node is None:
            return ()
        name = self.parameter(node)
        return None if name is None or len(self.stored[name]) != 1 else (name,)

    def matrix(self, node: Any, dim: int) -> tuple[str, int] | None:
        """The two-dimensional parameter and its dimension behind an argument's contracted one."""
        if not isinstance(node, fx.Node) or len(self.dims(node)) != 2:
            return None
        place = parameter_dimension(node, dim, self.program)
        if place is None or place[0] not in self.program.parameters:
            return None
        return place if len(self.stored[place[0]]) == 2 else None


SiteRule = Callable[[ContractionOp], list[Site]]

SITES: Table[SiteRule] = Table("calibration site")


def site(*targets: str) -> Callable[[SiteRule], SiteRule]:
    """Register how to find the sites of operators.

    Args:
        targets: Operator names as for `rule`.

    Raises:
        RuleError: One of the targets has such a function already.
    """
    return SITES.register(*targets)
