"""A user's data read and checked: batches that fit the captured graph."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from depcut.calibration.identity import bound_to, check_same_loss, check_same_model
from depcut.calibration.items import Items
from depcut.calibration.lengths import with_numbers
from depcut.calibration.own_loss import MODEL, OWN_LOSS
from depcut.calibration.reader import PAIRS, Batch, Reader
from depcut.calibration.rows import batched, holds_rows
from depcut.calibration.sharing import (
    ALL_HERE,
    OwnItems,
    Share,
    described,
    most_to_read,
    own_items,
    shared_out,
)
from depcut.calibration.trail import Trail
from depcut.capture.clone import clone
from depcut.capture.eager import refuse_failing_call
from depcut.capture.inputs import Inputs, arguments, device_of
from depcut.capture.part import Part, part_calls, part_of, sizes_of_call, whole_of
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.errors import DepcutError, InputError, listed
from depcut.graph.resized import FlatInputs
from depcut.support.checks import check_integer
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.memory import budget, check_memory
from depcut.support.processes import Processes, processes, together
from depcut.support.torch_private import pytree

Data = Iterable[Any]
Loss = Callable[[Any, Any], torch.Tensor] | Literal["model"]

BATCHES = 32  # read of `data` unless told otherwise


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches bound to a captured model.

    Attributes:
        program: The captured model.
        batches: At least one; of several processes, those of this one.
        loss: A function of (output, target) that returns a scalar, or None.
        device: The model's.
        memory: Bytes that passes over the data may hold between two stretches of them.
        progress: Whether to show a progress bar on standard error.
        unused: Keys of the items that the model does not take.
        share: Which of all batches these are.
        trail: Where passes keep what they have found so far, for a process that goes on.
        made: What the batches were made of, where no data was given, in words.
    """

    program: Program
    batches: tuple[Batch, ...]
    loss: Callable[[Any, Any], torch.Tensor] | None
    device: torch.device
    memory: int
    progress: bool = True
    unused: tuple[str, ...] = ()
    share: Share = ALL_HERE
    trail: Trail | None = None
    made: str = ""

    def __str__(self) -> str:
        """What was read: batches, examples, sizes, and what was left aside."""
        lengths = len({id(b.resized) for b in self.batches})
        lines = [
            f"{self.total} batches of {self.rows} examples in all"
            + (f", of {lengths} sizes" if lengths > 1 else "")
        ]
        if self.everyone.size > 1:
            here = 0 if self.everyone.idle else len(self.batches)
            lines.append(f"  {here} of them in process {self.everyone.rank}")
        padded = sum(int((~b.valid).sum()) for b in self.batches if b.valid is not None)
        if padded:
            lines.append(f"  {padded} padded positions are no data")
        labels = dict.fromkeys(name for b in self.batches for name in b.labels)
        if labels:
            own = self.loss is OWN_LOSS
            what = "the model takes its loss of" if own else "targets, left aside:"
            lines.append(f"  {what} {listed(list(labels))}")
        if self.made:
            lines.append(f"  {self.made}")
        if self.unused:
            lines.append(f"  the model takes no {listed(list(self.unused))}")
        return "\n".join(lines)

    @property
    def rows(self) -> int:
        """Examples in all batches, of all processes."""
        return self.share.rows

    @property
    def total(self) -> int:
        """Batches of all processes."""
        return self.share.total

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the batches here, among those of all processes."""
        return self.share.numbers

    @property
    def everyone(self) -> Processes:
        """The processes that share the batches; they do the same calls in the same order."""
        return self.share.everyone

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of a batch's (args, kwargs) on the model's device."""
        args, kwargs = moved((batch.args, batch.kwargs), self.device)
        return args, kwargs

    def leaves(self, batch: Batch) -> list[Any]:
        """A batch's flat inputs for the captured graph, on the model's device."""
        return FlatInputs(pytree.tree_leaves(self.arguments(batch)), batch.resized)

    def loss_arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model gets where the loss is taken: with the labels if the loss is its own."""
        args, kwargs = self.arguments(batch)
        labels = batch.labels if self.loss is OWN_LOSS else {}
        return args, {**kwargs, **moved(dict(labels), self.device)}


def moved(tree: Any, device: torch.device) -> Any:
    """A copy of all tensors of a tree on a device."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(copy, tree)


