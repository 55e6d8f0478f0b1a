"""Submodules generated from the captured graph, where a class's code cannot express the sizes.

The generated module takes the place of the original: same parameters, buffers and children, which
it calls as modules; only the original's own lines are replaced by the graph with new literals.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.program import ModuleCall, Program, stack_entries
from depcut.graph.arguments import Path, replaced, schema
from depcut.graph.operators import (
    MODE_FLAGS,
    enters_autocast,
    in_any_layout,
    is_arithmetic,
    is_mutating,
    is_operator,
    is_size,
    leaves_autocast,
)
from depcut.plan.keep import Keep
from depcut.rewrite.dropout import when_training
from depcut.rewrite.generated import GeneratedModule
from depcut.support.torch_private import pytree, size_expression

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


class CannotGenerateError(Exception):
    """The graph of a module call is not closed: the enclosing module must be generated instead."""


class _OpaqueError(Exception):
    """A child cannot be called as a module, since something inside of it is used outside."""

    def __init__(self, child: int) -> None:
        super().__init__()
        self.child = child


def generate(
    slim: nn.Module, keep: Keep, name: str, inlined: Container[str], dropouts: dict[fx.Node, float]
) -> GeneratedModule:
    """The module `name` of the slim model with its own lines generated from the graph.

    Args:
        slim: The narrowed copy, whose module is read but not changed.
        keep: What stays.
        name: Qualified name; "" for the whole model.
        inlined: Modules that must not be called, as their code cannot express the sizes either.
        dropouts: Probability in training of attentions that were captured without dropout.

    Raises:
        CannotGenerateError: It uses values that are not among its arguments.
    """
    call = _call_of(keep.coupling.program, name)
    leaks: set[int] = set()
    while True:
        builder = _Builder(keep, name, call, inlined, leaks, dropouts)
        try:
            graph = builder.build()
        except _OpaqueError as leak:
            leaks.add(leak.child)
            continue
        sizes = _sizes(call, keep)
        return GeneratedModule(slim.get_submodule(name), graph, call, builder.constants, sizes)


def _sizes(call: ModuleCall, keep: Keep) -> dict[int, tuple[int | None, ...]]:
    """New sizes of each tensor among the arguments of a call; None for a multiple of the batch."""
    out = {}
    for i, leaf in enumerate(call.leaves):
        dims = keep.coupling.env.get(leaf) if isinstance(leaf, fx.Node) else None
        if isinstance(leaf, fx.Node) and isinstance(dims, tuple) and leaf not in keep.gone.nodes:
            given = leaf.meta["val"].shape
            counts = zip(given, dims, strict=True)
            out[i] = tuple(keep.count(t) if _is_constant(size) else None for size, t in counts)
    return out


def _is_constant(size: int | torch.SymInt) -> bool:
    """Whether a size is that of the example: a symbol may have been tied to it by the code."""
    return isinstance(size, int) or not size_expression(size).free_symbols


def _call_of(program: Program, name: str) -> ModuleCall:
    if not name:
        if program.results.picked:
            raise CannotGenerateError("it returns more than a graph can carry")
        given = pytree.tree_leaves((program.args, program.kwargs))
        nodes = program.inputs
        leaves: tuple[Any, ...] = tuple(nodes)
        if len(nodes) == len(given):
            leaves = tuple(
                n if isinstance(v, torch.Tensor) else v for n, v in zip(nodes, given, strict=True)
            )
        return ModuleCall("", leaves, program.in_spec, tuple(program.outputs), program.out_spec)
    calls = program.calls_of.get(name, [])
    if len(calls) != 1:
        raise CannotGenerateError(f"{name} is called {len(calls)} times")
    return calls[0]


@dataclass
class _Builder:
    """Builds the graph of one module call."""

    keep: Keep
    name: str
    call: ModuleCall
    inlined: Container[str]
    leaks: set[int]
    dropouts: dict[fx.Node, float]

    def __post_init__(self) -> None:
        self.program = self.keep.coupling.program
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, Any] = {}

    def build(self) -> fx.Graph:
        """The graph, with a placeholder for every leaf of (args, kwargs)."""
        for i, leaf in enumerate(self.call.leaves):
            placeholder = self.graph.placeholder(f"in_{i}")
            if isinstance(leaf, fx.Node):
                self.env.setdefault(leaf, placeholder)
        done: set[int] = set()
        self.children = self._children()
        for node in self._inside():
            if node in self.keep.gone.nodes:
                continue
            child = self.children.get(node)
            if node in self.env:
                pass
            elif child is None:
                self._copy(node)
            elif id(child) not in done:
                done.add(id(child))
                self._call_child(child)
            if node in self.env:
                for call in self._passing(node):
                    self._call_child(call)
        self.graph.output([self._value(leaf) for leaf in self.call.out_leaves])
        self.graph.eliminate_dead_code(_has_effect)
        return self.graph

    def _inside(self) -> list[fx.Node]:
        """Nodes of the module's forward, those of its children included."""
        inside = self.program.inside.get(self.name, ())
        nodes = inside if self.name else self.program.graph.graph.nodes
        return [n for n in nodes if n.op in ("call_function", "get_attr")]

    def _is_inlined(self, call: ModuleCall) -> bool:
        return call.module in self.inlined or id(call) in self.leaks

    def _children(self) -> dict[fx.Node, ModuleCall]:
        """For each node of a child's forward, the outermost child call that can be kept."""
        prefix = f"{self.name}." if self.name else ""
        out: dict[fx.Node, ModuleCall] = {}
        for node in self._inside():
            entries = stack_entries(node)
            at = entries.index(self.name) + 1 if self.name in entries else 0
            for entry in entries[at:]:
                if entry in self.keep.gone.calls:
                    break
                base, _, number = entry.partition("@")
                below = base.startswith(prefix) and base != self.name
                calls = self._calls_of(base) if below else []
                which = int(number) if number else 0
                if which >= len(calls) or self._is_inlined(calls[which]):
                    continue
                if self._is_callable(calls[which]):
                    out[node] = calls[which]
                    break
        return out

    def _passing(self, node: fx.Node) -> Iterator[ModuleCall]:
        """Calls in the module's own lines that return a node they were given, unchanged."""
        if any(node is given for given in self.call.leaves):
            return
        for call, caller in self.program.passing.get(node, ()):
            if caller == self.name or any(map(self._is_inlined, self._calls_of(caller))):
                yield call

    def _calls_of(self, module: str) -> list[ModuleCall]:
        return self.program.calls_of.get(module, [])

    def _is_callable(self, call: ModuleCall) -> bool:
        leaves = (*call.leaves, *call.out_leaves)
        return all(isinstance(leaf, (fx.Node, *_PLAIN)) for leaf in leaves)

    def _call_child(self, call: ModuleCall) -> None:
        try:
            leaves = [self._value(leaf) for leaf in call.leaves]
        except CannotGenerateError:
            raise _OpaqueError(id(call)) from None
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        relative = call.module[len(self.name) + 1 :] if self.name else call.module
        result = self.graph.call_module(relative, args, kwargs)
        paths = pytree.tree_unflatten(list(range(len(call.out_leaves))), call.out_spec)
        for index, value in _paths(paths, result, self.graph):
            leaf = call.out_leaves[index]
            if isinstance(leaf, fx.Node):
                self.env[leaf] = value

    def _value(self, leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        if leaf in self.keep.gone.nodes and not self._is_number(leaf):
            return None
        if leaf not in self.env:
            self._outside(leaf)
        return self.env[leaf]

    def _outside(self, node: fx.Node) -> None:
        """A value from outside of the call: a parameter, a constant, or a size."""
        name = self.program.tensors.get(node)
        if name is not None:
            self.env[node] = self._parameter(name)
        elif node.op == "call_function" and self._is_number(node):
            self.env[node] = self._size(node)
        elif node in self.children:
            raise _OpaqueError(id(self.children[node]))
        else:
            raise CannotGenerateError(f"{self.name} uses {node.name}, which is not an argument")

    def _parameter(self, name: str) -> fx.Node:
        if name in self.program.anonymous:
            key = "_depcut_" + name.replace(".", "_")
            self.constants[key] = self.program.constants[name]
            return self.graph.get_attr(key)
        prefix = f"{self.name}." if self.name else ""
        for alias in self.program.aliases.get(name, (name,)):
            if alias.startswith(prefix):
                return self.graph.get_attr(alias[len(prefix) :])
        raise CannotGenerateError(f"{self.name} uses {name}, which it does not own")

    @staticmethod
    def _is_number(node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.SymInt | int) or is_size(node)

    def _size(self, node: fx.Node) -> fx.Node:
        """A dynamic size, read off a tensor at hand one of whose sizes is a multiple of it."""
        wanted = size_expression(node.meta["val"])
        for source, copy in list(self.env.items()):
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor) or not isinstance(copy, fx.Node):
                continue
            sizes: Any = value.shape
            for dim, size in enumerate(sizes):
                times = size_expression(size) / wanted
                if type(size) is not int and times.is_Integer and self._whole(source, dim):
                    read = self.graph.call_function(torch.ops.aten.sym_size.int, (copy, dim))
                    if times == 1:
                        return read
                    return self.graph.call_function(operator.floordiv, (read, int(times)))
        if is_arithmetic(node):
            target: Any = node.target
            return self.graph.call_function(target, tuple(map(self._value, node.args)))
        raise CannotGenerateError(f"{self.name} uses the size {wanted}, which is not at hand")

    def _whole(self, source: fx.Node, dim: int) -> bool:
        """Whether a dimension is as long as it was in the dense model."""
        dims = self.keep.coupling.env.get(source)
        return isinstance(dims, tuple) and not self.keep.narrows(dims[dim])

    def _copy(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            key = f"_depcut_{str(node.target).replace('.', '_')}"
            self.constants[key] = getattr(self.program.graph, str(node.target))
            self.env[node] = self.graph.get_attr(key)
            return
        if node in self.keep.gone.through:
            self._pass(node)
            return
        new = self.graph.node_copy(node, self._value)
        new.target = in_any_layout(node.target)
        self.env[node] = new
        set_literals(new, node, self.keep, self.graph)
        self._follow_mode(new, node)

    def _pass(self, node: fx.Node) -> None:
        """Put the value that replaces a node in its place, cloned where it is written to."""
        value = self._value(self.keep.gone.through[node])
        if node in self.keep.gone.written:
            value = self.graph.call_function(torch.ops.aten.clone.default, (value,))
        self.env[node] = value

    def _follow_mode(self, new: fx.Node, node: fx.Node) -> None:
        """Let train() and eval() of the owning module decide, not the mode of the capture."""
        if not is_operator(node):
            return
        probability = self.dropouts.get(node)
        if probability is not None:
            with self.graph.inserting_before(new):
                flag = self._training_flag(node)
                active = self.graph.call_function(when_training, (flag, probability))
            keywords = ("attn_mask", "dropout_p")
            given = dict(zip(keywords, new.args[3:5], strict=False))
            new.args = (*new.args[:3],)
            new.kwargs = {**given, **new.kwargs, "dropout_p": active}
        for name in MODE_FLAGS:
            known = schema(node.target).get(name)
            if known is not None and known.position < len(new.args):
                if new.args[known.position] is not False:
                    # True in an eval capture: the code insists (weight standardisation).
                    continue
                with self.graph.inserting_before(new):
                    new.update_arg(known.position, self._training_flag(node))

    def _training_flag(self, node: fx.Node) -> fx.Node:
        """The mode of the module whose code a node comes from."""
        entries = stack_entries(node)
        owner = entries[-1].partition("@")[0] if entries else self.name
        relative = owner[len(self.name) :].lstrip(".") if owner.startswith(self.name) else ""
        return self.graph.get_attr(f"{relative}.training" if relative else "training")


def set_literals(new: fx.Node, node: fx.Node, keep: Keep, graph: fx.Graph) -> None:
    """Write the new size literals and pinned arguments into the copy of a node."""
    for literal, value, dense, count in keep.literals(node):
        if isinstance(value, int):
            if value != literal.sign * count:
                _set(new, literal.path, literal.sign * count)
        elif dense != count:
            current = _get(new, literal.path)
            with graph.inserting_before(new):
                scaled = graph.call_function(operator.mul, (current, count))
                _set(new, literal.path, graph.call_function(operator.floordiv, (scaled, dense)))
    for name, pinned in keep.pins(node).items():
        new.kwargs = {**new.kwargs, name: pinned}


def _get(node: fx.Node, path: Path) -> Any:
    value: Any = node.args[path[0]] if isinstance(path[0], int) else node.kwargs[path[0]]
    for step in path[1:]:
        value = value[step]
    return value


def _set(node: fx.Node, path: Path, value: Any) -> None:
    head = path[0]
    if isinstance(head, int):
        node.update_arg(head, replaced(node.args[head], path[1:], value))
    else:
        node.update_kwarg(head, replaced(node.kwargs[head], path[1:], value))


def _paths(tree: Any, value: Any, graph: fx.Graph) -> Iterator[tuple[int, Any]]:
    """(leaf number, node that reads it) for every leaf of a child's result."""
    if isinstance(tree, int):
        yield tree, value
        return
    items = tree.items() if hasattr(tree, "items") else enumerate(tree)
    for key, item in items:
        yield from _paths(item, graph.call_function(operator.getitem, (value, key)), graph)


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "call_module"):
        return True
    return enters_autocast(node) or leaves_autocast(node) or is_mutating(node)
