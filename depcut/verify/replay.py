"""What the dense model draws and which numbers it computes with, and the same in the smaller one.

Both run under a mode that sees every operator that is executed. Where the smaller model draws
random numbers, it gets the kept part of what the dense one drew at that place, so that the two can
be compared by value. A number that the smaller model's Python computes (a scale, a divisor) must be
the dense one's, even where its effect on these inputs is lost in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx

from depcut import axes
from depcut.axes import Indices, Term
from depcut.capture.program import Program, module_of
from depcut.graph.arguments import schema
from depcut.graph.operators import base_of, draws, is_pointwise, is_random
from depcut.plan.keep import Keep
from depcut.reference.run import kept_part
from depcut.reference.slices import take
from depcut.support.torch_private import TorchDispatchMode, pytree

_SAME = 1e-6  # relative difference of numbers that one formula gives
# In-place operators that overwrite what they get without reading it.
_FILLS = frozenset(
    {"bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform"}
)


@dataclass(frozen=True)
class Draw:
    """One execution of an operator that draws random numbers.

    Attributes:
        node: The node that executed it.
        target: The operator.
        read: Tensors whose values it read.
        drawn: Tensors that it returned.
    """

    node: fx.Node
    target: Any
    read: list[Tensor]
    drawn: list[Tensor]


@dataclass
class Recording:
    """What a run of the captured graph draws, and which numbers it computes with.

    Attributes:
        draws: In the order of execution.
        numbers: By the module whose code executes them.
    """

    draws: list[Draw] = field(default_factory=list)
    numbers: dict[str, list[tuple[str, tuple[float, ...]]]] = field(default_factory=dict)

    @contextmanager
    def of(self, node: fx.Node) -> Iterator[None]:
        """While a node is executed."""
        with _Watch(lambda func, args, kwargs, out: self._saw(node, func, args, kwargs, out)):
            yield

    def _saw(self, node: fx.Node, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        numbers = numbers_of(func, args, kwargs)
        if numbers:
            entry = (base_of(func), numbers)
            self.numbers.setdefault(module_of(node), []).append(entry)
        if draws(func, args, kwargs):
            read = [t.clone() for t in _read(func, args, kwargs)]
            self.draws.append(Draw(node, func, read, [t.clone() for t in _tensors(out)]))


class _Watch(TorchDispatchMode):
    """Shows every operator that is executed, with its result."""

    def __init__(self, saw: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saw = saw

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute one operator."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._saw(func, args, kwargs, out)
        return out


class Replay:
    """A run of the smaller model that draws what was recorded.

    Args:
        keep: What stays of the dense model.
        recording: Of the dense run.
        sliced: Whether what was recorded is of the smaller model's sizes already.

    Attributes:
        running: Modules whose code runs, the innermost last; kept by the caller's hooks.
        read: (node, wanted, got) of the values that drawing operators read.
        numbers: As those of a recording.
        lost: Operators whose draws could not be replayed.
    """

    def __init__(self, keep: Keep, recording: Recording, *, sliced: bool = False) -> None:
        self.keep, self.sliced = keep, sliced
        self.recording = recording
        self.running: list[str] = []
        self.read: list[tuple[fx.Node, Tensor, Tensor]] = []
        self.numbers: dict[str, list[tuple[str, tuple[float, ...]]]] = {}
        self.lost: list[str] = []
        self._left = list(recording.draws)

    def mode(self) -> TorchDispatchMode:
        """A context in which the smaller model is to run."""
        return _Watch(self._saw)

    def _saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        module = self.running[-1] if self.running else ""
        numbers = numbers_of(func, args, kwargs)
        if numbers:
            self.numbers.setdefault(module, []).append((base_of(func), numbers))
        if draws(func, args, kwargs) and not self._given(module, func, args, kwargs, out):
            self.lost.append(base_of(func))

    def _given(self, module: str, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether the recorded values could be put in place of what an operator drew."""
        alike = [i for i, d in enumerate(self._left) if d.target is func]
        here = [i for i in alike if module_of(self._left[i].node) == module]
        if not alike:
            return False
        draw = self._left.pop((here or alike)[0])
        results = _tensors(out)
        parts = [self._part(draw.node, t, r) for t, r in zip(draw.drawn, results, strict=False)]
        if len(results) != len(draw.drawn) or any(p is None for p in parts):
            return False
        for result, part in zip(results, parts, strict=True):
            assert part is not None
            result.copy_(part)
        for wanted, got in zip(draw.read, _read(func, args, kwargs), strict=False):
            part = self._part(draw.node, wanted, got)
            if part is not None:
                self.read.append((draw.node, part, got.clone()))
        return True

    def _part(self, node: fx.Node, dense: Tensor, small: Tensor) -> Tensor | None:
        """The part of a tensor of a dense operator that the smaller model's corresponds to."""
        if dense.shape == small.shape:
            return dense
        if self.sliced or dense.ndim != small.ndim:
            return None
        dims = self.keep.coupling.env.get(node)
        if isinstance(dims, tuple) and _is_of(dense, node):
            part = kept_part(dense, self.keep, dims)
            if part.shape == small.shape:
                return part
        picked = [
            None if now == was else self._by_size(node, was, now)
            for was, now in zip(dense.shape, small.shape, strict=True)
        ]
        part = take(dense, tuple(picked))
        return part if part.shape == small.shape else None

    def _by_size(self, node: fx.Node, dense: int, small: int) -> Indices | None:
        """What stays of the only axis around a node that is narrowed from one size to another."""
        found: dict[bytes, Indices] = {}
        for term in self._terms(node):
            if term.size == dense and self.keep.count(term) == small:
                kept = self.keep.indices(term)
                if kept is not None and kept.ndim == 1:
                    found[np.asarray(kept).tobytes()] = kept
        return next(iter(found.values())) if len(found) == 1 else None

    def _terms(self, node: fx.Node) -> Iterator[Term]:
        """Terms of all dimensions of a node and of what it reads."""
        for n in (node, *node.all_input_nodes):
            output = self.keep.coupling.env.get(n)
            for dims in output if isinstance(output, list) else (output,):
                yield from map(axes.resolve, dims if isinstance(dims, tuple) else ())


