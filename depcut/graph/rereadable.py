"""Values that a run can ask for again: the model's tensors that nothing writes to, and their views.

They need not be held while a run pauses, and can be read from wherever they live when a node first
reads them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from depcut.capture.program import Program
from depcut.graph.arguments import sources_of_storage, written
from depcut.graph.liveness import storages, written_roots
from depcut.graph.operators import is_item, is_operator


def rereadable(program: Program) -> frozenset[fx.Node]:
    """Placeholders of tensors, constants and their views whose storage nothing writes to.

    Args:
        program: The captured graph.
    """
    return program.once(_rereadable)


def names_read(nodes: Iterable[fx.Node], program: Program) -> set[str]:
    """Names of the tensors that nodes read, directly or as views.

    Args:
        nodes: Of the captured graph.
        program: The captured graph.
    """
    asked, out = rereadable(program), set[str]()
    waiting = [source for node in nodes for source in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node in program.tensors:
            out.add(program.tensors[node])
        elif node in asked:
            waiting += node.all_input_nodes
    return out


def _rereadable(program: Program) -> frozenset[fx.Node]:
    nodes = list(program.graph.graph.nodes)
    roots = storages(nodes)
    changed = {root for node in written_roots(nodes).values() for root in node}
    out: set[fx.Node] = set()
    for node in nodes:
        if roots[node] in changed:
            continue
        if node in program.tensors or node.op == "get_attr" or _is_view(node, out):
            out.add(node)
    return frozenset(out)


def _is_view(node: fx.Node, of: set[fx.Node]) -> bool:
    """Whether a node does nothing but show some of these nodes' storage in another way."""
    sources = node.all_input_nodes
    if node.op != "call_function" or not sources or not of.issuperset(sources):
        return False
    if is_item(node):
        return True
    shared = is_operator(node) and any(True for _ in sources_of_storage(node))
    return shared and not written(node)
