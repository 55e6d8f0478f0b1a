"""Run the captured graph: dense with consumer-side zeros, or sliced.

Where an operator contracts a narrowed axis, the removed slices of one operand (the weight, where
there is one) are zeroed; where an operator's statistics run over a narrowed axis, it is computed on
the kept indices only. Zeroing producers instead would be wrong: a bias of BatchNorm leaks through.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut import axes
from depcut.axes.rows import fitted
from depcut.capture.capture import held_tensors, is_symbolic
from depcut.capture.inputs import Inputs, normalize
from depcut.capture.program import Program
from depcut.graph.liveness import is_size
from depcut.ops.registry import Output
from depcut.plan.keep import Keep
from depcut.reference.slices import open_mesh, take
from depcut.support.torch_private import enter_autocast, exit_autocast, pytree

Watched = dict[fx.Node, Any]


def kept_part(tensor: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """The kept part of a dense activation."""
    if not isinstance(output, tuple) or not any(map(keep.narrows, output)):
        return tensor
    return take(tensor, keep.mesh(output, tuple(tensor.shape)))


def _spread(small: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """A kept part back in the dense shape, zeros elsewhere."""
    if not isinstance(output, tuple) or not any(map(keep.narrows, output)):
        return small
    terms = [axes.resolve(term) for term in output]
    shape = [n * t.size // keep.count(t) for n, t in zip(small.shape, terms, strict=True)]
    dense = small.new_zeros(shape)
    dense[open_mesh(dense, keep.mesh(output, tuple(shape)))] = small
    return dense


def _zeroed(tensor: torch.Tensor, keep: Keep, output: Output, dim: int) -> torch.Tensor:
    """Zeros at the indices of a dimension that go."""
    assert isinstance(output, tuple)
    dims = fitted(tuple(map(axes.resolve, output)), tuple(tensor.shape))
    stays = torch.from_numpy(keep.stays(dims, dim)).to(tensor.device)
    return tensor.masked_fill(~stays, 0)


@dataclass(frozen=True)
class Step:
    """A node about to run, with the values of its arguments and of all that is still needed."""

    node: fx.Node
    args: list[Any]
    kwargs: dict[str, Any]
    values: MutableMapping[fx.Node, Any]


def finished(steps: Generator[Step, None, list[Any]]) -> list[Any]:
    """Run to the end what may have paused; the flat outputs."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return list(end.value)