def is_drawing(program: Program) -> bool:
    """Whether a model draws random numbers: in its graph, or in Python."""
    return program.states is not None or any(map(is_random, program.graph.graph.nodes))


def other_number(dense: Recording, slim: Replay) -> tuple[str, str]:
    """The first number that the smaller model computes with and the dense one does not.

    Operators are matched module by module; a module that executes others is passed over.

    Returns:
        The module whose code computes it, and what is wrong; empty where nothing is.
    """
    for module, got in slim.numbers.items():
        wanted = dense.numbers.get(module, [])
        if [name for name, _ in wanted] != [name for name, _ in got]:
            continue
        for (name, numbers), (_, others) in zip(wanted, got, strict=True):
            if len(numbers) == len(others) and not are_close(numbers, others):
                pairs = zip(numbers, others, strict=True)
                a, b = next((a, b) for a, b in pairs if not _close(a, b))
                return module, f"its code computes {name} with {b:.6g} instead of {a:.6g}"
    return "", ""


def _is_of(tensor: Tensor, node: fx.Node) -> bool:
    """Whether a tensor has the sizes of a node's value, whatever the batch."""
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.ndim == tensor.ndim
        and all(
            size == was
            for size, was in zip(tensor.shape, value.shape, strict=True)
            if isinstance(was, int)
        )
    )


def are_close(wanted: Sequence[float], got: Sequence[float]) -> bool:
    """Whether numbers are equal but for rounding.

    Args:
        wanted: Some numbers.
        got: Others.
    """
    return len(wanted) == len(got) and all(map(_close, wanted, got))


def _close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=_SAME) or (math.isnan(a) and math.isnan(b))


def numbers_of(func: Any, args: Any, kwargs: Any) -> tuple[float, ...]:
    """Numbers that an operator is called with and that are no sizes."""
    if base_of(func).startswith("lift_fresh"):
        value = args[0]
        return (float(value),) if value.numel() == 1 and value.device.type == "cpu" else ()
    kinds = (int, float) if is_pointwise(func) else (float,)
    return tuple(float(v) for v in (*args, *kwargs.values()) if type(v) in kinds)


def _read(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors whose values an operator that draws depends on."""
    name = base_of(func)
    if name.endswith("_like"):
        return []
    known = schema(func)
    given = {**dict(zip(known, args, strict=False)), **kwargs}
    return [
        v
        for n, v in given.items()
        if isinstance(v, Tensor) and not (known[n].written and name in _FILLS)
    ]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
