"""Batches of other lengths or image sizes than the captured ones: the graph's numbers for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from depcut.calibration.reader import Batch, Reader
from depcut.capture.capture import captured_again, hint
from depcut.capture.clone import clone
from depcut.capture.eager import refuse_failing_call
from depcut.capture.held import held_tensors
from depcut.capture.inputs import Call
from depcut.capture.process_state import as_captured
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.errors import CallError, CaptureError, InputError
from depcut.graph.between import between, share_of_way
from depcut.graph.interpreter import Interpreter
from depcut.graph.resized import FlatInputs, Resized, resize
from depcut.support.closeness import relative_error
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import pytree

_TOLERANCE = 1e-4  # relative, between model and graph: rounding alone


def with_numbers(reader: Reader, model: nn.Module, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches, each with the numbers of the captured graph for its sizes.

    The model is captured once more at a second size. At a third one, numbers that lie on the line
    through the two are taken where the graph then gives what the model gives; else it is captured
    there, too.

    Args:
        reader: Of the captured model.
        model: The model; it is only read.
        batches: Of its structure.

    Raises:
        InputError: The model does not take a batch, or its code takes another course there.
    """
    known: dict[Any, Resized | None] = {reader.captured_sizes: None}
    captured: dict[Any, Resized] = {}
    out = []
    for number, batch in enumerate(batches):
        sizes = reader.sizes(batch)
        if sizes not in known:
            found = _on_a_line(reader, model, batch, captured)
            if found is None:
                found = captured[sizes] = _numbers(reader, model, batch, number)
            known[sizes] = found
        out.append(replace(batch, resized=known[sizes]))
    return tuple(out)


def _on_a_line(
    reader: Reader, model: nn.Module, batch: Batch, captured: Mapping[Any, Resized]
) -> Resized | None:
    """Numbers on the line to one of the captured sizes, if the graph computes with them."""
    for sizes, resized in captured.items():
        share = share_of_way(reader.captured_sizes, sizes, reader.sizes(batch))
        found = None if share is None else between(reader.program, resized, share)
        if found is not None and _computes(reader, model, batch, found):
            return found
    return None


@preserved()
def _computes(reader: Reader, model: nn.Module, batch: Batch, resized: Resized) -> bool:
    """Whether the graph, run with numbers, gives what the model gives for a batch.

    Outputs are compared by value; what every module gets and returns by its shapes, as what is
    filled up and cut off again leaves no trace in the outputs.
    """

    def given() -> list[Any]:
        return [
            leaf.detach().to(reader.device, copy=True) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in pytree.tree_leaves((batch.args, batch.kwargs))
        ]

    program = reader.program
    args, kwargs = pytree.tree_unflatten(given(), reader.spec)
    seen, run = clone(model, buffers=True), _Dense(program, model)
    calls = _shapes_of_calls(seen)
    try:
        with torch.no_grad(), as_captured():
            wanted = program.results.flat(seen(*args, **kwargs))
            got = run.run(FlatInputs(given(), resized))
    except Exception as error:  # noqa: BLE001  numbers that do not fit raise whatever they do
        reraise_fatal(error)
        return False
    if len(calls) != len(program.calls):
        return False
    for call, shapes in zip(program.calls, calls, strict=True):
        leaves = (*call.leaves, *call.out_leaves)
        if len(leaves) != len(shapes):
            return False
        if any(run.shapes.get(n, s) != s for n, s in zip(leaves, shapes, strict=True)):
            return False
    size, message = relative_error(wanted, got)
    return not message and size <= _TOLERANCE


def _shapes_of_calls(model: nn.Module) -> list[list[Any]]:
    """Shapes of what each module gets and returns, call by call, once the model has run."""
    calls: list[list[Any]] = []

    def after(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        leaves = (*pytree.tree_leaves((args, kwargs)), *pytree.tree_leaves(result))
        calls.append([getattr(leaf, "shape", None) for leaf in leaves])

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(after, with_kwargs=True)
    return calls


class _Dense(Interpreter):
    """The captured graph with the model's own tensors."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        super().__init__(program)
        self.held = held_tensors(model)
        self.shapes: dict[Any, Any] = {}

    def made(self, node: fx.Node) -> None:
        """Note the shape of a value."""
        value = self.values.get(node)
        if isinstance(value, torch.Tensor):
            self.shapes[node] = value.shape

    def tensor(self, node: fx.Node, name: str) -> torch.Tensor:
        """The model's tensor, a copy where the code may write to it."""
        if self.resized is not None and node in self.resized.constants:
            return torch.as_tensor(self.resized.constants[node]).clone()
        tensor = self.held[name].detach()
        return tensor if name in self.program.parameters else tensor.clone()


def _numbers(reader: Reader, model: nn.Module, batch: Batch, number: int) -> Resized:
    call = _call(reader, batch)
    try:
        refuse_failing_call(model, ("", batch.args, batch.kwargs))
        found = resize(reader.program, captured_again(model, call, reader.program))
    except (CallError, CaptureError) as error:
        found = error.what
    if isinstance(found, Resized):
        return found
    raise InputError(
        f"{_difference(reader, batch)}; {found}",
        where=f"data, item {number}",
        remedy="pad or cut all items to one size, and pass inputs= of that size",
    )


def _call(reader: Reader, batch: Batch) -> Call:
    """The arguments of a batch with as many examples as the captured call has."""
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    for i, (leaf, rows) in enumerate(zip(leaves, reader.rows, strict=True)):
        if not isinstance(leaf, torch.Tensor):
            continue
        leaves[i] = leaf.detach().to(reader.device)
        if rows:
            count = hint(reader.program.inputs[i].meta["val"].shape[0])
            leaves[i] = leaves[i][torch.arange(count, device=reader.device) % len(leaf)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _difference(reader: Reader, batch: Batch) -> str:
    """Which input has another shape than the captured one."""
    leaves = pytree.tree_leaves((batch.args, batch.kwargs))
    here, there = reader.sizes(batch), reader.captured_sizes
    i = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return (
        f"{reader.names[i]} has shape {tuple(leaves[i].shape)}, the model was captured with "
        f"{tuple(reader.expected[i].shape)}"
    )
