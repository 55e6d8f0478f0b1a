"""Run the rules over a captured graph: groups of coupled dimensions, frozen ones with reasons."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

import depcut.ops  # noqa: F401  (fills the table of rules)
from depcut import axes
from depcut.axes import Axis, Concat, Dims, Reason
from depcut.capture.program import Program, layer_of, where
from depcut.capture.shape_only import read_for_shape_alone
from depcut.coupling.groups import Coupling, Group, Member
from depcut.coupling.row_axes import OUTPUT, find_row_axes
from depcut.coupling.ties import find, settle_ties
from depcut.graph.ancestry import parameter_dimension
from depcut.graph.operators import is_item, is_operator
from depcut.ops.registry import Effects, Op, Output, rule_for


def infer_coupling(program: Program) -> Coupling:
    """Infer which dimensions are coupled; never raises for an operator it does not know.

    Args:
        program: A captured model.
    """
    dims: dict[str, Dims] = {}
    env: dict[fx.Node, Output] = {}
    effects: dict[fx.Node, Effects] = {}
    unknown: dict[str, list[str]] = {}
    for graph in program.captured:
        more = _run(graph, dims)
        env.update(more[0])
        effects.update(more[1])
        for operator, nodes in more[2].items():
            unknown.setdefault(operator, []).extend(nodes)
    _freeze_unread(program, dims, env)
    classes = settle_ties([tie for e in effects.values() for tie in e.ties])
    resolved = {name: tuple(map(axes.resolve, shape)) for name, shape in dims.items()}
    coupled = _groups(program, resolved, effects, classes)
    rows = find_row_axes({g.axis: g.name for g in coupled}, resolved, env, effects, where)
    groups = tuple(replace(g, row_axis=(o := rows[g.axis]).axis, alone=o.why) for g in coupled)
    return Coupling(program, resolved, env, effects, groups, unknown)


def _run(
    program: Program, dims: dict[str, Dims]
) -> tuple[dict[fx.Node, Output], dict[fx.Node, Effects], dict[str, list[str]]]:
    """Run the rules over one graph; `dims` holds, and receives, the terms of the tensors."""
    env = _initial(program, dims)
    effects: dict[fx.Node, Effects] = {}
    unknown: dict[str, list[str]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            env[node] = _visit(node, env, program, effects, unknown)
        elif node.op == "get_attr":
            sizes = program.sizes[node]
            env[node] = (
                _frozen_dims(sizes, "constant typed into the code", node.name) if sizes else None
            )
        elif node.op == "output":
            for result in [n for n in program.counted if isinstance(n, fx.Node)]:
                for shape in _shapes(env.get(result)):
                    for term in shape or ():
                        axes.freeze(term, Reason(OUTPUT, result.name))
    return env, effects, unknown


def _shapes(output: Output) -> list[Dims | None]:
    if output is None:
        return []
    return [output] if isinstance(output, tuple) else list(output)


def _frozen_dims(sizes: tuple[int, ...], why: str, node: str | None) -> Dims:
    return tuple(axes.axis(n, Reason(why, node)) for n in sizes)


def _initial(program: Program, dims: dict[str, Dims]) -> dict[fx.Node, Output]:
    """Terms of the placeholders: one fresh axis a parameter dimension, frozen ones for inputs."""
    env: dict[fx.Node, Output] = {}
    for node in program.graph.graph.nodes:
        if node.op != "placeholder":
            continue
        sizes = program.sizes[node]
        name = program.tensors.get(node)
        if sizes is None:
            env[node] = None
        elif name is None:
            env[node] = _frozen_dims(sizes, "model input", node.name)
        elif name in dims and name not in program.anonymous:
            env[node] = dims[name]
        elif name in program.anonymous:
            env[node] = dims[name] = _frozen_dims(sizes, "constant typed into the code", node.name)
        else:
            twin = next((a for a in program.aliases.get(name, ()) if a in dims), None)
            unused = name in program.unused
            why = Reason("not used by the captured forward", name) if unused else None
            env[node] = dims[name] = dims[twin] if twin else tuple(axes.axis(n, why) for n in sizes)
    return env


def _visit(
    node: fx.Node,
    env: dict[fx.Node, Output],
    program: Program,
    effects: dict[fx.Node, Effects],
    unknown: dict[str, list[str]],
) -> Output:
    if is_item(node):
        source = env.get(node.args[0])  # type: ignore[arg-type]
        return source[node.args[1]] if isinstance(source, list) else None  # type: ignore
    sizes = program.sizes[node]
    if sizes is None and not any(env.get(n) for n in node.all_input_nodes):
        return None
    if not is_operator(node):
        return None if sizes is None else _give_up(node, env, sizes, unknown, "no rule for {}")
    function = rule_for(node.target)
    if function is None:
        return _give_up(node, env, sizes, unknown, "no rule for {}")
    op = Op(node, env, program.sizes, lambda: read_for_shape_alone(node, program))
    try:
        out = function(op)
    except Exception as error:
        if os.environ.get("DEPCUT_STRICT"):
            raise
        return _give_up(node, env, sizes, unknown, f"the rule for {{}} failed: {error!r:.120}")
    if out is not None and not _fits(out, sizes):
        if os.environ.get("DEPCUT_STRICT"):
            raise AssertionError(f"{node.format_node()}: rule gives {out}, torch {sizes}")
        return _give_up(node, env, sizes, unknown, "the rule for {} does not fit its result")
    op.effects.out = out
    effects[node] = op.effects
    return out


def _fits(out: Output, sizes: Any) -> bool:
    """Whether a rule's result has the sizes that torch computed."""
    expected = [sizes] if isinstance(sizes, tuple) else [s for s in sizes or [] if s is not None]
    shapes = _shapes(out)
    return len(shapes) == len(expected) and all(
        shape is None or tuple(t.size for t in shape) == size
        for shape, size in zip(shapes, expected, strict=True)
    )


