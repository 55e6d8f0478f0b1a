"""What a graph still computes once some of its nodes stand aside: live nodes, and what is gone.

A node that stands aside is replaced by one of its arguments (an addition by the stream that it adds
to); whatever only it read is dead, and so are the modules and tensors that only dead nodes use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from depcut.capture.program import Program, stack_entries
from depcut.graph.arguments import sources_of_storage, written
from depcut.graph.operators import base_name, is_item, is_size, returns_its_input

__all__ = ["Bypass", "Gone", "gone", "is_size", "live_nodes", "returns_its_input"]
__all__ += ["rewritten", "storages", "written", "written_roots"]

Bypass = Mapping[fx.Node, fx.Node]


@dataclass(frozen=True, eq=False)
class Gone:
    """Nodes, module calls, modules and tensors that are no longer used.

    Attributes:
        nodes: Graph nodes that nothing needs any more.
        calls: Module calls of which no node is left, as entries of a node's module stack.
        modules: Qualified names of modules without a call that is left.
        tensors: Names of parameters and buffers that only dead nodes used.
        through: Nodes that stand aside, with the one that takes their place.
        fresh: Those of them whose result is a tensor of its own, not the argument's storage.
        written: Those of the fresh ones that a later operator changes in place.
    """

    nodes: frozenset[fx.Node] = frozenset()
    calls: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    through: Bypass = field(default_factory=dict)
    fresh: frozenset[fx.Node] = frozenset()
    written: frozenset[fx.Node] = frozenset()


def live_nodes(program: Program, bypass: Bypass) -> set[fx.Node]:
    """Nodes that the outputs need, or that change in place what the outputs need.

    Args:
        program: The captured graph.
        bypass: Nodes that stand aside, with the one that takes their place.
    """
    writers = _writers(program.graph.graph.nodes)
    live: set[fx.Node] = set()
    waiting = [n for n in program.graph.graph.nodes if n.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += _sources(node, bypass)
            waiting += writers.get(node, ())
    return live


def _reads(user: fx.Node, node: fx.Node, bypass: Bypass) -> bool:
    """Whether a user keeps a node alive."""
    if user in bypass:
        return bypass[user] is node
    return is_size(node) or not is_size(user)


class Losses:
    """Finds the nodes that become dead where nodes stand aside, for many queries of one graph.

    The result is that of `live_nodes`, in time linear in the number of dead nodes.

    Args:
        program: The captured graph.
    """

    def __init__(self, program: Program) -> None:
        nodes = list(program.graph.graph.nodes)
        self.writers = _writers(nodes)
        self.written = {w: roots for w, roots in written_roots(nodes).items() if roots}
        self.live = live_nodes(program, {})
        self.read: set[fx.Node] = set()  # live without what is only written to
        for node in reversed(nodes):
            if node.op == "output" or node in self.read:
                self.read.add(node)
                self.read.update(_sources(node, {}))
        self.needs = dict.fromkeys(self.live, 0)
        for node in self.live:
            for source in self._counted(node, {}):
                self.needs[source] += 1

    def _counted(self, node: fx.Node, bypass: Bypass) -> list[fx.Node]:
        """Sources that a node keeps alive, but for what it is only there to change."""
        hidden = node not in self.read
        return [s for s in _sources(node, bypass) if not (hidden and s in self.read)]

    def __call__(self, bypass: Bypass) -> set[fx.Node]:
        """Nodes that are live in the dense graph and are not any more.

        Args:
            bypass: Nodes that stand aside, with the one that takes their place.
        """
        lost: set[fx.Node] = set()
        fewer: dict[fx.Node, int] = {}
        waiting: list[fx.Node] = []

        def drop(sources: Iterable[fx.Node]) -> None:
            for source in sources:
                fewer[source] = fewer.get(source, 0) + 1
                waiting.append(source)

        for node, other in bypass.items():
            drop(s for s in self._counted(node, {}) if node in self.live and s is not other)
        while waiting:
            node = waiting.pop()
            roots = self.written.get(node, ()) if node not in self.read else ()
            if (
                node in lost
                or fewer.get(node, 0) < self.needs[node]
                or any(r in self.live and r not in lost for r in roots)
            ):
                continue
            lost.add(node)
            drop(self._counted(node, bypass))
            waiting += [w for w in self.writers.get(node, ()) if w not in self.read]
        return self._without_kept(lost, bypass)

    def _without_kept(self, lost: set[fx.Node], bypass: Bypass) -> set[fx.Node]:
        """The lost nodes less those that write to what stays, or that such a write needs."""
        kept = [node for node in lost if self._is_kept(node, lost, bypass)]
        while kept:
            node = kept.pop()
            if node in lost:
                lost.remove(node)
                kept += [n for n in _sources(node, bypass) if n in lost]
                kept += [w for w in self.writers.get(node, ()) if w in lost]
        return lost

    def _is_kept(self, node: fx.Node, lost: set[fx.Node], bypass: Bypass) -> bool:
        if any(r in self.live and r not in lost for r in self.written.get(node, ())):
            return True
        return any(u in self.live and u not in lost and _reads(u, node, bypass) for u in node.users)


def _sources(node: fx.Node, bypass: Bypass) -> list[fx.Node]:
    if node in bypass:
        return [bypass[node]]
    return [n for n in node.all_input_nodes if not is_size(node) or is_size(n)]


def gone(program: Program, bypass: Bypass) -> Gone:
    """Nodes, module calls, modules and tensors that nothing needs once nodes stand aside.

    Args:
        program: The captured graph.
        bypass: Nodes that stand aside, with the one that takes their place.
    """
    if not bypass:
        return Gone()
    nodes = [n for n in program.graph.graph.nodes if n.op != "output"]
    before, after = live_nodes(program, {}), live_nodes(program, bypass)
    alive = _calls(after)
    # A cast that does nothing returned the stream itself, which the graph knows by the cast's name
    # from there on, though the code around never asked for the cast.
    casts = {
        n: n.args[0]
        for n in nodes
        if n in after and returns_its_input(n) and not alive.issuperset(stack_entries(n)[-1:])
    }
    through: dict[fx.Node, Any] = {**bypass, **casts}
    after = live_nodes(program, through)
    alive = _calls(after)
    for node in nodes:
        if is_size(node):
            if not after.issuperset(node.all_input_nodes):
                after.discard(node)
        elif not node.users and node.op == "call_function":
            before.add(node)
            if after.issuperset(node.all_input_nodes) and alive.issuperset(stack_entries(node)):
                after.add(node)
    through = {n: source for n, source in through.items() if n in after}
    dead = before - after
    calls = _calls(before) - alive
    modules = _bases(calls) - _bases(alive)
    modules |= _passed_through(program, dead) - _bases(alive)
    fresh = {n for n in through if n not in casts and n.target is not torch.ops.aten.add_.Tensor}
    fresh |= {n for n in through if n not in casts and n.args[0] is not through[n]}
    changed = _changed(nodes, through)
    return Gone(
        frozenset(dead),
        frozenset(calls),
        frozenset(modules),
        frozenset(_tensors(program, dead, after, modules)),
        through,
        frozenset(fresh),
        frozenset(fresh & changed),
    )


def enclosing(name: str) -> list[str]:
    """Names of all modules around a tensor, or around a module.

    Args:
        name: Qualified name of either.
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def rewritten(program: Program, dead: Gone) -> dict[str, str]:
    """Modules whose code calls what is gone, or adds it, with the reason.

    Args:
        program: The captured graph.
        dead: What is gone.
    """
    out: dict[str, str] = {}
    for node in dead.fresh | {n for n in dead.through if written(n)}:
        entries = [e for e in stack_entries(node) if e not in dead.calls]
        out.setdefault(_base(entries[-1]) if entries else "", "one of its branches is dropped")
    holders = {module for name in program.parameters for module in enclosing(name)}
    for node in dead.nodes:
        if node.op != "call_function":
            continue
        entries = stack_entries(node)
        depth = next((i for i, e in enumerate(entries) if e in dead.calls), len(entries))
        if depth < len(entries):
            needed = _base(entries[depth]) in holders
        else:
            names = {program.tensors.get(n) for n in node.all_input_nodes}
            needed = not names.isdisjoint(dead.tensors & program.parameters)
        if needed:
            out.setdefault(_base(entries[depth - 1]) if depth else "", "what it calls is dropped")
    return out


