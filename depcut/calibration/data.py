"""A user's data read and checked: batches that fit the captured graph."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from depcut.calibration.identity import check_same_loss, check_same_model
from depcut.capture.capture import is_symbolic
from depcut.capture.clone import clone
from depcut.capture.eager import refuse_failing_call
from depcut.capture.inputs import Inputs, arguments, device_of
from depcut.capture.program import Program
from depcut.capture.random_state import preserved
from depcut.errors import InputError
from depcut.support.checks import check_integer
from depcut.support.failures import first_line, reraise_fatal, shown
from depcut.support.torch_private import pytree

Data = Iterable[Any]
Loss = Callable[[Any, Any], torch.Tensor]

BATCHES = 32  # read of `data` unless told otherwise

_PAIRS = "an iterable of what the model takes, or of (input, target) pairs together with loss="


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of calibration data, where the user's loader left it.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What the loss gets beside the output: the target, or the whole item if it is no
            pair.
        rows: Size of the batch dimension.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rows: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches bound to a captured model.

    Attributes:
        program: The captured model.
        batches: At least one.
        loss: A function of (output, target) that returns a scalar, or None.
        device: The model's.
        low_memory: Whether to trade time for memory.
        progress: Whether to show a progress bar on standard error.
    """

    program: Program
    batches: tuple[Batch, ...]
    loss: Loss | None
    device: torch.device
    low_memory: bool = False
    progress: bool = True

    @cached_property
    def rows(self) -> int:
        """Examples in all batches."""
        return sum(batch.rows for batch in self.batches)

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of a batch's (args, kwargs) on the model's device."""
        args, kwargs = moved((batch.args, batch.kwargs), self.device)
        return args, kwargs

    def leaves(self, batch: Batch) -> list[Any]:
        """A batch's flat inputs for the captured graph, on the model's device."""
        return list(pytree.tree_leaves(self.arguments(batch)))


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
    low_memory: bool = False,
    progress: bool = True,
) -> Calibration:
    """Read and check calibration data; the model is run once on the first batch if there is a loss.

    Args:
        program: The captured model.
        model: The model itself.
        data: Any iterable of what the model takes (tensor, tuple, dict), or of (input, target)
            pairs; without a loss, targets are left aside. What this returned before for this model,
            or for another instance of its architecture, is taken over.
        loss: A function of (output, target) that returns a scalar. Of an item that is no pair,
            it gets the whole item as target.
        batches: How many items to read at most.
        low_memory: Whether later passes should trade time for memory.
        progress: Whether later passes show a progress bar on standard error.

    Raises:
        InputError: The data is empty, has other shapes or types than the captured inputs, holds
            NaN, or the loss fails or returns no scalar; or what was calibrated is another model, or
            with another loss.
    """
    if isinstance(data, Calibration):
        check_same_loss(data.loss, loss)
        if data.program is not program:
            check_same_model(data.program, program)
        return replace(data, program=program, device=device_of(model))
    if loss is not None and not callable(loss):
        raise InputError(
            f"loss is a {type(loss).__name__}, not a function",
            where="loss=",
            remedy="pass a function of (output, target), e.g. torch.nn.functional.cross_entropy",
        )
    reader = _Reader(program, model, loss is not None)
    items = read_items(data, batches)
    bound = tuple(reader.batch(item, f"data, item {i}") for i, item in enumerate(items))
    calibration = Calibration(program, bound, loss, device_of(model), low_memory, progress)
    if loss is not None:
        _check_loss(calibration, model)
    return calibration


def read_items(data: Data, batches: int = BATCHES) -> list[Any]:
    """The first items of an iterable.

    Args:
        data: Any iterable of items.
        batches: How many to read at most.

    Raises:
        InputError: It is no iterable of items, or empty.
    """
    batches = check_integer(batches, "batches", 1)
    if isinstance(data, torch.Tensor | str | Mapping) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise InputError(f"data is a {kind}", where="data=", remedy=f"pass {_PAIRS}: [x], not x")
    try:
        items = list(islice(data, min(batches, sys.maxsize)))
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the data cannot be read: {first_line(error)}", where="data=", remedy=f"pass {_PAIRS}"
        ) from error
    if not items:
        raise InputError("the data is empty", where="data=", remedy=f"pass {_PAIRS}")
    return items


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
        inputs = inputs_of(items[0], model, pairs)
        # Loaders collate to lists; as inputs= a list would be several example calls.
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    return items, inputs


class _Reader:
    """Turns items into batches of the captured structure."""

    def __init__(self, program: Program, model: nn.Module, pairs: bool) -> None:
        self.program, self.pairs, self.device = program, pairs, device_of(model)
        self.signature = inspect.signature(model.forward)
        self.expected, self.spec = pytree.tree_flatten((program.args, program.kwargs))
        nodes = program.inputs
        values = [n.meta.get("val") for n in nodes] if len(nodes) == len(self.expected) else []
        rows = [str(v.shape[0]) if v is not None and is_symbolic(v) else "" for v in values]
        self.rows = rows or [""] * len(self.expected)
        # A dimension that varies on its own (positions, say) is no batch.
        self.batch_size = next(filter(None, self.rows), "")

    def batch(self, item: Any, place: str) -> Batch:
        inputs, target = self._split(item)
        args, kwargs = self._bound(arguments(inputs, place), place)
        args, kwargs = _in_order((args, kwargs), (self.program.args, self.program.kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise InputError(
                f"its structure is {_shape((args, kwargs))}, the model was captured with "
                f"{_shape((self.program.args, self.program.kwargs))}",
                where=place,
                remedy="pass data of the structure of inputs=, or (input, target) pairs with loss=",
            )
        rows = {self._check(i, leaf, place) for i, leaf in enumerate(leaves)} - {0}
        if len(rows) > 1:
            raise InputError(
                f"its tensors have batches of {sorted(rows)}", where=place, remedy="make them equal"
            )
        return Batch(args, kwargs, target, rows.pop() if rows else 1)

    def _split(self, item: Any) -> tuple[Any, Any]:
        """(inputs, target); a pair whose halves the model would take both is a pair with a loss."""
        if isinstance(item, tuple | list) and len(item) == 2:
            if self.pairs or not self._fits(item):
                return item[0], item[1]
        elif self.pairs and isinstance(item, tuple | list):
            return item, item
        return item, item

    def _fits(self, item: Any) -> bool:
        """Whether the whole item could be the captured positional arguments."""
        if self.program.kwargs:
            return False
        spec = pytree.tree_structure((tuple(item), {}))
        return bool(spec == self.spec)

    def _bound(
        self, given: tuple[tuple[Any, ...], dict[str, Any]], place: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments passed as they were at the capture; keywords not used there are dropped."""
        args, kwargs = given
        program = self.program
        if not args and not program.kwargs and len(program.args) == 1:
            only = program.args[0]
            if isinstance(only, dict) and kwargs.keys() == only.keys():
                return (kwargs,), {}  # the forward takes one dict
        if not args and not program.args and program.kwargs.keys() <= kwargs.keys():
            return (), {name: kwargs[name] for name in program.kwargs}
        if not args:
            kwargs = {n: v for n, v in kwargs.items() if n in self.signature.parameters}
        wanted = self.signature.bind(*program.args, **program.kwargs).arguments
        if len(args) == len(program.args) and kwargs.keys() == program.kwargs.keys():
            return args, {name: kwargs[name] for name in program.kwargs}
        try:
            passed = self.signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(
                f"the model does not take it: {error}",
                where=place,
                remedy=f"pass {_PAIRS}",
            ) from None
        missing = [name for name in wanted if name not in passed]
        if missing or len(args) > len(wanted):
            raise InputError(
                f"the model was captured with {', '.join(wanted)}, this has {', '.join(passed)}",
                where=place,
                remedy="pass data of the structure of inputs=, or (input, target) pairs with loss=",
            )
        names = list(self.signature.parameters)
        positional = tuple(passed[n] for n in names[: len(program.args)])
        return positional, {name: passed[name] for name in program.kwargs}

    def _check(self, number: int, leaf: Any, place: str) -> int:
        """Refuse a leaf that the graph does not take; its batch size, 0 for none."""
        expected = self.expected[number]
        if not isinstance(expected, torch.Tensor):
            if leaf is not expected and not _equal(leaf, expected):
                raise InputError(
                    f"an argument is {shown(leaf)}, the model was captured with {shown(expected)}",
                    where=place,
                    remedy="capture with the arguments of the data: pass them as inputs=",
                )
            return 0
        got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        fixed = 1 if self.rows[number] else 0
        want = tuple(expected.shape)
        alike = isinstance(leaf, torch.Tensor) and leaf.ndim == expected.ndim
        if not alike or leaf.shape[fixed:] != expected.shape[fixed:] or 0 in leaf.shape:
            raise InputError(
                f"it has shape {got}, the model was captured with {want}",
                where=place,
                remedy="pass data of the shape of inputs="
                + (" (any batch size)" if fixed else "; this model takes no other batch size"),
            )
        if leaf.dtype != expected.dtype:
            raise InputError(
                f"it is {_dtype(leaf)}, the model was captured with {_dtype(expected)}",
                where=place,
                remedy=f"convert it: .to({expected.dtype})",
            )
        if leaf.layout != torch.strided or (leaf.is_meta and self.device.type != "meta"):
            raise InputError(
                "it is sparse" if leaf.layout != torch.strided else "it is on the meta device",
                where=place,
                remedy="pass dense tensors with values",
            )
        if leaf.is_floating_point() and not leaf.is_meta and not bool(torch.isfinite(leaf).all()):
            raise InputError(
                f"{int((~torch.isfinite(leaf)).sum())} of its {leaf.numel()} values are NaN or "
                "infinite",
                where=place,
                remedy="clean the data; statistics of it would mean nothing",
            )
        return int(leaf.shape[0]) if fixed and self.rows[number] == self.batch_size else 0


