"""One captured graph for inputs of other lengths or image sizes: the numbers it is run with there.

A model that is captured at another length mostly gives the same nodes with other numbers: sizes to
view, expand and cut at, positions to make. So a run at that length is a run of the first graph with
the numbers of the second one; all that is known of the first graph's nodes holds for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from depcut.capture.program import Program, where

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Resized:
    """What differs in a captured graph where its inputs have other sizes.

    Attributes:
        arguments: (args, kwargs) of the nodes that are called with other numbers.
        constants: Values of the constants typed into the code, by their nodes.
        sizes: Of every node, at the batch size of the capture.
    """

    arguments: Mapping[fx.Node, Arguments]
    constants: Mapping[fx.Node, Any]
    sizes: Mapping[fx.Node, Any]

    def arguments_of(self, node: fx.Node) -> Arguments:
        """The (args, kwargs) of a node, with the numbers of these sizes."""
        return self.arguments.get(node) or (node.args, node.kwargs)


class FlatInputs(list[Any]):
    """Flat inputs of a captured graph, with the numbers that the graph is run with on them.

    Args:
        leaves: The inputs.
        resized: None where they have the captured sizes, but for the batch.
    """

    def __init__(self, leaves: list[Any], resized: Resized | None = None) -> None:
        super().__init__(leaves)
        self.resized = resized


def numbers_of_run(inputs: Any) -> Resized | None:
    """The numbers that the graph is run with on flat inputs; None: those of the capture."""
    return inputs.resized if isinstance(inputs, FlatInputs) else None


def resize(program: Program, other: Program) -> Resized | str:
    """The numbers of a second capture for the nodes of the first.

    Args:
        program: The captured model.
        other: The same model, captured with inputs of other sizes.

    Returns:
        Or why its graph is another one, in words.
    """
    pairs = list(zip(program.graph.graph.nodes, other.graph.graph.nodes, strict=False))
    own: dict[fx.Node, fx.Node] = {}
    arguments: dict[fx.Node, Arguments] = {}
    constants: dict[fx.Node, Any] = {}
    for node, there in pairs:
        if node.op != there.op or not _same_target(program, node, other, there):
            return f"the code takes another course: {where(there)}"
        if node.op == "call_function":
            given = fx.map_arg((there.args, there.kwargs), lambda n: own.get(n, n))
            if _nodes((node.args, node.kwargs)) != _nodes(given):
                return f"the code computes it from other values: {where(there)}"
            if given != (node.args, node.kwargs):
                arguments[node] = given
        elif node.op == "get_attr":
            constants[node] = getattr(other.graph, str(there.target))
        elif node.op == "placeholder" and program.tensors.get(node) in program.anonymous:
            constants[node] = other.constants[other.tensors[there]]
        own[there] = node
    if len(program.graph.graph.nodes) != len(other.graph.graph.nodes):
        return "the code computes more, or less"
    if [own.get(n, n) if isinstance(n, fx.Node) else n for n in other.outputs] != program.outputs:
        return "the model returns something else"
    return Resized(arguments, constants, {own[n]: s for n, s in other.sizes.items() if n in own})


def _same_target(program: Program, node: fx.Node, other: Program, there: fx.Node) -> bool:
    """Whether two nodes stand for the same tensor, or call the same operator."""
    if node.op in ("get_attr", "output"):
        return True
    if node.op != "placeholder":
        return bool(node.target == there.target)
    ours, theirs = program.tensors.get(node), other.tensors.get(there)
    typed = ours in program.anonymous and theirs in other.anonymous
    return ours == theirs or typed


def _nodes(tree: Any) -> list[fx.Node]:
    """The nodes among nested arguments, in order, slices included."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(tree, note)
    return found
