"""Where a walk over a captured graph pauses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from depcut.capture.program import Program
from depcut.graph.liveness import storages, written_roots
from depcut.graph.rereadable import rereadable


def joined(
    program: Program, nodes: Sequence[fx.Node], needs: Callable[[fx.Node], Iterable[fx.Node]]
) -> list[list[fx.Node]]:
    """Nodes that can be seen in one pause, before the first of them: queries, keys and values, say.

    Args:
        program: The captured graph.
        nodes: What is to be seen, in the order of execution.
        needs: The nodes whose values are to be seen with a node.

    Returns:
        Lists of nodes, each with all that they need computed before its first one and not written
        to until its last one.
    """
    order = {node: i for i, node in enumerate(program.graph.graph.nodes)}
    asked, roots = rereadable(program), storages(order)
    changes: dict[fx.Node, list[int]] = {}
    for node, changed in written_roots(order).items():
        for root in changed:
            changes.setdefault(root, []).append(order[node])

    def seen(node: fx.Node, first: fx.Node) -> bool:
        """Whether a node can be seen before another one."""
        start, end = order[first], order[node]
        for source in needs(node):
            if source in asked:
                continue
            if order[source] >= start:
                return False
            if any(start <= at < end for at in changes.get(roots[source], ())):
                return False
        return True

    out: list[list[fx.Node]] = []
    for node in nodes:
        if out and seen(node, out[-1][0]):
            out[-1].append(node)
        else:
            out.append([node])
    return out
