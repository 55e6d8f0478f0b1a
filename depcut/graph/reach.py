"""Reachability between nodes of a graph, without a set of ancestors for each node.

A query visits the nodes between the two that it names; one about all paths to the outputs takes
logarithmic time. Memory is linear in the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from depcut.graph.liveness import is_size


class Ancestry:
    """Which nodes a node is computed from; a size that is read off a tensor is no part of it.

    Args:
        nodes: All nodes of a graph, in its order.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.number = {node: i for i, node in enumerate(nodes)}
        self.nodes = nodes

    def back(self, starts: Mapping[fx.Node, int], first: fx.Node) -> Iterator[tuple[fx.Node, int]]:
        """What some nodes are computed from, themselves included, down to a first one.

        Args:
            starts: The nodes, each with a set of bits.
            first: Nothing that comes before it in the graph is returned.

        Returns:
            (node, bits of all starts that it leads to), the last node of the graph first.
        """
        floor = self.number[first]
        bits = {-self.number[n]: b for n, b in starts.items() if self.number[n] >= floor}
        heap = sorted(bits)
        while heap:
            at = heapq.heappop(heap)
            node = self.nodes[-at]
            yield node, bits[at]
            for source in sources(node):
                number = -self.number[source]
                if number in bits:
                    bits[number] |= bits[at]
                elif number <= -floor:
                    bits[number] = bits[at]
                    heapq.heappush(heap, number)

    def stems_from(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node is computed from another one, or is that one."""
        return node is source or any(
            source in sources(derived) for derived, _ in self.back({node: 1}, source)
        )

    def between(self, node: fx.Node, source: fx.Node) -> set[fx.Node]:
        """What stems from a source and leads to a node, both included; empty if the node does not.

        Args:
            node: Where it leads.
            source: Where it starts.
        """
        derived: set[fx.Node] = set()
        for candidate in [n for n, _ in self.back({node: 1}, source)][::-1]:
            if candidate is source or not derived.isdisjoint(sources(candidate)):
                derived.add(candidate)
        return derived


def sources(node: fx.Node) -> list[fx.Node]:
    """The input nodes of a node; none for a node that reads a size."""
    return [] if is_size(node) else node.all_input_nodes


class Ways:
    """Whether all paths from a node to the outputs lead through another one.

    The post-dominator tree: the parent of a node is the closest one on all of its paths to the
    outputs (its immediate post-dominator). It has jump pointers (Myers, An
    applicative random-access stack, 1983), so that a common ancestor is found in logarithmic time.

    Args:
        nodes: All nodes of a graph, in its order.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self.jump: dict[fx.Node, fx.Node] = {}
        self.depth: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            readers = [u for u in node.users if u in self.depth]
            if node.op == "output":
                self._hang(node, None)
            elif readers:
                parent = readers[0]
                for reader in readers[1:]:
                    parent = self._common(parent, reader)
                self._hang(node, parent)

    def _hang(self, node: fx.Node, parent: fx.Node | None) -> None:
        if parent is None:
            self.parent[node], self.jump[node], self.depth[node] = node, node, 0
            return
        far = self.jump[parent]
        even = self.depth[parent] - self.depth[far] == self.depth[far] - self.depth[self.jump[far]]
        self.parent[node], self.depth[node] = parent, self.depth[parent] + 1
        self.jump[node] = self.jump[far] if even else parent

    def _lifted(self, node: fx.Node, depth: int) -> fx.Node:
        while self.depth[node] > depth:
            far = self.jump[node]
            node = far if self.depth[far] >= depth else self.parent[node]
        return node

    def _common(self, a: fx.Node, b: fx.Node) -> fx.Node:
        least = min(self.depth[a], self.depth[b])
        a, b = self._lifted(a, least), self._lifted(b, least)
        while a is not b:
            apart = self.jump[a] is not self.jump[b]
            a, b = (self.jump[a], self.jump[b]) if apart else (self.parent[a], self.parent[b])
        return a

    def avoid(self, node: fx.Node, gate: fx.Node) -> bool:
        """Whether the outputs need a node on some path that does not lead through a gate.

        Args:
            node: Where paths start.
            gate: The node that they may avoid.
        """
        if node not in self.depth or gate not in self.depth:
            return node in self.depth
        deep = self.depth[gate]
        return self.depth[node] < deep or self._lifted(node, deep) is not gate
