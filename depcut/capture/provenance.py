"""Where integer literals of a captured graph come from: module attributes and tensor sizes.

In the clone that is captured, every plain int attribute of a module is replaced by an int that
remembers its name and survives arithmetic, and every tensor size read by the model's code becomes
one too. A torch-function mode sees the calls that receive such ints and annotates the nodes they
create, so that the rewrite knows which attribute supplies each size, e.g. `("attr", "attn",
("num_heads",))` or `("//", ("size", 17, 2), ("attr", ...))`.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx import traceback
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

from depcut.capture.calls import Recorder, TorchCall, is_number
from depcut.support.torch_private import pytree

Expr = int | float | tuple[Any, ...]

KEY = "depcut_literals"
MARK = "depcut_mark"
CALL = "depcut_call"

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "**": operator.pow,
}
_METHODS = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "//": "floordiv",
    "%": "mod",
    "/": "truediv",
    "**": "pow",
}


class Traced(int):
    """An int that remembers the expression it came from."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> Traced:
        """An int of that value with that provenance."""
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain ints."""
        return (int, (int(self),))

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        """A plain int."""
        return int(self)


class TracedFloat(float):
    """A float computed from traced ints, such as the scale of an attention."""

    expr: Expr

    def __new__(cls, value: float, expr: Expr) -> TracedFloat:
        """A float of that value with that provenance."""
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain floats."""
        return (float, (float(self),))

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        """A plain float."""
        return float(self)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, int) else float(value)


def _traced(value: Any, expr: Expr) -> Any:
    """A result of arithmetic with its provenance, if it is an int or a float."""
    if type(value) is int:
        return Traced(value, expr)
    return TracedFloat(value, expr) if type(value) is float else value


def _traced_operator(symbol: str, reflected: bool) -> Callable[[Any, Any], Any]:
    compute = OPERATORS[symbol]

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented  # the tensor's own operator sees the traced number
        mine = _plain(self)
        if type(other) not in (int, float, Traced, TracedFloat):
            # A SymInt raises instead of returning NotImplemented, so it must meet a plain number.
            return compute(other, mine) if reflected else compute(mine, other)
        its = _plain(other)
        value = compute(its, mine) if reflected else compute(mine, its)
        left, right = self.expr, getattr(other, "expr", other)
        return _traced(value, (symbol, right, left) if reflected else (symbol, left, right))

    return method


for _symbol, _name in _METHODS.items():
    for _kind in (Traced, TracedFloat):
        setattr(_kind, f"__{_name}__", _traced_operator(_symbol, False))
        setattr(_kind, f"__r{_name}__", _traced_operator(_symbol, True))


class _Modes(threading.local):
    """The modes in force in each thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[ProvenanceMode] = []


_MODES = _Modes()


def _comparison(kind: type, name: str) -> Callable[[Any, Any], Any]:
    own = getattr(kind.__base__, name)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, torch.SymInt | torch.SymFloat):
            if _MODES.stack:
                _MODES.stack[-1].compared(inspect.currentframe(), name, (self, None), truth=False)
            # Of an int that is no plain one, a SymInt says that it is another number.
            return getattr(operator, name)(_plain(self), other)
        truth = own(self, other)
        if _MODES.stack and isinstance(truth, bool) and is_number(other):
            sides = (self, other)
            return _MODES.stack[-1].compared(inspect.currentframe(), name, sides, truth=truth)
        return truth

    return method


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    for _kind in (Traced, TracedFloat):
        setattr(_kind, _name, _comparison(_kind, _name))


_plain_root = math.sqrt


def root(value: Any, /) -> float:
    """`math.sqrt`; the root of a traced number is traced."""
    plain = _plain_root(value)
    expr = value.expr if isinstance(value, Traced | TracedFloat) else None
    return plain if expr is None else TracedFloat(plain, ("**", expr, 0.5))


def node_of(value: Any) -> fx.Node | None:
    """The graph node that produces a tensor or SymInt during the capture in progress."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None or not isinstance(value, torch.Tensor | torch.SymInt):
        return None
    slot: Any = cast(Any, proxy_tensor.get_proxy_slot)(value, mode.tracer, None)
    if isinstance(value, torch.SymInt) and slot is not None and not isinstance(slot, fx.Proxy):
        slot = slot.force()
    proxy = slot if slot is None or isinstance(slot, fx.Proxy) else slot.proxy
    return proxy.node if proxy is not None else None


def mark(node: fx.Node, marks: list[fx.Node]) -> int:
    """A number that identifies a node, and its copy after passes have copied the graph."""
    if MARK not in node.meta:
        node.meta[MARK] = len(marks)
        marks.append(node)
    return cast(int, node.meta[MARK])


Corrector = Callable[[int, TorchCall, tuple[Any, ...], dict[str, Any]], Any]