def _give_up(
    node: fx.Node,
    env: dict[fx.Node, Output],
    sizes: Any,
    unknown: dict[str, list[str]],
    why: str,
) -> Output:
    """Freeze what an operator touches: its inputs' and its outputs' dimensions, nothing else."""
    unknown.setdefault(str(node.target), []).append(node.name)
    reason = Reason(why.format(node.target), node.name)
    for source in node.all_input_nodes:
        for shape in _shapes(env.get(source)):
            for term in shape or ():
                axes.freeze(term, reason)
    if sizes is None:
        return None
    if isinstance(sizes, tuple):
        return _frozen_dims(sizes, reason.why, node.name)
    return [_frozen_dims(s or (), reason.why, node.name) for s in sizes]


def _freeze_unread(program: Program, dims: dict[str, Dims], env: dict[fx.Node, Output]) -> None:
    """Freeze what the example calls leave of a table whose rows belong to places of the input.

    A longer input reads more of a table of positions. Such rows occur nowhere but beside the frozen
    ones that are read, in the table and in what is computed from it alone.
    """
    tables = {leaf for name in program.parameters for leaf in _left(dims.get(name, ()))}
    if not tables:
        return
    read: set[Axis] = set()
    for graph in program.captured:
        fed: set[fx.Node] = set()
        for node in graph.graph.graph.nodes:
            is_input = node.op == "placeholder" and node not in graph.tensors
            if is_input or any(n in fed for n in node.all_input_nodes):
                fed.add(node)
            for shape in _shapes(env.get(node)):
                every = {leaf for term in shape or () for leaf in axes.leaves(axes.resolve(term))}
                read |= every if node in fed else every - _left(shape or ())
    for leaf in tables - read:
        axes.freeze(leaf, Reason("rows of a table that the example call does not read"))


def _left(shape: Dims) -> set[Axis]:
    """Free axes that stand beside frozen ones in a dimension."""
    resolved = [axes.resolve(term) for term in shape]
    leaves = [set(axes.leaves(term)) for term in resolved if isinstance(term, Concat)]
    return {
        leaf
        for each in leaves
        if any(other.reason for other in each)
        for leaf in each
        if not leaf.reason
    }


def _groups(
    program: Program,
    dims: dict[str, Dims],
    effects: dict[fx.Node, Effects],
    classes: dict[Axis, Axis],
) -> tuple[Group, ...]:
    places = (
        parameter_dimension(node, dim, program)
        for e in effects.values()
        for node, dim in e.contracts
    )
    consumers = {place for place in places if place is not None}
    members: dict[Axis, list[Member]] = {}
    labels: dict[Axis, str] = {}
    owned: set[Axis] = set()
    for name, shape in dims.items():
        for i, term in enumerate(shape):
            free = list(dict.fromkeys(leaf for leaf in axes.leaves(term) if not leaf.reason))
            role = "consumer" if (name, i) in consumers else "producer"
            for k, leaf in enumerate(free):
                members.setdefault(leaf, []).append(Member(name, i, role))
                if name in program.parameters:
                    owned.add(leaf)
                if role == "producer" and leaf not in labels and name in program.parameters:
                    labels[leaf] = layer_of(name) + (f"[{k}]" if len(free) > 1 else "")
    sizes: dict[Axis, int] = {}
    for leaf in owned:
        root = find(classes, leaf)
        sizes[root] = sizes.get(root, 0) + 1
    numbers = {root: i for i, root in enumerate(r for r in sizes if sizes[r] > 1)}
    floors = {
        leaf: count
        for e in effects.values()
        for count, term in e.floors
        for leaf in axes.leaves(axes.resolve(term))
    }
    multiples = _multiples(effects.values(), classes)
    names: dict[str, int] = {}
    out: list[Group] = []
    for leaf, occurrences in members.items():
        if leaf not in owned or leaf.size < 2:
            continue
        label = labels.get(leaf) or f"{layer_of(occurrences[0].tensor)}.in"
        names[label] = names.get(label, 0) + 1
        if names[label] > 1:
            label = f"{label}#{names[label]}"
        ordered = tuple(sorted(occurrences, key=lambda m: m.role == "consumer"))
        tied = numbers.get(find(classes, leaf))
        floor = min(floors.get(leaf, 1), leaf.size)
        multiple = multiples.get(find(classes, leaf), 1)
        group = Group(label, leaf.size, ordered, leaf, tied, len(out), floor, multiple=multiple)
        out.append(group)
    return tuple(out)


def _multiples(effects: Iterable[Effects], classes: dict[Axis, Axis]) -> dict[Axis, int]:
    """What the counts of each class of tied axes must be multiples of, by its root."""
    out: dict[Axis, int] = {}
    for effect in effects:
        for count, term in effect.multiples:
            for leaf in axes.leaves(axes.resolve(term)):
                root = find(classes, leaf)
                out[root] = math.lcm(out.get(root, 1), math.gcd(count, leaf.size))
    return out
