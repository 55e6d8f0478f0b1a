"""Which summand of a sum the others are computed from: the stream that a branch is added to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import fx

from depcut.graph.liveness import returns_its_input
from depcut.graph.reach import Ancestry


def origins(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it is the same tensor as."""
    yield node
    while returns_its_input(node):
        node = cast(fx.Node, node.args[0])
        yield node


def first_streams(ancestry: Ancestry, leaves: Sequence[fx.Node]) -> list[fx.Node | None]:
    """For each summand the first other one that it stems from, None if there is none.

    Where it stems from what that one is the same tensor as, that is returned.

    Args:
        ancestry: Of the graph.
        leaves: The summands from left to right.
    """
    of: dict[fx.Node, list[tuple[int, int]]] = {}  # (summand, how many steps before it)
    for i, leaf in enumerate(leaves):
        for k, origin in enumerate(origins(leaf)):
            of.setdefault(origin, []).append((i, k))
    search = _Search(ancestry, leaves, of)
    streams = search.run()
    back = {place: node for node, places in of.items() for place in places}
    return [None if place is None else back[place] for place in streams]


class _Search:
    """One walk back from all summands at once, with the set of those that each node leads to."""

    def __init__(
        self,
        ancestry: Ancestry,
        leaves: Sequence[fx.Node],
        of: dict[fx.Node, list[tuple[int, int]]],
    ) -> None:
        self.ancestry, self.leaves, self.of = ancestry, leaves, of
        self.own: dict[fx.Node, int] = {}  # bits of the summands that a node is
        for i, leaf in enumerate(leaves):
            self.own[leaf] = self.own.get(leaf, 0) | 1 << i
        self.best: list[tuple[int, int] | None] = [None] * len(leaves)
        self.ahead = [0] * len(leaves)  # origins of each summand that the walk has not come to
        for places in of.values():
            for i, _ in places:
                self.ahead[i] += 1
        self.first = 0  # no summand before this one has an origin ahead
        self.open = 0  # no summand before this one can find anything better

    def run(self) -> list[tuple[int, int] | None]:
        lowest = min(self.of, key=self.ancestry.number.__getitem__)
        for node, leads_to in self.ancestry.back(self.own, lowest):
            if node in self.of and self._meets(self.of[node], leads_to):
                break
        return self.best

    def _meets(self, places: list[tuple[int, int]], leads_to: int) -> bool:
        """Note an origin's descendants; whether the rest of the walk cannot change the result."""
        for i, k in places:
            self.ahead[i] -= 1
            others = leads_to & ~self.own[self.leaves[i]]
            while others:
                leaf = (others & -others).bit_length() - 1
                others &= others - 1
                known = self.best[leaf]
                self.best[leaf] = (i, k) if known is None else min(known, (i, k))
        while self.open < len(self.leaves) and self._is_settled(self.open):
            self.open += 1
        return self.open == len(self.leaves)

    def _is_settled(self, leaf: int) -> bool:
        while self.first < len(self.ahead) and not self.ahead[self.first]:
            self.first += 1
        other = self.first
        if other == leaf:
            later = range(leaf + 1, len(self.ahead))
            other = next((i for i in later if self.ahead[i]), len(self.ahead))
        known = self.best[leaf]
        return other == len(self.ahead) or (known is not None and known[0] <= other)