class ProvenanceMode(TorchFunctionMode):
    """Hands out traced sizes, records the calls of the torch API and annotates what they create.

    Args:
        marks: Nodes referred to so far; grows during the capture.
        recorder: Of the calls.
        correct: Gives the arguments that a call gets in place of those it was made with.
    """

    def __init__(
        self, marks: list[fx.Node], recorder: Recorder, correct: Corrector | None = None
    ) -> None:
        super().__init__()
        self.marks, self.recorder, self.correct = marks, recorder, correct

    def __enter__(self) -> ProvenanceMode:
        """Also see comparisons from now on."""
        super().__enter__()  # type: ignore[no-untyped-call]
        _MODES.stack.append(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        """No longer."""
        _MODES.stack.remove(self)
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def compared(
        self, frame: FrameType | None, name: str, sides: tuple[Any, Any], *, truth: bool
    ) -> bool:
        """Record a comparison of two numbers; what comes out of it, corrected.

        Args:
            frame: Of the method that compares.
            name: Of the operator.
            sides: The numbers; None for a multiple of the batch.
            truth: What they give.
        """
        caller = frame.f_back if frame is not None else None
        origins = [getattr(side, "expr", side) for side in sides]
        made = self.recorder.compare(caller, name, (origins[0], origins[1]), truth)
        correct = getattr(self.correct, "compared", None)
        plain = made is not None and made.plain and None not in sides
        return bool(correct(made)) if plain and correct is not None else truth

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Intercept one call of the torch API."""
        kwargs = kwargs or {}
        if not self.recorder.running:
            return func(*args, **kwargs)
        if func in _SIZE_READERS:
            return self._size(func, args, kwargs)
        if func in _OF_SYMBOLS:
            # They know plain numbers and symbols alone.
            return func(*(_plain(a) if isinstance(a, Traced | TracedFloat) else a for a in args))
        literals = tuple(_numbers(pytree.tree_leaves((args, kwargs))))
        number = self.recorder.record(func, args, kwargs)
        if number is None:
            return func(*args, **kwargs)
        if self.correct is not None:
            args, kwargs = self.correct(number, self.recorder.calls[number], args, kwargs)
        with traceback.annotate({KEY: literals, CALL: number}):
            return func(*args, **kwargs)

    def _size(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        node = node_of(args[0])
        if node is None:
            return out
        number = mark(node, self.marks)
        if isinstance(out, torch.Size):
            return torch.Size(
                [Traced(s, ("size", number, i)) if type(s) is int else s for i, s in enumerate(out)]
            )
        if type(out) is not int:
            return out
        if func is torch.Tensor.numel:
            return Traced(out, ("numel", number))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return Traced(out, ("size", number, int(dim) % args[0].dim()))


def _numbers(leaves: list[Any]) -> Iterator[tuple[float, Expr | None]]:
    """All numbers among the arguments of a call, in order, with provenance."""
    for leaf in leaves:
        if isinstance(leaf, slice):
            yield from _numbers([leaf.start, leaf.stop, leaf.step])
        elif is_number(leaf):
            yield _plain(leaf), getattr(leaf, "expr", None)


_OF_SYMBOLS = {torch.sym_min, torch.sym_max, torch.sym_int, torch.sym_float}
_SIZE_READERS = {torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.numel}  # type: ignore[attr-defined]


def is_result(value: Any) -> bool:
    """Whether a value is a tensor that some forward has computed with gradients."""
    return isinstance(value, torch.Tensor) and not value.is_leaf


def _trace_value(value: Any, module: str, path: tuple[Any, ...]) -> Any:
    """The attribute value with its ints traced; the same object where it holds none."""
    if type(value) is int:
        return Traced(value, ("attr", module, path)) if value > 1 else value
    if type(value) in (list, tuple):
        items = [_trace_value(v, module, (*path, i)) for i, v in enumerate(value)]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if type(value) is dict and any(map(is_result, value.values())):
        # A cache of an earlier forward would hide the parameters it was computed from.
        return {k: v for k, v in value.items() if not is_result(v)}
    if type(value) is dict and all(isinstance(k, str | int) for k in value):
        new = {k: _trace_value(v, module, (*path, k)) for k, v in value.items()}
        return new if any(new[k] is not value[k] for k in value) else value
    return value


def trace_attributes(model: nn.Module) -> None:
    """Make every int attribute of every module remember its name.

    Args:
        model: A clone, which is changed for good.
    """
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute not in _INTERNAL:
                module.__dict__[attribute] = _trace_value(value, name, (attribute,))


_INTERNAL = frozenset(vars(nn.Module()))


Received = tuple[tuple[float, Expr | None], ...]


def call_of(node: fx.Node) -> int | None:
    """The number of the call of the torch API that created a node."""
    return cast("int | None", (node.meta.get("custom") or {}).get(CALL))


def literals_of(node: fx.Node) -> Received:
    """The numbers that the call behind a node received, in order; provenance None: typed in.

    Nodes created by one call share one tuple.
    """
    custom = node.meta.get("custom") or {}
    return cast(Received, custom.get(KEY, ()))