def _calls(nodes: set[fx.Node]) -> set[str]:
    """Module calls in which some of the nodes compute, see `calls_of`."""
    return {entry for n in nodes for entry in calls_of(n)}


def calls_of(node: fx.Node) -> list[str]:
    """Module calls that a node is inside of, as entries of its module stack.

    Empty for an unused node, a size, or a cast that returns its input.
    """
    counts = node.op == "call_function" and node.users
    return (
        stack_entries(node) if counts and not is_size(node) and not returns_its_input(node) else []
    )


def _base(entry: str) -> str:
    return entry.partition("@")[0]


def _bases(calls: set[str]) -> set[str]:
    return set(map(_base, calls))


def _passed_through(program: Program, dead: set[fx.Node]) -> set[str]:
    """Modules that only ever returned something dead (stochastic depth in eval mode, for one)."""
    by_module: dict[str, list[bool]] = {}
    for call in program.calls:
        results = [leaf for leaf in call.out_leaves if isinstance(leaf, fx.Node)]
        by_module.setdefault(call.module, []).append(bool(results) and dead.issuperset(results))
    return {name for name, all_dead in by_module.items() if all(all_dead)}


def _tensors(
    program: Program, dead: set[fx.Node], live: set[fx.Node], modules: set[str]
) -> set[str]:
    """Names of tensors that only dead nodes read, or that a dead module holds."""
    names = {n for p in program.captured for n in p.tensors.values()} - program.anonymous
    alive = {
        alias
        for node, name in program.tensors.items()
        if node in live
        for alias in program.aliases.get(name, (name,))
    }
    unread = {program.tensors[n] for n in dead if n in program.tensors}
    held = {n for n in names if not modules.isdisjoint(enclosing(n))}
    return (unread | held) - alive


# Storage ------------------------------------------------------------------------------------------


def _shared(node: fx.Node) -> fx.Node | None:
    """The argument whose storage a node's result may share."""
    if node.op != "call_function":
        return None
    if is_item(node) or "dropout" in base_name(node):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return next((source for _, source in sources_of_storage(node)), None)


def storages(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node that made the storage which each node's result may share."""
    out: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = _shared(node)
        out[node] = node if source is None else out[source]
    return out


def written_roots(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that made the storages which each node changes."""
    roots = storages(nodes)
    return {node: [roots[w] for w in written(node)] for node in roots}


def _writers(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Nodes that change a storage, by the node that made it."""
    out: dict[fx.Node, list[fx.Node]] = {}
    for node, roots in written_roots(nodes).items():
        for root in roots:
            out.setdefault(root, []).append(node)
    return out


def _changed(nodes: list[fx.Node], through: Bypass) -> set[fx.Node]:
    """Nodes of which the result, or what stands in for it, is changed in place later on."""
    out: set[fx.Node] = set()
    for node in reversed(nodes):
        for user in node.users:
            if user in through:
                changed = through[user] is node and user in out
            else:
                changed = node in written(user) or (_shared(user) is node and user in out)
            if changed:
                out.add(node)
                break
    return out
