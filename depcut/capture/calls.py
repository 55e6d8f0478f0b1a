"""Calls of the torch API during a capture: what was called, where in the source, with what numbers.

While a model is captured the Python frames are the real ones, so that each call is found again in
the source as the very expression that made it, by `executing`, also where a helper function or a
decorator stands in between.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import executing
import torch

Step = int | str
Steps = tuple[Step, ...]

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
# What stands between the model's code and a torch-function mode.
_MACHINERY = (
    f"{_HERE}/",
    *(f"{_TORCH}/{name}" for name in ("overrides.py", "_export/", "export/", "fx/", "_ops.py")),
    *(f"{_TORCH}/utils/{name}" for name in ("_device.py", "_python_dispatch.py", "_stats.py")),
    f"{_TORCH}/_library/",
)
# What computes the shapes of a call: it calls the torch API itself.
_SHAPES = tuple(
    f"{_TORCH}/{name}"
    for name in (
        "_subclasses/",
        "_prims",
        "_refs/",
        "_decomp/",
        "_meta_registrations",
        "_dispatch/",
    )
)
_DISPATCHER = "handle_torch_function"
_MODULE_CALL = f"{_TORCH}/nn/modules/module.py"
# Methods of a tensor that give a number.
_SIZES = frozenset({"size", "dim", "numel", "nelement", "item"})


@dataclass(frozen=True)
class Frame:
    """A function that runs, and the expression in it that is being evaluated.

    Attributes:
        code: The function's code.
        node: The expression, or None where it could not be found.
        module: Name of the module in which the function was made.
    """

    code: types.CodeType
    node: ast.AST | None
    module: str = ""

    @property
    def span(self) -> tuple[int, int, int, int] | None:
        """(line, column, end line, end column) of the expression in its file."""
        node: Any = self.node
        if node is None:
            return None
        return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


@dataclass(frozen=True, eq=False)
class TorchCall:
    """One call of the torch API.

    Attributes:
        function: What was called.
        module: Qualified name of the innermost module whose forward makes the call.
        frames: The frames of the model's code, innermost first, up to the `forward` of the
            innermost module.
        numbers: Where each number stands among (args, kwargs), with its value.
        symbols: Where each symbolic size stands, with the size; its expression is known when the
            capture is over, as symbols may turn out to be equal.
        positional: How many arguments were given by position.
        left: Of an operator between two operands: whether the number is the left one; None where
            that could not be seen.
    """

    function: Callable[..., Any]
    module: str
    frames: tuple[Frame, ...]
    numbers: tuple[tuple[Steps, float], ...] = ()
    symbols: tuple[tuple[Steps, torch.SymInt], ...] = ()
    positional: int = 0
    left: bool | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of two numbers in the model's code.

    Attributes:
        call: Where it is made; of a call of the torch API it has the module and the frames.
        operator: Such as "__gt__".
        sides: Both numbers, or where they come from; None for a multiple of the batch.
        truth: What came out.
        plain: Whether it is an expression of two numbers, such as `a > b`; else `min` compares.
    """

    call: TorchCall
    operator: str
    sides: tuple[Any, Any]
    truth: bool
    plain: bool

    @property
    def place(self) -> tuple[Any, ...]:
        """The same for the same expression, reached in the same way."""
        frames = tuple((frame.code, frame.span) for frame in self.call.frames)
        return self.call.module, frames


