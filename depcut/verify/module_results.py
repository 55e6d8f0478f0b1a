"""Run a smaller model and record what its modules get and return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn

from depcut.axes import Dims
from depcut.capture.clone import clone
from depcut.capture.process_state import as_captured
from depcut.capture.program import ModuleCall, Program, stack_entries
from depcut.capture.random_state import restore_python
from depcut.capture.shape_only import read_for_shape_alone
from depcut.graph.arguments import sources_of_storage
from depcut.graph.operators import is_item
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.support.torch_private import pytree
from depcut.verify.replay import Replay

_SAMPLE = 1 << 13  # elements of a nested module's value that are compared


@dataclass(frozen=True)
class Inner:
    """A value that a module gets or returns.

    Attributes:
        node: The graph node that computes it.
        value: It, or a sample of it, see `sampled`.
        module: The module that returns it, or whose caller passes it.
    """

    node: fx.Node
    value: torch.Tensor
    module: str


@dataclass
class ModuleResults:
    """One run of a smaller model.

    Attributes:
        outputs: Its flat outputs.
        inner: What its modules get and return, in the order of execution.
        shape: The first module result whose shape is not the predicted one, "" if there is none.
    """

    outputs: list[Any]
    inner: list[Inner] = field(default_factory=list)
    shape: str = ""


@dataclass(frozen=True)
class Trial:
    """How to run.

    Attributes:
        rows: Of the batch; None: all.
        dtype: Precision; None: the model's.
        leaves: Flat inputs to use in place of the captured ones.
        deep: Whether the values of nested modules are compared, too.
    """

    rows: int | None = None
    dtype: torch.dtype | None = None
    leaves: tuple[Any, ...] | None = field(default=None, compare=False)
    deep: bool = False

    def inputs(self, keep: Keep) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the inputs (args, kwargs)."""
        return example(keep, rows=self.rows, dtype=self.dtype, leaves=self.leaves)


def sampled(value: torch.Tensor) -> torch.Tensor:
    """Elements of a tensor, evenly spread over all of its dimensions, as a new flat tensor."""
    flat = value.detach().reshape(-1)
    if flat.numel() <= _SAMPLE:
        return flat.clone()
    step = -(-flat.numel() // _SAMPLE)
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step].clone()


def top_level(program: Program) -> set[fx.Node]:
    """Nodes that top-level children return: they are compared as a whole."""
    return {
        leaf
        for call in program.calls
        if "." not in call.module
        for leaf in call.out_leaves
        if isinstance(leaf, fx.Node)
    }


def nested(program: Program) -> set[fx.Node]:
    """Nodes that modules return, or that modules without children get, not for a shape alone."""
    leafs = _without_children(program)
    got = (leaf for c in program.calls if c.module in leafs for leaf in c.leaves)
    nodes = {n for n in got if isinstance(n, fx.Node) and not read_for_shape_alone(n, program)}
    nodes |= {leaf for c in program.calls for leaf in c.out_leaves if isinstance(leaf, fx.Node)}
    return nodes - program.tensors.keys()


def _without_children(program: Program) -> set[str]:
    names = {call.module for call in program.calls}
    return names - {name.rpartition(".")[0] for name in names}


def module_results(
    slim: nn.Module, keep: Keep, trial: Trial, replay: Replay | None = None
) -> ModuleResults:
    """Run a clone of a smaller model on the example inputs, and look at what its modules return.

    Args:
        slim: The smaller model; it is only read.
        keep: What stays of the dense one.
        trial: On which of the example inputs.
        replay: What to draw; it sees what is executed.
    """
    return module_results_of_clone(clone(slim, buffers=True), keep, trial, replay)


def module_results_of_clone(
    slim: nn.Module, keep: Keep, trial: Trial, replay: Replay | None = None
) -> ModuleResults:
    """`module_results` of a clone that the caller has made, possibly with hooks of its own.

    Args:
        slim: A clone of the smaller model, in eval mode; the hooks stay on it.
        keep: What stays of the dense one.
        trial: On which of the example inputs.
        replay: What to draw; it sees what is executed.
    """
    args, kwargs = trial.inputs(keep)
    watcher = _Watcher(keep, trial.deep)
    for name, module in slim.named_modules():
        watcher.watch(name, module)
        if replay is not None:
            follow(replay, name, module)
    watcher.seen.outputs = _run(slim, args, kwargs, keep, replay)
    return watcher.seen


def run_plain(
    model: nn.Module, keep: Keep, trial: Trial, replay: Replay | None = None
) -> list[Any]:
    """Flat outputs of a clone of a model as it is, without hooks.

    Args:
        model: The model; it is only read.
        keep: What stays of the dense one.
        trial: On which of the example inputs.
        replay: What to draw.
    """
    args, kwargs = trial.inputs(keep)
    seen = clone(model, buffers=True)
    return _run(seen, args, kwargs, keep, replay)


def _run(seen: nn.Module, args: Any, kwargs: Any, keep: Keep, replay: Replay | None) -> list[Any]:
    for module in seen.modules():
        if isinstance(module, nn.TransformerEncoder):
            # In nested tensors what is padded is left out, and zero in the end; not in a graph.
            module.use_nested_tensor = False
    if keep.coupling.program.states is not None:
        restore_python(keep.coupling.program.states)
    drawn = replay.mode() if replay is not None else nullcontext()
    with torch.no_grad(), as_captured(), drawn:
        return keep.coupling.program.results.flat(seen(*args, **kwargs))


