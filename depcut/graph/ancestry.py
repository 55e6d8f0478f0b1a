"""What the nodes of a captured graph are computed from; every search is linear in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from depcut.capture.program import Program
from depcut.graph.operators import is_aten

_SWAPS = ("transpose", "swapaxes", "swapdims")
_TURNS = ("t", "mT", "mH", "adjoint", "matrix_H")
_COPIES = ("to", "contiguous", "clone", "alias", "detach")


def reached(
    program: Program, sources: Iterable[fx.Node], through: Callable[[fx.Node], bool] | None = None
) -> set[fx.Node]:
    """All nodes that are computed from any of some nodes, these included.

    Args:
        program: The captured graph.
        sources: Where to start.
        through: What a node must fulfil to count, and to lead on; left out, all do.
    """
    dependent = set(sources)
    for node in program.graph.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes) and (through is None or through(node)):
            dependent.add(node)
    return dependent


def ancestors(node: fx.Node, within: Callable[[fx.Node], bool] | None = None) -> list[fx.Node]:
    """All that a node is computed from, itself first, what is read first before the rest.

    Args:
        node: A node of a graph.
        within: What an ancestor must fulfil to count, and to lead on; left out, all do.
    """
    visited: dict[fx.Node, None] = {}
    open_nodes = [node]
    while open_nodes:
        current = open_nodes.pop()
        if current not in visited:
            visited[current] = None
            sources = reversed(current.all_input_nodes)
            open_nodes += [n for n in sources if within is None or within(n)]
    return list(visited)


class Weights:
    """Parameters behind the nodes that are computed from parameters alone, such as a normed weight.

    Args:
        program: A captured graph.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._of_parameters: set[fx.Node] = set()
        for node in program.graph.graph.nodes:
            sources = self._sources(node)
            if program.tensors.get(node) in program.parameters or (
                sources and self._of_parameters.issuperset(sources)
            ):
                self._of_parameters.add(node)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Tensors that an operator's result is computed from."""
        if node.op != "call_function":
            return []
        return [n for n in node.all_input_nodes if self.program.sizes.get(n) is not None]

    def behind(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the parameters that a node is computed from; empty where there is more to it."""
        if node not in self._of_parameters:
            return ()
        names = (
            self.program.tensors.get(n) for n in ancestors(node, self._of_parameters.__contains__)
        )
        return tuple(dict.fromkeys(name for name in names if name is not None))


def parameter_dimension(node: fx.Node, dim: int, program: Program) -> tuple[str, int] | None:
    """The (name, dimension) of the tensor that a node's dimension is, through casts and swaps.

    Args:
        node: A node of the captured graph, or of one beside it (training, other example calls).
        dim: One of its dimensions, counted from the front.
        program: The captured model.

    Returns:
        None where the node is computed from activations, or in another way.
    """
    program = next((p for p in program.captured if node in p.sizes), program)
    while node not in program.tensors:
        args: Any = node.args
        source = args[0] if args else None
        if not isinstance(source, fx.Node) or program.sizes[source] is None:
            return None
        rank = len(program.sizes[source])
        if is_aten(node, *_SWAPS):
            swapped = [d % rank for d in args[1:3]]
            dim = swapped[1 - swapped.index(dim)] if dim in swapped else dim
        elif is_aten(node, "permute"):
            dim = args[1][dim] % rank
        elif is_aten(node, "numpy_T"):
            dim = rank - 1 - dim
        elif is_aten(node, *_TURNS) and rank > 1:
            dim = {rank - 1: rank - 2, rank - 2: rank - 1}.get(dim, dim)
        elif not is_aten(node, *_COPIES, *_TURNS):
            return None
        node = source
    return program.tensors[node], dim


def is_shared(name: str, program: Program) -> bool:
    """Whether a parameter or buffer is read in several places of the graph.

    Args:
        name: Its qualified name.
        program: The captured model.
    """
    names = program.aliases.get(name, (name,))
    return sum(len(n.users) for alias in names for n in program.holders.get(alias, ())) > 1