@dataclass
class Recorder:
    """Makes the record of each call.

    Attributes:
        calls: All calls so far, in order.
        modules: Those whose forward runs now, the innermost last.
        lines: (file, line) of the model's code that were seen to run: they call torch or a module.
        comparisons: Of sizes and attributes, in order.
        running: Whether the model's forward runs now.
    """

    calls: list[TorchCall] = field(default_factory=list)
    modules: list[str] = field(default_factory=lambda: [""])
    lines: set[tuple[str, int]] = field(default_factory=set)
    comparisons: list[Comparison] = field(default_factory=list)
    running: bool = False
    _nodes: dict[tuple[types.CodeType, int], ast.AST | None] = field(default_factory=dict)

    def record(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """Record the call that the caller's caller makes.

        Args:
            function: What is called.
            args: By position.
            kwargs: By keyword.

        Returns:
            Its number; None where it is not the model's code that makes it.
        """
        if isinstance(function, types.MethodWrapperType):  # reads an attribute of a tensor
            return None
        found = list(_frames(inspect.currentframe()))
        if not found or found[0].f_code.co_filename.startswith(_SHAPES):
            return None
        self._saw(found)
        leaves = list(_leaves(args)) + [
            ((name, *steps), leaf)
            for name, value in kwargs.items()
            for steps, leaf in _leaves(value)
        ]
        self.calls.append(
            TorchCall(
                function,
                self.modules[-1],
                tuple(
                    Frame(f.f_code, self._node(f), f.f_globals.get("__name__", "")) for f in found
                ),
                tuple((s, v) for s, v in leaves if is_number(v)),
                tuple((s, v) for s, v in leaves if isinstance(v, torch.SymInt)),
                len(args),
                self._left(found[0]) if len(args) == 2 else None,
            )
        )
        return len(self.calls) - 1

    def compare(
        self, frame: types.FrameType | None, name: str, sides: tuple[Any, Any], truth: bool
    ) -> Comparison | None:
        """Record a comparison of two numbers that the model's code makes.

        Args:
            frame: The function that compares.
            name: Of the operator.
            sides: Both numbers, or where they come from; None for a multiple of the batch.
            truth: What comes out.

        Returns:
            What was recorded; None where it is torch that compares.
        """
        while frame is not None and _is_machinery(frame.f_code):  # `min` is torch's in a capture
            frame = frame.f_back
        if frame is None or frame.f_code.co_filename.startswith((_TORCH, _HERE)):
            return None
        node = self._node(frame)
        plain = (
            isinstance(node, ast.Compare)
            and len(node.ops) == 1
            and all(_is_number(side, frame) for side in (node.left, *node.comparators))
        )
        frames = tuple(Frame(f.f_code, self._node(f)) for f in _frames(frame))
        call = TorchCall(operator.eq, self.modules[-1], frames)
        self.comparisons.append(Comparison(call, name, sides, truth, plain))
        return self.comparisons[-1]

    def follow(self, model: torch.nn.Module) -> None:
        """See when a clone's forward begins and ends, by hooks that stay."""

        def begin(*_: Any) -> None:
            self.running = True

        def end(*_: Any) -> None:
            self.running = False

        model.register_forward_pre_hook(begin, prepend=True)
        model.register_forward_hook(end, always_call=True)

    def enter(self, module: str) -> None:
        """Note that the forward of a module begins."""
        self.modules.append(module)
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
            frame = frame.f_back
        while frame is not None and frame.f_code.co_filename == _MODULE_CALL:
            frame = frame.f_back
        self._saw(list(_frames(frame)))

    def _saw(self, frames: list[types.FrameType]) -> None:
        self.lines.update((frame.f_code.co_filename, frame.f_lineno) for frame in frames)

    def _node(self, frame: types.FrameType) -> ast.AST | None:
        key = frame.f_code, frame.f_lasti
        if key not in self._nodes:
            try:
                node = executing.Source.executing(frame).node
            except Exception:  # noqa: BLE001  (whatever the file holds: it is then not found)
                node = None
            self._nodes[key] = node
        return self._nodes[key]

    def _left(self, frame: types.FrameType) -> bool | None:
        """Whether the left operand of an operator is the number."""
        node = self._node(frame)
        if isinstance(node, ast.BinOp):
            left, right = node.left, node.right
        elif isinstance(node, ast.Compare) and len(node.comparators) == 1:
            left, right = node.left, node.comparators[0]
        else:
            return None
        known = _is_number(left, frame)
        if known is None:
            other = _is_number(right, frame)
            known = None if other is None else not other
        return known


def is_number(value: Any) -> bool:
    """Whether an argument is a number: a size, an index, a scale; flags are not.

    Args:
        value: An argument, or an item of one.
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number(node: ast.AST, frame: types.FrameType) -> bool | None:
    """Whether an operand is a number rather than a tensor; None: that takes a call to know."""
    value: Any
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Name):
        value = frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = frame.f_locals.get(node.value.id)
        if not isinstance(owner, torch.nn.Module):
            return None
        value = vars(owner).get(node.attr)
    elif isinstance(node, ast.UnaryOp):
        return _is_number(node.operand, frame)
    elif isinstance(node, ast.BinOp):
        sides = {_is_number(node.left, frame), _is_number(node.right, frame)}
        if isinstance(node.op, ast.MatMult) or False in sides:
            return False
        return None if None in sides else True
    elif isinstance(node, ast.Call):
        return _gives_number(node.func, frame)
    elif isinstance(node, ast.Subscript):
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            return True
        return False if _is_number(node.value, frame) is False else None
    else:
        return None
    if isinstance(value, torch.Tensor):
        return False
    return True if isinstance(value, int | float | torch.SymInt | torch.SymFloat) else None


def _gives_number(function: ast.AST, frame: types.FrameType) -> bool | None:
    """Whether a call of a function gives a number."""
    if isinstance(function, ast.Name):
        if function.id in frame.f_locals:
            return None
        value = frame.f_globals.get(function.id, getattr(builtins, function.id, None))
    elif isinstance(function, ast.Attribute):
        if function.attr in _SIZES:
            return True
        owner = function.value
        value = frame.f_globals.get(owner.id) if isinstance(owner, ast.Name) else None
        value = vars(value).get(function.attr) if isinstance(value, types.ModuleType) else None
    else:
        return None
    of_math = getattr(value, "__module__", None) == math.__name__ or value is math.sqrt
    return True if of_math or any(value is kind for kind in (int, float, len)) else None


def _leaves(value: Any) -> Iterator[tuple[Steps, Any]]:
    """The items of nested arguments with the steps that lead to each."""
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            for steps, leaf in _leaves(item):
                yield (i, *steps), leaf
    elif isinstance(value, dict):
        for key, item in value.items():
            for steps, leaf in _leaves(item):
                yield (key, *steps), leaf
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield (name,), getattr(value, name)
    else:
        yield (), value


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    """The frames of the model's code, innermost first, within one call of a module."""
    while frame is not None and _is_machinery(frame.f_code):
        dispatches = frame.f_code.co_name == _DISPATCHER
        frame = frame.f_back
        if dispatches and frame is not None:
            frame = frame.f_back  # the function of torch that dispatches
    while frame is not None and frame.f_code.co_filename != _MODULE_CALL:
        if not _is_machinery(frame.f_code):  # a function that torch.fx wraps is called by it
            yield frame
        frame = frame.f_back


def _is_machinery(code: types.CodeType) -> bool:
    return code.co_filename.startswith(_MACHINERY)
