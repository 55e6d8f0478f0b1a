"""Residual branches of a captured graph: what can be left out of a sum without changing its shape.

An addition x + f(x) computes its stream x where f is left out (He et al. 2016, arXiv 1512.03385;
nets with such paths removed still work: Veit et al. 2016, arXiv 1605.06431). Branches are found by
the graph alone: which summand the others are computed from, and what only a summand needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from depcut import axes
from depcut.branches.branch import Block, Branch, Refused, Residuals, bypass, operands
from depcut.branches.streams import first_streams, origins
from depcut.capture.program import Program, module_of, parent_of, stack_entries, where
from depcut.coupling.groups import Coupling, layer_of
from depcut.graph.liveness import Losses, is_size, returns_its_input
from depcut.graph.reach import Ancestry, Ways

_SEVERAL = "branches are dropped from the graph of one example call, and there are several"
_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def residuals(coupling: Coupling) -> Residuals:
    """Find the residual branches of a captured model.

    Args:
        coupling: The analysed model.
    """
    finder = _Finder(coupling)
    branches: list[Branch] = []
    refused: list[Refused] = []
    times: dict[str, int] = {}
    for total in finder.totals():
        for candidate in finder.branches(total):
            if isinstance(candidate, Refused):
                refused.append(candidate)
                continue
            times[candidate.name] = times.get(candidate.name, 0) + 1
            number = times[candidate.name]
            branches.append(
                candidate if number == 1 else replace(candidate, name=f"{candidate.name}#{number}")
            )
    if coupling.program.others:
        refused += [Refused(b.name, _SEVERAL, where(b.add)) for b in branches]
        branches = []
    return Residuals(tuple(branches), tuple(_blocks(coupling.program, branches)), tuple(refused))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users whose result is used in turn; what only asserts does not count."""
    return [u for u in node.users if u.users or u.op == "output"]