def _in_order(tree: Any, like: Any) -> Any:
    """Nested arguments with the keys of each dict in the order of another tree of the same keys."""
    if type(tree) is type(like) is dict and tree.keys() == like.keys():
        return {key: _in_order(tree[key], like[key]) for key in like}
    if type(tree) in (tuple, list) and type(like) is type(tree) and len(tree) == len(like):
        return type(tree)(map(_in_order, tree, like))
    return tree


def _equal(leaf: Any, expected: Any) -> bool:
    """Whether two arguments that are no tensors are the same, as far as their classes tell."""
    try:
        return bool(leaf == expected)
    except Exception as error:  # noqa: BLE001  (of a class that is not ours)
        reraise_fatal(error)
        return False


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tree: Any) -> str:
    """A tree with shapes in place of tensors, as (args, kwargs) without what is empty."""
    args, kwargs = pytree.tree_map(
        lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v, tree
    )
    return f"{args or ''}{kwargs or ''}" or "nothing"


@preserved()
def _check_loss(calibration: Calibration, model: nn.Module) -> None:
    """Call the loss once, on the first batch."""
    batch = calibration.batches[0]
    refuse_failing_call(model, ("data, item 0,", batch.args, batch.kwargs))
    args, kwargs = calibration.arguments(batch)
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
            f"it returned {float(value)}", where=place, remedy="look for NaN in model and targets"
        )
    return value.reshape(())