def calibrate(
    program: Program,
    model: nn.Module,
    data: Data | Calibration,
    *,
    loss: Loss | None = None,
    batches: int = BATCHES,
    memory: int | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Read and check calibration data; the model is run once on the first batch if there is a loss.

    Several processes of torch.distributed share the batches out.

    Args:
        program: The captured model.
        model: The model itself.
        data: Any iterable of what the model takes (tensor, tuple, dict), or of (input, target)
            pairs; without a loss, targets are left aside. What this returned before for this model,
            or for another instance of its architecture, is taken over.
        loss: A function of (output, target) that returns a scalar. Of an item that is no pair,
            it gets the whole item as target. "model": what the model itself returns as its loss
            where it is given the labels in the data.
        batches: How many items to read at most.
        memory: What later passes may hold of it, in bytes or with a unit ("4GiB"); None: half of
            what is free.
        progress: Whether later passes show a progress bar on standard error.

    Raises:
        InputError: The data is empty, has other shapes or types than the captured inputs, holds
            NaN, or the loss fails or returns no scalar; or what was calibrated is another model, or
            with another loss.
        ProcessError: Another process failed, or they were given unlike models or data.
    """
    with together():
        return _calibrated(program, model, data, loss, batches, memory, progress)


def _calibrated(
    program: Program,
    model: nn.Module,
    data: Data | Calibration,
    loss: Loss | None,
    batches: int,
    memory: int | str | None,
    progress: bool,
) -> Calibration:
    """See `calibrate`."""
    loss, memory = loss_function(loss), check_memory(memory)
    if isinstance(data, Calibration):
        check_same_loss(data.loss, loss)
        held = data.memory if memory is None else memory
        moved_on = replace(data, program=program, device=device_of(model), memory=held)
        if data.program is program:
            return moved_on
        check_same_model(data.program, program)
        reader = Reader(program, model, loss is not None)
        return replace(moved_on, batches=with_numbers(reader, model, data.batches))
    if processes().size > 1:
        given = {"loss": loss is not None, **bound_to(program), **described(model)}
        processes().require_same("models", given)
    reader = Reader(program, model, loss is not None and loss is not OWN_LOSS)
    items = read_items(data, batches)
    if isinstance(model, Part):
        items = _of_part(model, program, items, loss)
    items, share = shared_out(items, batches)
    bound = tuple(
        reader.batch(item, f"data, item {i}") for i, item in zip(share.numbers, items, strict=True)
    )
    bound = with_numbers(reader, model, bound)
    share = share.with_rows(sum(batch.rows for batch in bound))
    progress = progress and share.everyone.rank == 0
    held = budget(memory) // (share.everyone.size if memory is None else 1)
    held = min(share.everyone.exchanged("memory", held))  # cuts are the same in all
    calibration = Calibration(program, bound, loss, device_of(model), held, progress)
    calibration = replace(calibration, unused=tuple(reader.unused), share=share)
    if loss is not None:
        _check_loss(calibration, model)
    return calibration


def loss_function(loss: Loss | None) -> Callable[[Any, Any], torch.Tensor] | None:
    """The function that a loss is, "model" standing for the model's own.

    Args:
        loss: What a user passes as loss=.

    Raises:
        InputError: It is something else.
    """
    if loss is None or callable(loss):
        return loss
    if isinstance(loss, str) and loss == MODEL:
        return OWN_LOSS
    raise InputError(
        f"loss is a {type(loss).__name__}, not a function",
        where="loss=",
        remedy="pass a function of (output, target), e.g. torch.nn.functional.cross_entropy, "
        'or loss="model" for the loss that the model itself takes of the labels in the data',
    )


def _of_part(model: Part, program: Program, items: list[Any], loss: Loss | None) -> list[Any]:
    """What the captured part gets when the whole model runs on items of data."""
    if loss is not None:
        raise InputError(
            f"{part_of(model)!r} alone was captured, and the loss is of the whole model",
            where="loss=",
            remedy="leave loss out, and choose a criterion that needs none",
        )
    whole, captured = whole_of(model), sizes_of_call((program.args, program.kwargs))
    found: list[Any] = type(items)()
    for number, item in enumerate(items):
        call = arguments(inputs_of(item, whole, pairs=False), f"data, item {number}")
        calls = part_calls(whole, part_of(model), moved(call, device_of(whole)))
        found += [given for given in calls if sizes_of_call(arguments(given)) == captured]
    if not found:
        raise InputError(
            f"on no item of the data does {part_of(model)!r} get inputs of the example's sizes",
            where="data=",
            remedy="pass data of the structure and sizes of inputs=",
        )
    return found


def read_items(data: Data, batches: int = BATCHES) -> list[Any]:
    """The first items of an iterable.

    Args:
        data: Any iterable of items.
        batches: How many to read at most.

    Raises:
        InputError: It is no iterable of items, or empty.
    """
    batches = check_integer(batches, "batches", 1)
    own = own_items(data)
    rows = holds_rows(data)
    whole = isinstance(data, torch.Tensor | str | Mapping)
    if whole or not (rows or isinstance(data, Iterable)):
        kind = type(data).__name__
        raise InputError(f"data is a {kind}", where="data=", remedy=f"pass {PAIRS}: [x], not x")
    try:
        most = most_to_read(min(batches, sys.maxsize), own)
        items = batched(data, most) if rows else list(islice(data, most))
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the data cannot be read: {first_line(error)}", where="data=", remedy=f"pass {PAIRS}"
        ) from error
    if not items:
        raise InputError("the data is empty", where="data=", remedy=f"pass {PAIRS}")
    return OwnItems(items) if own else items


def inputs_of(item: Any, model: nn.Module, pairs: bool) -> Inputs:
    """What the model takes of an item of data, before it is captured.

    Args:
        item: A batch: inputs, or (input, target).
        model: The model.
        pairs: Whether there is a loss, which takes the targets; without one, an item of two that
            the model's forward would not take is a pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        if pairs:
            return item[0]  # type: ignore[no-any-return]
        try:
            inspect.signature(model.forward).bind(*item)
        except TypeError:
            return item[0]  # type: ignore[no-any-return]
        return tuple(item)
    return item  # type: ignore[no-any-return]


def read_with_inputs(
    data: Data | None, batches: int, inputs: Inputs, model: Any, pairs: bool
) -> tuple[list[Any] | None, Inputs]:
    """The first items of the data, if any, and example inputs: as given, else the first item's.

    Args:
        data: Any iterable of items, or None.
        batches: How many to read at most.
        inputs: As the caller gave them.
        model: Whose inputs the items hold.
        pairs: Whether there is a loss, which takes the targets.

    Raises:
        InputError: See `read`.
    """
    if data is None:
        return None, inputs
    items = read_items(data, batches)
    if inputs is None and isinstance(model, nn.Module):
        inputs = Items(model, pairs).taken_apart(items[0]).inputs
    return items, inputs


@preserved()
def _check_loss(calibration: Calibration, model: nn.Module) -> None:
    """Call the loss once, on the first batch."""
    batch = calibration.batches[0]
    refuse_failing_call(model, ("data, item 0,", batch.args, batch.kwargs))
    args, kwargs = calibration.loss_arguments(batch)
    with torch.no_grad():
        output = clone(model, buffers=True)(*args, **kwargs)
        checked_loss(calibration, output, batch)


def checked_loss(calibration: Calibration, output: Any, batch: Batch) -> torch.Tensor:
    """The loss of one batch.

    Args:
        calibration: Its loss.
        output: Of the model.
        batch: The batch it is of.

    Raises:
        InputError: The loss fails, is no scalar, or is not finite.
    """
    assert calibration.loss is not None
    name = getattr(calibration.loss, "__name__", type(calibration.loss).__name__)
    place = f"loss={name}"
    try:
        value = calibration.loss(output, moved(batch.target, calibration.device))
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"it failed: {first_line(error)}",
            where=place,
            remedy="it gets (output of the model, target of the item)",
        ) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(
            f"it returned {got}, not a scalar tensor",
            where=place,
            remedy="return one number, e.g. with reduction='mean'",
        )
    if not bool(torch.isfinite(value)):
        raise InputError(
            f"it returned {float(value.detach())}",
            where=place,
            remedy="look for NaN in model and targets",
        )
    return value.reshape(())