class Follower(Protocol):
    """What is told whose code is running.

    Attributes:
        running: Names of modules, the innermost last.
    """

    running: list[str]


def follow(follower: Follower, name: str, module: nn.Module) -> None:
    """Tell whose code is running.

    Args:
        follower: It is told.
        name: Of a module.
        module: A module of a clone; the hooks stay on it.
    """

    def enter(*_: Any) -> None:
        follower.running.append(name)

    def leave(*_: Any) -> None:
        if follower.running and follower.running[-1] == name:
            follower.running.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class _Watcher:
    """Records what the modules of a clone get and return.

    Args:
        keep: What stays of the dense model.
        deep: Whether nested modules are recorded, too.
    """

    def __init__(self, keep: Keep, deep: bool) -> None:
        program = keep.coupling.program
        self.keep, self.deep, self.seen = keep, deep, ModuleResults([])
        self.calls: dict[str, list[ModuleCall]] = {}
        for call in program.calls:
            results = [leaf for leaf in call.out_leaves if isinstance(leaf, fx.Node)]
            if results and keep.gone.nodes.issuperset(results):
                continue  # it is not called any more
            self.calls.setdefault(call.module, []).append(call)
        self.top, self.tensors = top_level(program), program.tensors
        self.recorded: set[fx.Node] = set()
        self.leafs = _without_children(program) if deep else set()
        self.writers = _later_writers(program) if deep else {}

    def watch(self, name: str, module: nn.Module) -> None:
        """Watch one module."""
        calls = self.calls.get(name)
        if not calls:
            return
        if name in self.leafs:
            module.register_forward_pre_hook(self._gets(name, calls), with_kwargs=True)
        module.register_forward_hook(self._returns(name, calls))

    def _gets(self, name: str, calls: list[ModuleCall]) -> Callable[..., None]:
        order = iter(calls)

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            call = next(order, None)
            if call is None:
                return
            leaves = pytree.tree_leaves((args, kwargs))
            if len(leaves) != len(call.leaves):
                return
            for node, leaf in zip(call.leaves, leaves, strict=True):
                known = node in self.recorded or self.writers.get(node)
                if isinstance(node, fx.Node) and not known:
                    self._record(node, leaf, name.rpartition(".")[0])

        return hook

    def _returns(self, name: str, calls: list[ModuleCall]) -> Callable[..., None]:
        order = iter(calls)

        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            call = next(order, None)
            if call is None:
                return
            leaves = pytree.tree_leaves(result)
            for node, leaf in zip(call.out_leaves, leaves, strict=False):
                if not isinstance(node, fx.Node) or not _is_dense(leaf):
                    continue
                dims = self.keep.coupling.env.get(node)
                if not isinstance(dims, tuple):
                    continue
                if not self.seen.shape and not _as_predicted(leaf, node, dims, self.keep):
                    predicted = tuple(self.keep.count(t) for t in dims)
                    self.seen.shape = (
                        f"{name!r} returns shape {tuple(leaf.shape)} instead of {predicted}"
                    )
                inside = any(name in stack_entries(w) for w in self.writers.get(node, ()))
                if "." not in name or (self.deep and not inside):
                    self._record(node, leaf, name)

        return hook

    def _record(self, node: fx.Node, leaf: Any, module: str) -> None:
        dims = self.keep.coupling.env.get(node)
        if node in self.tensors:
            return  # it may be rescaled, as the magnitude of a normalised weight is
        if _is_dense(leaf) and isinstance(dims, tuple):
            value = leaf.detach().clone() if node in self.top else sampled(leaf)
            self.seen.inner.append(Inner(node, value, module))
            self.recorded.add(node)


def _is_dense(leaf: Any) -> bool:
    """Whether a value is a tensor with sizes; nested ones, as torch's encoder makes, have none."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_nested


def _as_predicted(leaf: torch.Tensor, node: fx.Node, dims: Dims, keep: Keep) -> bool:
    """Whether every size that does not depend on the batch is the predicted one."""
    dense = node.meta["val"].shape
    return leaf.ndim == len(dims) and all(
        size == keep.count(term)
        for size, term, was in zip(leaf.shape, dims, dense, strict=True)
        if isinstance(was, int)
    )


def _later_writers(program: Program) -> Mapping[fx.Node, list[fx.Node]]:
    """Nodes that write to the storage of a node's value after it was computed, by that node."""
    root: dict[fx.Node, fx.Node] = {}  # a node whose storage it uses; itself where it is new
    writers: dict[fx.Node, list[fx.Node]] = {}
    order: dict[fx.Node, int] = {}
    for number, node in enumerate(program.graph.graph.nodes):
        order[node] = number
        uses = list(_storages(node))
        root[node] = root[uses[0][1]] if uses else node
        for is_written, source in uses:
            if is_written:
                writers.setdefault(root[source], []).append(node)
    return {
        node: [w for w in writers[root[node]] if order[w] > order[node]]
        for node in order
        if root[node] in writers
    }


def _storages(node: fx.Node) -> Iterator[tuple[bool, fx.Node]]:
    if is_item(node):
        yield False, node.all_input_nodes[0]
    else:
        yield from sources_of_storage(node)
