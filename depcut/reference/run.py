"""Run the captured graph: dense with consumer-side zeros, or sliced.

Where an operator contracts a narrowed axis, the removed slices of one operand (the weight, where
there is one) are zeroed; where an operator's statistics run over a narrowed axis, it is computed on
the kept indices only. Zeroing producers instead would be wrong: a bias of BatchNorm leaks through.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn

from depcut import axes
from depcut.axes.rows import fitted
from depcut.capture.capture import is_symbolic
from depcut.capture.held import held_tensors
from depcut.capture.inputs import Inputs, normalize
from depcut.graph.arguments import replaced
from depcut.graph.interpreter import Interpreter, Pausing, finished
from depcut.graph.operators import in_any_layout, is_aten, is_size
from depcut.graph.resized import Resized, numbers_of_run
from depcut.ops.registry import Output
from depcut.plan.keep import Keep
from depcut.reference.lengths import check_terms, literal_there
from depcut.reference.norms import estimate, estimates
from depcut.reference.slices import index_tensors, take
from depcut.support.torch_private import pytree

Tensors = Mapping[str, torch.Tensor]
Watched = dict[fx.Node, Any]
Spared = Mapping[fx.Node, tuple[fx.Node, int, torch.Tensor]]
Look = Callable[[fx.Node, Any], Any]
Around = Callable[[fx.Node], AbstractContextManager[None]]


def kept_part(tensor: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """The kept part of a dense activation."""
    if not isinstance(output, tuple) or not any(map(keep.narrows, output)):
        return tensor
    return take(tensor, keep.indices_by_dim(output, tuple(tensor.shape)))


def _spread(small: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """A kept part back in the dense shape, zeros elsewhere."""
    if not isinstance(output, tuple) or not any(map(keep.narrows, output)):
        return small
    terms = [axes.resolve(term) for term in output]
    shape = [n * t.size // keep.count(t) for n, t in zip(small.shape, terms, strict=True)]
    dense = small.new_zeros(shape)
    dense[index_tensors(dense, keep.indices_by_dim(output, tuple(shape)))] = small
    return dense


def _zeroed(tensor: torch.Tensor, keep: Keep, output: Output, dim: int) -> torch.Tensor:
    """Zeros at the indices of a dimension that go."""
    assert isinstance(output, tuple)
    dims = fitted(tuple(map(axes.resolve, output)), tuple(tensor.shape))
    stays = torch.from_numpy(keep.stays(dims, dim)).to(tensor.device)
    return tensor.masked_fill(~stays, 0)


def _copy(_node: fx.Node, value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _nowhere(_node: fx.Node) -> AbstractContextManager[None]:
    return nullcontext()


class Reference:
    """Runs the captured graph: dense with consumer-side zeros, or sliced.

    Args:
        keep: What stays.
        model: The dense model, whose tensors are read; or these themselves by name, each of which
            is asked for when a run first reads it.
        sliced: Run with narrowed tensors and new size literals instead of zeros.
        spared: (operand, dimension, flags) by the node that contracts the dimension: removed
            indices that contribute all the same, as constants do that a bias takes over.
    """

    def __init__(
        self,
        keep: Keep,
        model: nn.Module | Tensors,
        sliced: bool = False,
        spared: Spared | None = None,
    ) -> None:
        self.keep, self.sliced, self.spared = keep, sliced, spared or {}
        self.held: Tensors = held_tensors(model) if isinstance(model, nn.Module) else model
        self.program = keep.coupling.program
        self.norms = estimates(self.program)
        self._checked: set[Resized] = set()

    def run(
        self,
        inputs: list[Any],
        dtype: torch.dtype | None = None,
        watch: set[fx.Node] | None = None,
        *,
        tensors: Tensors | None = None,
        look: Look | None = None,
        around: Around | None = None,
    ) -> tuple[list[Any], dict[fx.Node, Any]]:
        """Flat outputs for flat inputs, and the values of the nodes to watch.

        Args:
            inputs: Flat inputs.
            dtype: Compute in this precision instead of the model's.
            watch: Nodes whose values to return.
            tensors: Parameters and buffers to use in place of the model's, by name.
            look: What to return of a value; left out, a copy of it.
            around: The context to execute a node in.
        """
        watched: dict[fx.Node, Any] = {}
        run = ReferenceRun(self, dtype, tensors, watch or (), watched)
        self.check(inputs)
        run.look, run.around = look or _copy, around or _nowhere
        return finished(run.steps(inputs)), watched

    def steps(
        self,
        inputs: list[Any],
        dtype: torch.dtype | None = None,
        *,
        stops: Collection[fx.Node] = (),
        tensors: Tensors | None = None,
        watch: Collection[fx.Node] | None = None,
        watched: dict[fx.Node, Any] | None = None,
    ) -> Pausing:
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
        self.check(inputs)
        return ReferenceRun(self, dtype, tensors, watch or (), watched).steps(inputs, stops)

    def check(self, inputs: list[Any]) -> None:
        """Refuse inputs of a length that narrowed dimensions do not tell, once a length."""
        resized = numbers_of_run(inputs)
        if resized is not None and resized not in self._checked:
            check_terms(self.keep, resized)
            self._checked.add(resized)


class ReferenceRun(Interpreter):
    """One run of a reference.

    Args:
        reference: What stays, and the tensors to read.
        dtype: Precision to compute in; None: the model's.
        tensors: Tensors to use in place of the model's, by name.
        watch: Nodes whose values to copy.
        watched: Where to.
    """

    def __init__(
        self,
        reference: Reference,
        dtype: torch.dtype | None = None,
        tensors: Tensors | None = None,
        watch: Collection[fx.Node] = (),
        watched: Watched | None = None,
    ) -> None:
        super().__init__(reference.program)
        self.keep, self.held, self.norms = reference.keep, reference.held, reference.norms
        self.sliced, self.dtype = reference.sliced, dtype
        self.tensors: Tensors = {} if tensors is None else tensors
        self.spared = reference.spared
        self.watch, self.watched = watch, watched
        self.look: Look = _copy
        self.around: Around = _nowhere
        self.shapes: list[torch.Size | None] = []  # of the inputs

    def steps(self, inputs: Sequence[Any], stops: Collection[fx.Node] = ()) -> Pausing:
        """Run node by node, pausing before some of them."""
        self.shapes = [v.shape if isinstance(v, torch.Tensor) else None for v in inputs]
        return super().steps(inputs, stops)

    def stands_aside(self, node: fx.Node) -> bool:
        """What dropped branches leave without a use, and what stands in for them."""
        gone = self.keep.gone
        if node in gone.nodes:
            if is_size(node):
                self.values[node] = self._size(node)
            return True
        if node in gone.through:
            value = self.values[gone.through[node]]
            self.values[node] = value.clone() if node in gone.fresh else value
            return True
        return False

    def made(self, node: fx.Node) -> None:
        """Copy a value to watch."""
        if self.watched is not None and node in self.watch:
            if node in self.rereadable and node not in self.values:
                self._ask_for(node)
            self.watched[node] = self.look(node, self.values.get(node))

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that a node is called with; of a dense run, before any zeros."""
        args, kwargs = self.values_of(node, self.values)
        if self.sliced and node in self.keep.coupling.effects:
            return self._literals(node, args, kwargs)
        return args, kwargs

    def _size(self, node: fx.Node) -> int:
        """A size that was read off a tensor that is gone, computed from the sizes of the inputs."""
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            return int(value)
        known = {
            symbolic.node.expr: actual
            for placeholder, given in zip(self.program.inputs, self.shapes, strict=True)
            if given is not None
            for symbolic, actual in zip(placeholder.meta["val"].shape, given, strict=True)
            if isinstance(symbolic, torch.SymInt)
        }
        return int(value.node.expr.subs(known))

    def tensor(self, node: fx.Node, name: str) -> torch.Tensor:
        """A tensor that was given, else the model's own or the kept part of it."""
        if name in self.tensors:
            given = self.tensors[name]
            return given if node in self.rereadable else given.clone()
        held = self.program.constants if name in self.program.anonymous else self.held
        there = self.resized.constants.get(node) if self.resized is not None else None
        tensor = (held[name] if there is None else there).detach()
        if self.sliced:
            tensor = kept_part(tensor, self.keep, self.keep.coupling.env[node])
        if name not in self.program.parameters:
            # Buffers may be written to in place.
            tensor = tensor.clone()
        converted: torch.Tensor = cast(tensor, self.dtype)
        return converted

    def call(self, node: fx.Node) -> Any:
        """The value of a node: on slices, on the kept indices, or with zeros."""
        target = in_any_layout(node.target)
        if node in self.norms:
            whole = estimate(node, self.program, lambda name: self.held[name].detach())
            return cast(whole, self.dtype)
        effects = self.keep.coupling.effects.get(node)
        if self.dtype is not None and is_aten(node, "_assert_tensor_metadata"):
            return None  # it expects the captured precision
        if effects is None or self.sliced:
            args, kwargs = self.arguments(node)
            with self.around(node):
                return target(*args, **kwargs)
        if any(self.keep.narrows(t) for t in effects.statistics):
            return self._on_kept(node, effects.out)
        masked: dict[fx.Node, torch.Tensor] = {}
        for place in effects.contracts:
            if not self._narrows(*place):
                continue
            source, dim = place
            spared = self.spared.get(node)
            other = effects.counterparts.get(place)
            if spared is not None and (
                spared[:2] in (place, other) or self._axes(*place) == self._axes(*spared[:2])
            ):
                masked[spared[0]] = self._spared(*spared)
                continue
            if other is not None and self.values[other[0]].numel() < self.values[source].numel():
                source, dim = other
            if self._narrows(source, dim):
                dense, dims = (
                    masked.get(source, self.values[source]),
                    self.keep.coupling.env[source],
                )
                masked[source] = _zeroed(dense, self.keep, dims, dim)
        args, kwargs = self.values_of(node, ChainMap(masked, self.values))
        with self.around(node):
            return target(*args, **kwargs)

    def _spared(self, source: fx.Node, dim: int, flags: torch.Tensor) -> torch.Tensor:
        """An operand with zeros at the indices that go, but for some of them."""
        dense = self.values[source]
        zeroed = _zeroed(dense, self.keep, self.keep.coupling.env[source], dim)
        shape = [-1 if d == dim else 1 for d in range(dense.ndim)]
        return torch.where(flags.to(dense.device).reshape(shape), dense, zeroed)

    def _axes(self, node: fx.Node, dim: int) -> list[axes.Axis]:
        """Of a dimension; both operands that are summed over have the same."""
        dims = self.keep.coupling.env[node]
        assert isinstance(dims, tuple)
        return list(axes.leaves(axes.resolve(dims[dim])))

    def _narrows(self, node: fx.Node, dim: int) -> bool:
        dims = self.keep.coupling.env[node]
        return isinstance(dims, tuple) and self.keep.narrows(dims[dim])

    def _on_kept(self, node: fx.Node, output: Output) -> Any:
        """Statistics over the kept indices only: gather, compute, put back."""
        small = {
            n: kept_part(self.values[n], self.keep, self.keep.coupling.env[n])
            if isinstance(self.values[n], torch.Tensor)
            else self.values[n]
            for n in node.all_input_nodes
        }
        args, kwargs = self._literals(node, *self.values_of(node, small))
        with self.around(node):
            result = in_any_layout(node.target)(*args, **kwargs)
        if isinstance(result, tuple | list):
            assert isinstance(output, list)
            return [_spread(r, self.keep, o) for r, o in zip(result, output, strict=True)]
        return _spread(result, self.keep, output)

    def _literals(
        self, node: fx.Node, given: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with the new size literals in place."""
        args, kwargs = list(given), dict(keywords)
        for literal, value, dense, count in self.keep.literals(node):
            new = literal.sign * count
            if isinstance(value, fx.Node):
                new = self.values[value] * count // dense
            elif self.resized is not None:
                new = literal_there(self.resized, node, literal, (dense, count))
            head, rest = literal.path[0], literal.path[1:]
            if isinstance(head, int):
                args[head] = replaced(args[head], rest, new)
            else:
                kwargs[head] = replaced(kwargs[head], rest, new)
        return tuple(args), {**kwargs, **self.keep.pins(node)}


def example(
    keep: Keep,
    *,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    leaves: Sequence[Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the captured example inputs (args, kwargs).

    Args:
        keep: Whose program's inputs.
        rows: Only the first rows of the batch.
        dtype: Precision of floating-point inputs instead of the captured one.
        leaves: Flat inputs to use in place of the captured ones.
    """
    program = keep.coupling.program
    captured, spec = pytree.tree_flatten((program.args, program.kwargs))
    leaves = captured if leaves is None else leaves
    nodes = program.inputs
    batched = [
        len(nodes) == len(leaves) and is_symbolic(nodes[i].meta.get("val"))
        for i in range(len(leaves))
    ]
    copies = [
        cast(leaf[:rows] if batch and rows else leaf, dtype).clone()
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf, batch in zip(leaves, batched, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(copies, spec)
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