class _Finder:
    """Sums of a graph, and what each of their summands alone needs."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.program = coupling, coupling.program
        self.nodes = list(self.program.graph.graph.nodes)
        self.losses = Losses(self.program)
        self.ancestry = Ancestry(self.nodes)
        self.ways = Ways(self.nodes)
        self.adds = {n for n in self.nodes if self._is_plain(n)}

    def _is_plain(self, node: fx.Node) -> bool:
        """An addition of two tensors of the very same dimensions."""
        if node.target not in _ADDITIONS or node.kwargs.get("alpha", 1) != 1:
            return False
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return False
        shapes = [self.coupling.env.get(n) for n in (node, *operands(node))]
        if not all(isinstance(s, tuple) and s for s in shapes):
            return False
        first, *others = cast(Any, shapes)
        return all(
            len(s) == len(first) and all(_alike(a, b) for a, b in zip(first, s, strict=True))
            for s in others
        )

    def totals(self) -> list[fx.Node]:
        """Additions that are no summand of another one."""
        return [n for n in self.nodes if n in self.adds and not self._is_summand(n)]

    def _is_summand(self, node: fx.Node) -> bool:
        readers = _readers(node)
        return len(readers) == 1 and readers[0] in self.adds

    def branches(self, total: fx.Node) -> list[Branch | Refused]:
        """The summands of a sum that can be dropped, or look as if they could."""
        leaves, within = self._summands(total)
        streams = first_streams(self.ancestry, [leaf for leaf, _ in leaves])
        summands: list[Branch | Refused] = []
        for (leaf, add), stream in zip(leaves, streams, strict=True):
            if stream is not None:
                branch = self._judge(leaf, add, total, within, stream)
                summands += [branch] if branch is not None else []
        return summands or self._projected(leaves, total, within)

    def _summands(
        self, total: fx.Node
    ) -> tuple[list[tuple[fx.Node, fx.Node]], dict[fx.Node, fx.Node]]:
        """(summand, its addition) from left to right, and the addition around each inner one."""
        leaves: list[tuple[fx.Node, fx.Node]] = []
        within: dict[fx.Node, fx.Node] = {}
        waiting = [(total, total)]
        while waiting:
            node, outer = waiting.pop()
            if node is not total and not (node in self.adds and self._is_summand(node)):
                leaves.append((node, outer))
                continue
            if node is not total:
                within[node] = outer
            a, b = operands(node)
            waiting += [(b, node), (a, node)] if a is not b else []
        return leaves, within

    def _alone(self, operand: fx.Node, add: fx.Node) -> set[fx.Node]:
        """Nodes that nothing needs once an operand is left out of its addition."""
        a, b = operands(add)
        return self.losses({add: b if operand is a else a})

    def _read(self, alone: set[fx.Node]) -> set[fx.Node]:
        """Activations that these nodes are computed from."""
        sources = {n for node in alone if not is_size(node) for n in node.all_input_nodes}
        return {n for n in sources - alone if n not in self.program.tensors and not is_size(n)}

    def _macs(self, nodes: Iterable[fx.Node]) -> float:
        effects = [self.coupling.effects[n] for n in nodes if n in self.coupling.effects]
        sizes = (t * math.prod(d.size for d in dims) for e in effects for t, dims in e.macs)
        return sum(sizes) / self.program.batch

    def _projected(
        self,
        leaves: list[tuple[fx.Node, fx.Node]],
        total: fx.Node,
        within: Mapping[fx.Node, fx.Node],
    ) -> list[Branch | Refused]:
        """Branches beside a shortcut that is itself computed, from the same activation."""
        alone = [self._alone(leaf, add) for leaf, add in leaves]
        read = [self._read(nodes) for nodes in alone]
        costs = [self._macs(nodes) for nodes in alone]
        simple = [
            i for i, sources in enumerate(read) if leaves[i][0] in alone[i] and len(sources) == 1
        ]
        if not simple:
            return []
        short = min(simple, key=lambda i: costs[i])
        (stream,) = read[short]
        branches = [
            self._judge(*leaves[i], total, within, stream)
            for i in range(len(leaves))
            if i != short and stream in read[i] and costs[i] > costs[short]
        ]
        return [b for b in branches if b is not None]

    def _judge(
        self,
        operand: fx.Node,
        add: fx.Node,
        total: fx.Node,
        within: Mapping[fx.Node, fx.Node],
        stream: fx.Node,
    ) -> Branch | Refused | None:
        """A branch, the reason why it is none, or None where it has no parameters."""
        alone = self._alone(operand, add)
        a, b = operands(add)
        skip = b if operand is a else a
        tensors = self.program.tensors
        used = {
            tensors[n]
            for node in alone | {operand}
            for n in node.all_input_nodes
            if tensors.get(n) in self.program.parameters
        }
        if not used:
            return None
        name = self._name(alone | {operand})
        if operand not in alone:
            user = next(u for u in operand.users if u is not add)
            return Refused(
                self._way(operand, stream), "what it adds is used elsewhere, too", where(user)
            )
        if skip.meta["val"].dtype != add.meta["val"].dtype:
            return Refused(name, "without it, the sum would have another dtype", where(add))
        same = set(origins(stream))
        for source in sorted(self._read(alone) - same):
            if self.ways.avoid(source, total) and self.ancestry.stems_from(source, stream):
                reason = "what it computes on its way is used elsewhere, too"
                return Refused(self._way(operand, stream), reason, where(source))
        owned = {tensors[n] for n in alone if n in tensors} & self.program.parameters
        return Branch(
            name=name,
            operand=operand,
            add=add,
            total=total,
            within=within,
            skip=skip,
            nodes=frozenset(alone),
            parameters=tuple(sorted(owned)),
            macs=self._macs(alone),
        )

    def _way(self, operand: fx.Node, stream: fx.Node) -> str:
        """The innermost module with all layers between a stream and what is added to it."""
        between = self.ancestry.between(operand, stream) & self.losses.live
        return self._name((between - {stream}) | {operand})

    def _name(self, nodes: set[fx.Node]) -> str:
        """The innermost module that contains all layers that compute, else all with parameters."""
        tensors = self.program.tensors
        effects = self.coupling.effects
        layers = [n for n in nodes if n in effects and effects[n].macs]
        layers = layers or [n for n in nodes if any(s in tensors for s in n.all_input_nodes)]
        first, *others = (module_of(n) for n in sorted(layers or nodes))
        common = first
        while common and not all(f"{o}.".startswith(f"{common}.") for o in others):
            common = parent_of(common)
        read = (tensors[s] for n in sorted(nodes) for s in n.all_input_nodes if s in tensors)
        return common or first or layer_of(next(read, "model"))


def _alike(a: axes.Term, b: axes.Term) -> bool:
    """Whether two dimensions keep the same indices whatever is removed."""
    a, b = axes.resolve(a), axes.resolve(b)
    if a.size != b.size:
        return False
    stuck = axes.is_frozen(a) and axes.is_frozen(b)
    return a is b or stuck or list(axes.leaves(a)) == list(axes.leaves(b))


def _blocks(program: Program, branches: list[Branch]) -> Iterable[Block]:
    """Modules that return what they get once their branches are dropped."""
    times: dict[str, int] = {}
    for call in program.calls:
        times[call.module] = times.get(call.module, 0) + 1
    inside: dict[str, list[Branch]] = {}
    for branch in branches:
        for module in dict.fromkeys(stack_entries(branch.add)):
            inside.setdefault(module, []).append(branch)
    for call in program.calls:
        inner = inside.get(call.module, []) if times[call.module] == 1 else []
        results = [leaf for leaf in call.out_leaves if isinstance(leaf, fx.Node)]
        given = {o for leaf in call.leaves if isinstance(leaf, fx.Node) for o in origins(leaf)}
        if not inner or len(results) != 1:
            continue
        through = bypass(inner)
        stream = results[0]
        while stream in through or (stream not in given and returns_its_input(stream)):
            stream = through.get(stream) or cast(fx.Node, stream.args[0])
        if stream in given:
            yield Block(call.module, tuple(b.name for b in inner), stream, results[0])
