"""Where a walk over a captured graph pauses."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import fx

from depcut.capture.capture import hint
from depcut.capture.program import Program
from depcut.graph.interpreter import last_uses
from depcut.graph.liveness import storages, written_roots
from depcut.graph.rereadable import rereadable
from depcut.support.torch_private import pytree

_EARLY = 8  # a stretch costs at least the limit divided by it, where it can


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


def cut(
    program: Program, cost: Mapping[fx.Node, int], limit: int, *, apart: bool = False
) -> list[fx.Node]:
    """Nodes before which a run can pause with little in hand: none costs more than a limit between.

    A stretch costs more only where a single node does. Of the places at which it can end, it ends
    at the last one of those where the fewest bytes are alive.

    Args:
        program: The captured graph.
        cost: Of nodes, in bytes; others cost nothing.
        limit: What the nodes between two cuts may cost together.
        apart: Whether what is alive at a cut must not share storage that is written to.

    Returns:
        The cuts in the order of execution; none where everything is within the limit.
    """
    nodes = list(program.graph.graph.nodes)
    alive, mixed = alive_before(program)
    able = [n.op == "call_function" and not (apart and mixed[i]) for i, n in enumerate(nodes)]
    total = [0, *accumulate(cost.get(n, 0) for n in nodes)]
    out: list[fx.Node] = []
    start = 0
    while total[-1] - total[start] > limit:
        # A single node that costs more stands alone.
        end = max(bisect_right(total, total[start] + limit) - 1, bisect_right(total, total[start]))
        end = bisect_right(total, total[end]) - 1
        early = bisect_left(total, total[start] + limit // _EARLY, start + 1)
        places = [i for i in range(max(early, start + 1), end + 1) if i < len(nodes) and able[i]]
        places = places or [i for i in range(start + 1, end + 1) if i < len(nodes) and able[i]]
        places = places or [i for i in range(end + 1, len(nodes)) if able[i]][:1]
        if not places:
            break
        start = min(places, key=lambda i: (alive[i], -i))
        out.append(nodes[start])
    return out


def bytes_of(node: fx.Node) -> int:
    """Bytes of a node's value in the captured example; 0 for what is no tensor."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return sum(
        math.prod(map(hint, v.shape)) * v.dtype.itemsize
        for v in leaves
        if isinstance(v, torch.Tensor)
    )


def alive_before(program: Program) -> tuple[list[int], list[bool]]:
    """Before each node: bytes that are alive, and whether values share what is written to."""
    nodes = list(program.graph.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    asked, roots = rereadable(program), storages(nodes)
    changed = {root for found in written_roots(nodes).values() for root in found}
    ends = {source: order[n] for n, found in last_uses(program).items() for source in found}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        last[roots[node]] = max(last.get(roots[node], 0), ends[node])
    steps, shared = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
    sharing: dict[fx.Node, list[tuple[int, int]]] = {}
    for node in nodes:
        if node in asked:
            continue
        if roots[node] is node and order[node] < last[node]:
            steps[order[node] + 1] += bytes_of(node)
            steps[last[node] + 1] -= bytes_of(node)
        if roots[node] in changed:
            sharing.setdefault(roots[node], []).append((order[node] + 1, ends[node] + 1))
    for spans in sharing.values():
        until = 0
        for begin, end in sorted(spans):
            if begin < until:
                shared[begin] += 1
                shared[min(end, until)] -= 1
            until = max(until, end)
    alive = list(accumulate(steps[:-1]))
    return alive, [count > 0 for count in accumulate(shared[:-1])]


def weights_of(program: Program) -> dict[fx.Node, int]:
    """Bytes of the model's tensors that each node reads, directly or as views."""
    asked = rereadable(program)
    size = {n: bytes_of(n) for n in asked}
    nodes = program.graph.graph.nodes
    return {n: sum(size.get(s, 0) for s in n.all_input_nodes) for n in nodes if n not in asked}
