"""The captured model as data: graph, tensor names, sizes, module calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import fx

from depcut.capture.batches import Batch
from depcut.capture.calls import Comparison, TorchCall
from depcut.capture.results import Results
from depcut.capture.structure import Structure
from depcut.support.torch_private import pytree

Sizes = tuple[int, ...]
Found = TypeVar("Found")


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module: its arguments and results, graph nodes where they are computed.

    Attributes:
        module: Qualified name of the module called.
        leaves: Flattened (args, kwargs); nodes for what the graph computes, else the value.
        spec: How to unflatten `leaves`.
        out_leaves: Flattened result, alike.
        out_spec: How to unflatten `out_leaves`.
    """

    module: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    out_leaves: tuple[Any, ...]
    out_spec: pytree.TreeSpec


@dataclass(frozen=True, repr=False)
class Program:
    """A model captured by torch.export (training IR), higher-order wrappers inlined.

    Attributes:
        graph: The graph; nodes carry `meta["val"]`, source lines and literal provenance.
        tensors: Qualified parameter, buffer or constant name of each placeholder that is one.
        parameters: Names among these that are parameters.
        anonymous: Names of constants typed into the code, of any graph, which no attribute holds.
        sizes: Sizes (hints for dynamic ones) of every node that is a tensor or a list of tensors.
        marks: Nodes, of any graph, by the numbers that provenance expressions use.
        calls: Every module call, in order of completion.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        batch: Size of the dynamic batch dimension of the example inputs; 1 where there is none.
        dynamic: Whether dimension 0 of the inputs is dynamic.
        aliases: Names that share one tensor, by each of these names.
        in_spec: Structure of (args, kwargs).
        out_spec: Structure of the result.
        constants: Values of the anonymous constants of this graph.
        training: The model as it runs in training, where it has parts that run only then
            (auxiliary heads, mask tokens); for couplings alone.
        others: The model as it runs in the other example calls. Couplings, attributes, dead units
            and verification are of all calls; data, scores, MACs and time of this one.
        unused: Parameters that no graph uses.
        torch_calls: Every call of the torch API, in order.
        comparisons: Those of sizes and attributes in the model's code.
        lines: (file, line) of the model's code that were seen to run.
        states: Random states of Python and numpy that the capture started from, where the model's
            code drew from them: another course of it would be another graph.
        structure: The model's modules and attributes when it was captured.
        around: Tensors of the model that its code reaches by another way than by their attributes.
        batching: How the first dimensions of the inputs were captured.
        results: Which of the outputs count, and how to get them out of what a call returns.
        made: What the example inputs were made of, in words; "" where they were given.
    """

    graph: fx.GraphModule
    tensors: dict[fx.Node, str]
    parameters: frozenset[str]
    anonymous: frozenset[str]
    sizes: dict[fx.Node, Any]
    marks: dict[int, fx.Node]
    calls: tuple[ModuleCall, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    dynamic: bool
    aliases: dict[str, tuple[str, ...]]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    training: Program | None = None
    others: tuple[Program, ...] = ()
    unused: frozenset[str] = field(default_factory=frozenset)
    torch_calls: tuple[TorchCall, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    lines: frozenset[tuple[str, int]] = frozenset()
    states: tuple[Any, ...] | None = None
    around: frozenset[str] = field(default_factory=frozenset)
    structure: Structure = field(default_factory=dict)

    batching: Batch = Batch.FREE
    results: Results = field(default_factory=Results)
    made: str = ""

    def once(self, find: Callable[[Program], Found]) -> Found:
        """What a function finds out about this program, looked up after the first time.

        Args:
            find: The function, of a module.
        """
        known = self._known
        if find not in known:
            known[find] = find(self)
        found: Found = known[find]
        return found

    @cached_property
    def _known(self) -> dict[Callable[[Program], Any], Any]:
        """What `once` has found."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the capture had to assume, in words."""
        batching = () if self.batching is Batch.FREE else (self.batching.value,)
        of_results = (note for each in self.examples for note in each.results.notes)
        return (*filter(None, [self.made]), *batching, *dict.fromkeys(of_results))

    @property
    def examples(self) -> tuple[Program, ...]:
        """Every example call, this one first."""
        return (self, *self.others)

    @property
    def captured(self) -> tuple[Program, ...]:
        """Every graph: those of the example calls, each with that of its training behind it."""
        return tuple(p for e in self.examples for p in (e, e.training) if p is not None)

    def led_by(self, number: int) -> Program:
        """The same example calls with another one first.

        Args:
            number: Which one, from 0.
        """
        if not number:
            return self
        calls = [replace(p, others=()) for p in self.examples]
        return replace(calls.pop(number), others=tuple(calls))

    @cached_property
    def codes(self) -> dict[str, frozenset[CodeType]]:
        """The code of the functions that ran in each module's forward and called torch."""
        found: dict[str, set[CodeType]] = {}
        for call in self.torch_calls:
            found.setdefault(call.module, set()).update(frame.code for frame in call.frames)
        return {name: frozenset(codes) for name, codes in found.items()}

    @cached_property
    def names(self) -> dict[fx.Node, str]:
        """Name of each parameter, buffer or constant, by its placeholders in every graph."""
        return {node: name for p in self.captured for node, name in p.tensors.items()}

    @cached_property
    def read(self) -> frozenset[str]:
        """Parameters, buffers and constants that a node of this graph reads, by all their names."""
        return frozenset(
            alias
            for node, name in self.tensors.items()
            if node.users
            for alias in self.aliases.get(name, (name,))
        )

    @cached_property
    def inputs(self) -> list[fx.Node]:
        """The placeholders that stand for user inputs."""
        nodes = self.graph.graph.nodes
        return [n for n in nodes if n.op == "placeholder" and n not in self.tensors]

    @cached_property
    def holders(self) -> dict[str, tuple[fx.Node, ...]]:
        """The placeholders of each parameter, buffer or constant."""
        out: dict[str, tuple[fx.Node, ...]] = {}
        for node, name in self.tensors.items():
            out[name] = (*out.get(name, ()), node)
        return out

    @cached_property
    def inside(self) -> dict[str, list[fx.Node]]:
        """Nodes in the order of the graph, by each entry of their module stacks."""
        out: dict[str, list[fx.Node]] = {}
        for node in self.graph.graph.nodes:
            for entry in dict.fromkeys(stack_entries(node)):
                out.setdefault(entry, []).append(node)
        return out

    @cached_property
    def calls_of(self) -> dict[str, list[ModuleCall]]:
        """Calls of each module."""
        out: dict[str, list[ModuleCall]] = {}
        for call in self.calls:
            out.setdefault(call.module, []).append(call)
        return out

    @cached_property
    def passing(self) -> dict[fx.Node, list[tuple[ModuleCall, str]]]:
        """Calls that returned what they got, by that node, with the module that made the call.

        In training they may do more (drop path).
        """
        entered = {entry.partition("@")[0] for entry in self.inside}
        out: dict[fx.Node, list[tuple[ModuleCall, str]]] = {}
        for call in self.calls:
            if call.module in entered or len(call.leaves) != 1 or call.leaves != call.out_leaves:
                continue
            caller, leaf = parent_of(call.module), call.leaves[0]
            while caller and caller not in self.calls_of:
                caller = parent_of(caller)
            # Of several readers, it is not known which came after the call.
            if isinstance(leaf, fx.Node) and len(leaf.users) == 1:
                out.setdefault(leaf, []).append((call, caller))
        return out

    @property
    def outputs(self) -> list[Any]:
        """The flattened results."""
        return list(next(n for n in self.graph.graph.nodes if n.op == "output").args[0])

    @property
    def counted(self) -> list[Any]:
        """Those of the flattened results that count, see `Results`."""
        return self.results.of(self.outputs)


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module whose forward created a node."""
    stack = node.meta.get("nn_module_stack") or {}
    for entry in reversed(list(stack.values())):
        name = str(entry[0])
        if not name.startswith("_empty"):
            return name.partition("@")[0].removeprefix("L['self'].")
    return ""


def parent_of(name: str) -> str:
    """The enclosing module's name."""
    return name.rpartition(".")[0]


def layer_of(tensor: str) -> str:
    """The layer that a parameter belongs to; a parametrization counts as its layer's weight."""
    return (
        tensor.partition(".parametrizations.")[0]
        if ".parametrizations." in tensor
        else (tensor.rpartition(".")[0] or tensor)
    )


def stack_entries(node: fx.Node) -> list[str]:
    """Qualified names (with call numbers) of the modules whose forward a node is inside of."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(entry[0]).removeprefix("L['self'].") for entry in stack.values()]
    return [n for n in names if not n.startswith("_empty")]


def where(node: fx.Node | None) -> str:
    """Layer name and the user's source line of a node, for messages."""
    if node is None:
        return "the model"
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [
        (line, code)
        for line, code in zip(lines, [*lines[1:], ""], strict=False)
        if line.startswith("File ")
    ]
    own = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    layer = module_of(node)
    text = f"layer {layer!r}" if layer else "the model's forward"
    if own:
        place, code = own[-1]
        parts = place.split('"')
        line = place.partition("line ")[2].partition(",")[0]
        text += f", {parts[1].rpartition('/')[2] if len(parts) > 1 else place}:{line}: {code}"
    return text + f" (node {node.name})"
