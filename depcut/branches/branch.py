"""Residual branches as data: what can be dropped, and which additions then stand aside."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import fx

from depcut.errors import PlanError, listed


@dataclass(frozen=True, eq=False, repr=False)
class Branch:
    """A summand that can be dropped.

    Attributes:
        name: The innermost module that contains its layers; "#2" tells branches of one apart.
        operand: What it adds to the stream.
        add: Its own addition.
        total: The whole sum: the stream once all summands are added.
        within: For each addition inside of that sum, the one that it is a summand of.
        skip: The other operand of its own addition.
        nodes: What only it needs.
        parameters: Names of parameters that only it uses.
        macs: Multiply-accumulates of these nodes, for one example.
    """

    name: str
    operand: fx.Node
    add: fx.Node
    total: fx.Node
    within: Mapping[fx.Node, fx.Node]
    skip: fx.Node
    nodes: frozenset[fx.Node]
    parameters: tuple[str, ...]
    macs: float

    def __repr__(self) -> str:
        return f"<Branch {self.name}: {self.macs:,.0f} MACs>"


@dataclass(frozen=True)
class Refused:
    """A summand that looks like a residual branch and cannot be dropped, with the reason."""

    name: str
    reason: str
    where: str


@dataclass(frozen=True, eq=False)
class Block:
    """A module that does nothing any more once all of its branches are dropped.

    Attributes:
        name: Of the module.
        branches: Names of its branches.
        stream: What it gets and passes on.
        result: What it returns in the dense model.
    """

    name: str
    branches: tuple[str, ...]
    stream: fx.Node
    result: fx.Node


@dataclass(frozen=True, eq=False)
class Residuals:
    """The residual branches of a captured model.

    Attributes:
        branches: Removable branches in the order of the graph.
        blocks: Modules that consist of branches alone.
        refused: What looks like a branch and is none, with the reason.
    """

    branches: tuple[Branch, ...]
    blocks: tuple[Block, ...]
    refused: tuple[Refused, ...]

    def sparing(self, spared: Callable[[str], bool]) -> Residuals:
        """Only those that leave some parameters alone.

        Args:
            spared: Whether a parameter, by name, must stay.
        """
        branches = tuple(b for b in self.branches if not any(map(spared, b.parameters)))
        free = {b.name for b in branches}
        blocks = tuple(b for b in self.blocks if free.issuperset(b.branches))
        return Residuals(branches, blocks, self.refused)

    def named(self, names: Iterable[str]) -> tuple[Branch, ...]:
        """Branches by their names; the name of a block stands for all of its branches.

        Where a block has the name of a branch, the branch is meant.

        Raises:
            PlanError: There is no such branch, or it cannot be dropped.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        own = {b.name for b in self.branches}
        blocks = {b.name: b.branches for b in self.blocks if b.name not in own}
        unknown = [n for n in wanted if n not in own and n not in blocks]
        if unknown:
            why = next((f.reason for f in self.refused if f.name == unknown[0]), "")
            known = sorted({*own, *blocks})
            close = difflib.get_close_matches(unknown[0], known, 3, 0.4)
            named = f"did you mean {', '.join(close)}?" if close else f"branches: {listed(known)}"
            raise PlanError(
                f"the branch {unknown[0]!r} cannot be dropped: {why}"
                if why
                else f"the model has no residual branch {unknown[0]!r}",
                where="dropped=",
                remedy=named if known else "see analysis.residuals.refused for what was found",
            )
        chosen = {branch for n in wanted for branch in blocks.get(n, (n,))}
        return tuple(b for b in self.branches if b.name in chosen)


def bypass(branches: Iterable[Branch]) -> dict[fx.Node, fx.Node]:
    """Additions that stand aside where these branches are dropped, and the operand that stays.

    Args:
        branches: To be dropped.
    """
    lost: dict[fx.Node, set[fx.Node]] = {}
    within: dict[fx.Node, Mapping[fx.Node, fx.Node]] = {}
    for branch in branches:
        lost.setdefault(branch.add, set()).add(branch.operand)
        within[branch.add] = branch.within
    out: dict[fx.Node, fx.Node] = {}
    waiting = sorted(lost)  # a heap, in the order of the graph
    while waiting:
        add = heapq.heappop(waiting)
        left = [n for n in operands(add) if n not in lost[add]]
        if left:
            out[add] = left[0]
            continue
        # Nothing is left to add: this sum is itself a summand that goes.
        out.pop(add, None)
        outer = within[add][add]
        within[outer] = within[add]
        if outer not in lost:
            lost[outer] = set()
            heapq.heappush(waiting, outer)
        lost[outer].add(add)
    return out


def operands(add: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two summands of an addition."""
    return cast(tuple[fx.Node, fx.Node], add.args[:2])
