"""What a graph still computes once some of its nodes stand aside: live nodes, and what is gone.

A node that stands aside is replaced by one of its arguments (an addition by the stream that it adds
to); whatever only it read is dead, and so are the modules and tensors that only dead nodes use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from depcut.capture.program import Program, stack_entries
from depcut.graph.arguments import sources_of_storage, written
from depcut.graph.operators import base_name, is_item, is_size, returns_its_input

__all__ = ["Bypass", "Gone", "gone", "is_size", "live_nodes", "returns_its_input"]
__all__ += ["rewritten", "written"]

Bypass = Mapping[fx.Node, fx.Node]


@dataclass(frozen=True, eq=False)
class Gone:
    """What is no longer computed.

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
    nodes = list(program.graph.graph.nodes)
    roots: set[fx.Node] = {n for n in nodes if n.op == "output"}
    while True:
        live = set(roots)
        for node in reversed(nodes):
            if node in live:
                live.update(_sources(node, bypass))
        hidden = {
            n for n in nodes if n not in live and any(_storage(w) in live for w in written(n))
        }
        if not hidden:
            return live
        roots |= hidden


def _sources(node: fx.Node, bypass: Bypass) -> list[fx.Node]:
    if node in bypass:
        return [bypass[node]]
    return [n for n in node.all_input_nodes if not is_size(node) or is_size(n)]


def gone(program: Program, bypass: Bypass) -> Gone:
    """What nothing needs any more.

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
    return Gone(
        frozenset(dead),
        frozenset(calls),
        frozenset(modules),
        frozenset(_tensors(program, dead, after, modules)),
        through,
        frozenset(fresh),
        frozenset(n for n in fresh if _is_written(n, through)),
    )


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
    for node in dead.nodes:
        if node.op != "call_function":
            continue
        entries = stack_entries(node)
        depth = next((i for i, e in enumerate(entries) if e in dead.calls), len(entries))
        if depth < len(entries):
            prefix = _base(entries[depth]) + "."
            needed = any(name.startswith(prefix) for name in program.parameters)
        else:
            names = {program.tensors.get(n) for n in node.all_input_nodes}
            needed = not names.isdisjoint(dead.tensors & program.parameters)
        if needed:
            out.setdefault(_base(entries[depth - 1]) if depth else "", "what it calls is dropped")
    return out


def _calls(nodes: set[fx.Node]) -> set[str]:
    """Module calls in which some of the nodes do something that counts."""
    return {
        entry
        for n in nodes
        if n.op == "call_function" and n.users and not is_size(n) and not returns_its_input(n)
        for entry in stack_entries(n)
    }


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
    training = program.training.tensors if program.training is not None else {}
    names = {*program.tensors.values(), *training.values()} - program.anonymous
    alive = {
        alias
        for node, name in program.tensors.items()
        if node in live
        for alias in program.aliases.get(name, (name,))
    }
    unread = {program.tensors[n] for n in dead if n in program.tensors}
    held = {n for n in names if any(n.startswith(f"{m}.") for m in modules)}
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


def _storage(node: fx.Node) -> fx.Node:
    """The node that made the storage which a node's result may share."""
    while (source := _shared(node)) is not None:
        node = source
    return node


def _is_written(node: fx.Node, through: Bypass) -> bool:
    """Whether what stands in for a node is changed in place later on."""
    open_nodes, seen = [node], {node}
    while open_nodes:
        current = open_nodes.pop()
        for user in current.users:
            if user in through:
                follows = through[user] is current
            elif current in written(user):
                return True
            else:
                follows = _shared(user) is current
            if follows and user not in seen:
                seen.add(user)
                open_nodes.append(user)
    return False
