"""One item of calibration data as a batch: the arguments of the model, and the target."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from depcut.calibration.items import Item, Items, holds_tensor
from depcut.calibration.padding import valid_positions
from depcut.capture.capture import is_symbolic
from depcut.capture.inputs import arguments, device_of, with_settings
from depcut.capture.program import Program
from depcut.errors import InputError
from depcut.graph.resized import Resized
from depcut.support.failures import reraise_fatal, shown
from depcut.support.torch_private import pytree

PAIRS = "an iterable of what the model takes, or of (input, target) pairs together with loss="


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of calibration data, where the user's loader left it.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What the loss gets beside the output: the target, or the whole item if it is no
            pair.
        rows: Size of the batch dimension.
        labels: Keyword arguments of the model that are targets, of which it takes its own loss.
        resized: The numbers of the captured graph for the batch's sizes; None where these are the
            captured ones, but for the batch dimension.
        valid: Flags (examples, length) of the positions that are no padding; None: all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rows: int
    labels: Mapping[str, Any] = field(default_factory=dict)
    resized: Resized | None = None
    valid: torch.Tensor | None = None


class Reader:
    """Turns items into batches of the captured structure."""

    def __init__(self, program: Program, model: nn.Module, pairs: bool) -> None:
        self.program, self.model, self.device = program, model, device_of(model)
        self.items = Items(model, pairs)
        self.signature = inspect.signature(model.forward)
        self.expected, self.spec = pytree.tree_flatten((program.args, program.kwargs))
        # What the capture added or was given beside tensors (use_cache=False) need not be in data.
        self.constants = {n: v for n, v in program.kwargs.items() if not holds_tensor(v)}
        self.names = names_of_inputs(program, self.signature)
        nodes = program.inputs
        values = [n.meta.get("val") for n in nodes] if len(nodes) == len(self.expected) else []
        rows = [str(v.shape[0]) if v is not None and is_symbolic(v) else "" for v in values]
        self.rows = rows or [""] * len(self.expected)
        # A dimension that varies on its own (positions, say) is no batch.
        self.batch_size = next(filter(None, self.rows), "")
        self.unused: dict[str, None] = {}  # keys of the items that the forward does not take

    def batch(self, item: Any, place: str) -> Batch:
        """The item as a batch; `place` says which one it is, for messages."""
        taken = self._taken(item, place)
        given = with_settings(self.model, *arguments(taken.inputs, place))
        args, kwargs = self._bound(given, place)
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
        self.unused.update(dict.fromkeys(taken.unused))
        valid = valid_positions(self.names, leaves)
        count = rows.pop() if rows else 1
        return Batch(args, kwargs, taken.target, count, taken.labels, valid=valid)

    def sizes(self, batch: Batch) -> tuple[Any, ...]:
        """What of the shapes of a batch is captured: all sizes but those of free first ones."""
        leaves = pytree.tree_leaves((batch.args, batch.kwargs))
        return self._captured_sizes(leaves)

    @cached_property
    def captured_sizes(self) -> tuple[Any, ...]:
        """The sizes of the captured inputs, alike."""
        return self._captured_sizes(self.expected)

    def _captured_sizes(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            tuple(leaf.shape)[1 if rows else 0 :] if isinstance(leaf, torch.Tensor) else None
            for leaf, rows in zip(leaves, self.rows, strict=True)
        )

    def _taken(self, item: Any, place: str) -> Item:
        """The item taken apart; what the model was captured with is no target."""
        program = self.program
        if isinstance(item, tuple | list):
            pair = self.items.pairs and len(item) == 2
            return (
                Item(tuple(item), item, {})
                if not pair and self._fits(item)
                else self.items.taken_apart(item)
            )
        taken = self.items.taken_apart(item)
        if not isinstance(item, Mapping):
            return taken
        tensors = program.kwargs.keys() - self.constants.keys()
        only = program.args[0] if len(program.args) == 1 and not tensors else None
        if isinstance(only, dict) and only.keys() <= item.keys():
            return replace(taken, inputs=({name: item[name] for name in only},))
        captured = self.signature.bind(*program.args, **program.kwargs).arguments
        if isinstance(taken.inputs, Mapping):
            self._refuse_left_out(taken.inputs, {*captured, *program.kwargs}, place)
        if not program.args and tensors <= item.keys():
            return replace(taken, inputs={n: item[n] for n in program.kwargs if n in item})
        return taken

    def _refuse_left_out(
        self, given: Mapping[str, Any], captured: Collection[str], place: str
    ) -> None:
        """Refuse tensors that the forward takes, and that the model was captured without."""
        for name, value in given.items():
            if name in captured or not isinstance(value, torch.Tensor):
                continue
            if value.numel() and bool((value != value.flatten()[0]).any()):
                raise InputError(
                    f"it has {name}, which the model takes, and was captured without",
                    where=place,
                    remedy=f"pass {name} in inputs= as well, as a dict, or leave inputs= out; or "
                    "take it out of the data",
                )
            self.unused[name] = None

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
        args, program = given[0], self.program
        taken = list(self.signature.parameters)[: len(args)]
        kwargs = {n: v for n, v in self.constants.items() if n not in taken} | given[1]
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
                remedy=f"pass {PAIRS}",
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
        want, name = tuple(expected.shape), self.names[number]
        if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) == want[1:]:
            raise InputError(
                f"{name} has shape {got}, that of one example: the model was captured with {want}",
                where=place,
                remedy="pass batches: torch.utils.data.DataLoader(data, batch_size=8)",
            )
        if not isinstance(leaf, torch.Tensor) or leaf.ndim != expected.ndim or 0 in leaf.shape:
            raise InputError(
                f"{name} has shape {got}, the model was captured with {want}",
                where=place,
                remedy="pass data of the shape of inputs=",
            )
        if leaf.dtype != expected.dtype:
            raise InputError(
                f"{name} is {_dtype(leaf)}, the model was captured with {_dtype(expected)}",
                where=place,
                remedy=f"convert it: .to({expected.dtype})",
            )
        if leaf.layout != torch.strided or (leaf.is_meta and self.device.type != "meta"):
            raise InputError(
                f"{name} is sparse"
                if leaf.layout != torch.strided
                else f"{name} is on the meta device",
                where=place,
                remedy="pass dense tensors with values",
            )
        if leaf.is_floating_point() and not leaf.is_meta and not bool(torch.isfinite(leaf).all()):
            raise InputError(
                f"{int((~torch.isfinite(leaf)).sum())} of the {leaf.numel()} values of {name} are "
                "NaN or infinite",
                where=place,
                remedy="clean the data; statistics of it would mean nothing",
            )
        varies = self.rows[number] and self.rows[number] == self.batch_size
        return int(leaf.shape[0]) if varies else 0


def names_of_inputs(program: Program, signature: inspect.Signature) -> list[str]:
    """What each flat input is called: the forward's parameter, and the place in it.

    Args:
        program: The captured model.
        signature: Of its forward.
    """
    parameters = list(signature.parameters)
    names = []
    for path, _ in pytree.tree_flatten_with_path((program.args, program.kwargs))[0]:
        top = path[1]
        if isinstance(top, pytree.SequenceKey):
            known = top.idx < len(parameters)
            name = parameters[top.idx] if known else f"argument {top.idx}"
        else:
            name = top.key if isinstance(top, pytree.MappingKey) else str(top)
        names.append(f"{name}{pytree.keystr(path[2:])}")
    return names


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
