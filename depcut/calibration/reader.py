"""One item of calibration data as a batch: the arguments of the model, and the target."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depcut.capture.capture import is_symbolic
from depcut.capture.inputs import arguments, device_of, with_settings
from depcut.capture.program import Program
from depcut.errors import InputError
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
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    rows: int


class Reader:
    """Turns items into batches of the captured structure."""

    def __init__(self, program: Program, model: nn.Module, pairs: bool) -> None:
        self.program, self.pairs, self.device = program, pairs, device_of(model)
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.expected, self.spec = pytree.tree_flatten((program.args, program.kwargs))
        nodes = program.inputs
        values = [n.meta.get("val") for n in nodes] if len(nodes) == len(self.expected) else []
        rows = [str(v.shape[0]) if v is not None and is_symbolic(v) else "" for v in values]
        self.rows = rows or [""] * len(self.expected)
        # A dimension that varies on its own (positions, say) is no batch.
        self.batch_size = next(filter(None, self.rows), "")

    def batch(self, item: Any, place: str) -> Batch:
        """The item as a batch; `place` says which one it is, for messages."""
        inputs, target = self._split(item)
        given = with_settings(self.model, *arguments(inputs, place))
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