class _Autocast:
    """The autocast regions that a run is in: a state of the thread, not to be left to others."""

    def __init__(self) -> None:
        self.regions: list[torch.autocast] = []

    def follow(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Note that a node has entered or left one."""
        if node.target is enter_autocast:
            self.regions.append(env[node])
        elif node.target is exit_autocast:
            self.regions.remove(env[node.all_input_nodes[0]])

    @contextmanager
    def left(self) -> Iterator[None]:
        """Outside of all of them for the time of the context; for good if the run is given up."""
        for region in reversed(self.regions):
            region.__exit__(None, None, None)
        yield
        for region in self.regions:
            region.__enter__()


def last_uses(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose value nobody needs after a node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        out.setdefault(node, []).append(source)
    return out


class Reference:
    """Runs the captured graph: dense with consumer-side zeros, or sliced.

    Args:
        keep: What stays.
        model: The dense model, whose tensors are read.
        sliced: Run with narrowed tensors and new size literals instead of zeros.
    """

    def __init__(self, keep: Keep, model: nn.Module, sliced: bool = False) -> None:
        self.keep, self.sliced = keep, sliced
        self.held = held_tensors(model)
        self.program = keep.coupling.program

    def run(
        self, inputs: list[Any], dtype: torch.dtype | None = None, watch: set[fx.Node] | None = None
    ) -> tuple[list[Any], dict[fx.Node, Any]]:
        """Flat outputs for flat inputs, and the values of the nodes to watch."""
        watched: dict[fx.Node, Any] = {}
        steps = self.steps(inputs, dtype, watch=watch, watched=watched)
        return finished(steps), watched

    def steps(
        self,
        inputs: list[Any],
        dtype: torch.dtype | None = None,
        *,
        stops: Collection[fx.Node] = (),
        tensors: Mapping[str, torch.Tensor] | None = None,
        watch: Collection[fx.Node] | None = None,
        watched: dict[fx.Node, Any] | None = None,
    ) -> Generator[Step, None, list[Any]]:
        """Run node by node, pausing before some of them.

        Args:
            inputs: Flat inputs.
            dtype: Compute in this precision instead of the model's.
            stops: Nodes to pause before; what their arguments are views of may be changed then.
            tensors: Parameters and buffers to use in place of the model's, by name.
            watch: Nodes whose values to copy.
            watched: Where to.

        Returns:
            The flat outputs.
        """
        env: dict[fx.Node, Any] = {}
        last = last_uses(self.program)
        given = iter(inputs)
        outputs: list[Any] = []
        gone, autocast = self.keep.gone, _Autocast()
        for node in self.program.graph.graph.nodes:
            if node.op == "placeholder":
                name = self.program.tensors.get(node)
                replaced = (tensors or {}).get(name or "")
                own = self._tensor(node, dtype) if name and replaced is None else replaced
                env[node] = next(given) if name is None else own
            elif node in gone.nodes:
                if is_size(node):
                    env[node] = self._size(node, inputs)
            elif node in gone.through:
                value = env[gone.through[node]]
                env[node] = value.clone() if node in gone.fresh else value
            elif node.op == "get_attr":
                env[node] = getattr(self.program.graph, str(node.target))
            elif node.op == "call_function":
                if node in stops:
                    with autocast.left():
                        yield Step(node, *self._arguments(node, env), env)
                env[node] = self._call(node, env)
                autocast.follow(node, env)
            else:
                outputs = [env[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
            if watch and watched is not None and node in watch:
                value = env.get(node)
                watched[node] = value.clone() if isinstance(value, torch.Tensor) else value
            for done in last.get(node, ()):
                env.pop(done, None)
        return outputs

    def _arguments(
        self, node: fx.Node, env: dict[fx.Node, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments that a node is called with; of a dense run, before any zeros."""
        args, kwargs = _arguments(node, env)
        if self.sliced and node in self.keep.coupling.effects:
            return self._literals(node, args, kwargs, env)
        return args, kwargs

    def _size(self, node: fx.Node, inputs: list[Any]) -> int:
        """A size that was read off a tensor that is gone, computed from the sizes of the inputs."""
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            return int(value)
        known = {
            symbolic.node.expr: actual
            for placeholder, given in zip(self.program.inputs, inputs, strict=True)
            if isinstance(given, torch.Tensor)
            for symbolic, actual in zip(placeholder.meta["val"].shape, given.shape, strict=True)
            if isinstance(symbolic, torch.SymInt)
        }
        return int(value.node.expr.subs(known))

    def _tensor(self, node: fx.Node, dtype: torch.dtype | None) -> torch.Tensor:
        name = self.program.tensors[node]
        held = self.program.constants if name in self.program.anonymous else self.held
        tensor = held[name].detach()
        if self.sliced:
            tensor = kept_part(tensor, self.keep, self.keep.coupling.env[node])
        if name not in self.program.parameters:
            # Buffers may be written to in place.
            tensor = tensor.clone()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        effects = self.keep.coupling.effects.get(node)
        args, kwargs = _arguments(node, env)
        if effects is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if self.sliced:
            args, kwargs = self._literals(node, args, kwargs, env)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if any(self.keep.narrows(t) for t in effects.statistics):
            return self._on_kept(node, env, effects.out)
        masked: dict[fx.Node, torch.Tensor] = {}
        for place in effects.contracts:
            if not self._narrows(*place):
                continue
            source, dim = place
            other = effects.counterparts.get(place)
            if other is not None and env[other[0]].numel() < env[source].numel():
                source, dim = other
            if self._narrows(source, dim):
                dense, dims = masked.get(source, env[source]), self.keep.coupling.env[source]
                masked[source] = _zeroed(dense, self.keep, dims, dim)
        if masked:
            args, kwargs = _arguments(node, {**env, **masked})
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _narrows(self, node: fx.Node, dim: int) -> bool:
        dims = self.keep.coupling.env[node]
        return isinstance(dims, tuple) and self.keep.narrows(dims[dim])

    def _on_kept(self, node: fx.Node, env: dict[fx.Node, Any], output: Output) -> Any:
        """Statistics over the kept indices only: gather, compute, put back."""
        small = {
            n: kept_part(env[n], self.keep, self.keep.coupling.env[n])
            if isinstance(env[n], torch.Tensor)
            else env[n]
            for n in node.all_input_nodes
        }
        args, kwargs = self._literals(node, *_arguments(node, small), env)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, tuple | list):
            assert isinstance(output, list)
            return [_spread(r, self.keep, o) for r, o in zip(result, output, strict=True)]
        return _spread(result, self.keep, output)

    def _literals(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], env: dict[fx.Node, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        for literal, value, dense, count in self.keep.literals(node):
            new = literal.sign * count
            if isinstance(value, fx.Node):
                new = env[value] * count // dense
            head, rest = literal.path[0], literal.path[1:]
            if isinstance(head, int):
                args[head] = _with(args[head], rest, new)
            else:
                kwargs[head] = _with(kwargs[head], rest, new)
        return args, {**kwargs, **self.keep.pins(node)}


def _arguments(node: fx.Node, env: dict[fx.Node, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The values of a node's arguments."""
    args: Any = fx.map_arg(node.args, lambda n: env[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n])
    return list(args), dict(kwargs)


def _with(container: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    items = list(container)
    items[path[0]] = _with(items[path[0]], path[1:], value)
    return items


def example(
    keep: Keep, *, rows: int | None = None, dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the captured example inputs (args, kwargs).

    Args:
        keep: Whose program's inputs.
        rows: Only the first rows of the batch.
        dtype: Precision of floating-point inputs instead of the captured one.
    """
    program = keep.coupling.program
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    nodes = program.inputs
    batched = [
        len(nodes) == len(leaves) and is_symbolic(nodes[i].meta.get("val"))
        for i in range(len(leaves))
    ]
    made = [
        cast(leaf[:rows] if batch and rows else leaf, dtype).clone()
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf, batch in zip(leaves, batched, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(made, spec)
    return tuple(args), dict(kwargs)


def cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    """A floating-point tensor in another precision; anything else as it is."""
    if dtype is not None and isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf.to(dtype)
    return leaf


def masked_outputs(
    keep: Keep, model: nn.Module, inputs: Inputs = None, *, dtype: torch.dtype | None = None
) -> list[Any]:
    """Flat outputs of the dense model with the consumer-side slices zeroed.

    Args:
        keep: What stays.
        model: The dense model.
        inputs: Of the structure it was captured with; left out, the captured ones.
        dtype: Compute in this precision instead of the model's.
    """
    given = example(keep) if inputs is None else normalize(model, inputs)
    leaves = [cast(leaf, dtype) for leaf in pytree.tree_leaves(given)]
    with torch.no_grad():
        return Reference(keep, model).run(leaves, dtype)[0]
