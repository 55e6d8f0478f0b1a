"""Layered drawing of a directed graph: ranks from above, few crossings, straight edges.

Source: Sugiyama, Tagawa and Toda, Methods for visual understanding of hierarchical system
structures, IEEE Trans. SMC 1981. Cycles are cut where a depth-first search closes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

Node: TypeAlias = Hashable  # a name, or a place where an edge passes
Edge: TypeAlias = tuple[str, str]

_SWEEPS = 12
_LONGEST = 12  # ranks that an edge is led through; a longer one goes straight
_GAP, _SLIM = 26.0, 10.0  # between boxes, and around an edge that passes


@dataclass(frozen=True)
class Layout:
    """Where things are drawn.

    Attributes:
        x: Middle of each node.
        rank: Row of each node, from 0.
        paths: Points (x, rank) that each edge leads through, from its first to its second node.
        upward: Edges that lead against the order.
    """

    x: Mapping[str, float]
    rank: Mapping[str, int]
    paths: Mapping[Edge, list[tuple[float, int]]]
    upward: frozenset[Edge]


def layered(widths: Mapping[str, float], edges: Sequence[Edge]) -> Layout:
    """Place the nodes of a graph.

    Args:
        widths: Width of each node, in the order in which searches start.
        edges: Pairs of different nodes, each once.
    """
    upward = _closing(list(widths), edges)
    downward = [(b, a) if (a, b) in upward else (a, b) for a, b in edges]
    rank = _ranks(list(widths), downward)
    rows: list[list[Node]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for node in widths:
        rows[rank[node]].append(node)
    room: dict[Node, float] = {}
    room.update(widths.items())
    chains: dict[Edge, list[Node]] = {}
    for a, b in dict.fromkeys(downward):
        between: list[Node] = []
        if rank[b] - rank[a] <= _LONGEST:
            between = [("passing", a, b, i) for i in range(rank[a] + 1, rank[b])]
        for i, point in enumerate(between, rank[a] + 1):
            rows[i].append(point)
            room[point] = _SLIM
        chains[a, b] = [a, *between, b]
    above, below = _neighbours(chains, room)
    _order(rows, above, below)
    x = _places(rows, room, above, below)
    place = {node: i for i, row in enumerate(rows) for node in row}
    paths = {}
    for a, b in edges:
        chain = chains[b, a][::-1] if (a, b) in upward else chains[a, b]
        paths[a, b] = [(x[n], place[n]) for n in chain]
    return Layout({n: x[n] for n in widths}, rank, paths, upward)


def _closing(nodes: list[str], edges: Sequence[Edge]) -> frozenset[Edge]:
    """Edges that close a cycle of a depth-first search."""
    after: dict[str, list[str]] = {node: [] for node in nodes}
    for a, b in edges:
        after[a].append(b)
    found: set[Edge] = set()
    done: set[str] = set()
    fed = {b for _, b in edges}
    for start in [*(n for n in nodes if n not in fed), *nodes]:
        if start in done:
            continue
        active = {start}
        stack = [(start, iter(after[start]))]
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other in active:
                    found.add((node, other))
                elif other not in done:
                    active.add(other)
                    stack.append((other, iter(after[other])))
                    break
            else:
                stack.pop()
                active.discard(node)
                done.add(node)
    return frozenset(found)


def _ranks(nodes: list[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Longest paths from above; what nothing feeds stands right above what it feeds."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    rank: dict[str, int] = {}
    for node in nx.topological_sort(graph):
        rank[node] = max((rank[p] + 1 for p in graph.predecessors(node)), default=0)
    for node in nodes:
        if not graph.pred[node] and graph.succ[node]:
            rank[node] = min(rank[s] for s in graph.succ[node]) - 1
    return rank


def _neighbours(
    chains: Mapping[Edge, list[Node]], room: Mapping[Node, float]
) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    above: dict[Node, list[Node]] = {n: [] for n in room}
    below: dict[Node, list[Node]] = {n: [] for n in room}
    for chain in chains.values():
        for a, b in pairwise(chain):
            above[b].append(a)
            below[a].append(b)
    return above, below


def _order(
    rows: list[list[Node]], above: Mapping[Node, list[Node]], below: Mapping[Node, list[Node]]
) -> None:
    """Sort each row by the mean place of its neighbours, downwards and upwards in turns."""
    place = {node: float(i) for row in rows for i, node in enumerate(row)}

    def mean(node: Node, beside: Mapping[Node, list[Node]]) -> float:
        others = beside[node]
        return sum(place[o] for o in others) / len(others) if others else place[node]

    for sweep in range(_SWEEPS):
        beside, course = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in course:
            wanted = {node: mean(node, beside) for node in row}
            row.sort(key=wanted.__getitem__)
            place.update({node: float(i) for i, node in enumerate(row)})


def _places(
    rows: list[list[Node]],
    room: Mapping[Node, float],
    above: Mapping[Node, list[Node]],
    below: Mapping[Node, list[Node]],
) -> dict[Node, float]:
    """Middles of all nodes: as near to those of their neighbours as their order and widths let."""
    x: dict[Node, float] = {}
    for row in rows:
        at = 0.0
        for node in row:
            x[node] = at + room[node] / 2
            at += room[node] + _GAP
        for node in row:
            x[node] -= at / 2
    for sweep in range(2 * _SWEEPS):
        beside, course = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        if sweep >= _SWEEPS:
            beside = {n: above[n] + below[n] for n in room}
        for row in course:
            wanted, weights = [], []
            for node in row:
                others = [(x[o], _pull(node, o)) for o in beside[node]] or [(x[node], 1.0)]
                weights.append(sum(pull for _, pull in others))
                wanted.append(sum(at * pull for at, pull in others) / weights[-1])
            x.update(zip(row, _spaced(wanted, weights, [room[n] for n in row]), strict=True))
    return x


def _pull(node: Node, other: Node) -> float:
    """How much an edge wants to be straight: most where it passes by boxes."""
    return (1.0, 2.0, 8.0)[isinstance(node, tuple) + isinstance(other, tuple)]


def _spaced(wanted: list[float], weights: list[float], widths: list[float]) -> list[float]:
    """The places nearest to those wanted, by least squares, at which boxes in a row do not touch.

    Pool adjacent violators: boxes that would touch form a block, which takes the weighted mean.
    """
    starts, at = [], 0.0
    for i, width in enumerate(widths):
        at += (widths[i - 1] / 2 + _GAP + width / 2) if i else 0.0
        starts.append(at)
    blocks: list[tuple[float, float, int]] = []  # weighted sum, weight, boxes
    for want, weight, start in zip(wanted, weights, starts, strict=True):
        block = (weight * (want - start), weight, 1)
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            total, heavy, count = blocks.pop()
            block = (block[0] + total, block[1] + heavy, block[2] + count)
        blocks.append(block)
    offsets = [total / weight for total, weight, count in blocks for _ in range(count)]
    return [offset + start for offset, start in zip(offsets, starts, strict=True)]
