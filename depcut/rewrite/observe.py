"""Which numbers the smaller model's code gives to the torch API, and which it should.

The smaller model is captured as the dense one was, and each call is compared with its counterpart:
a size must be what the kept units make it, any other number what it was. What differs is corrected
on the way, so that one run sees all of it.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from depcut.capture.calls import Comparison, Steps, TorchCall
from depcut.capture.capture import corrected_calls, hint
from depcut.capture.program import Program
from depcut.capture.provenance import call_of
from depcut.graph.liveness import enclosing
from depcut.plan.attributes import number_of
from depcut.plan.keep import Keep
from depcut.plan.lengths import is_fixed
from depcut.support.torch_private import size_expression


@dataclass(frozen=True)
class Mismatch:
    """A number that the smaller model's code gets wrong.

    Attributes:
        call: The call of the dense model.
        steps: Where it stands among (args, kwargs).
        actual: What the code gives; 0 where it gives none.
        wanted: What it should be.
        index: Which of the call's numbers it is; None of a symbolic size or a keyword.
        symbolic: Whether it is a multiple of the batch.
        keyword: Whether it is an argument that the call leaves out.
        truth: Whether it is what a comparison of widths gives.
    """

    call: TorchCall
    steps: Steps
    actual: float
    wanted: float
    index: int | None = None
    symbolic: bool = False
    keyword: bool = False
    truth: bool = False


@dataclass
class Wanted:
    """What the arguments of one call of the dense program become.

    Attributes:
        numbers: New values by the index of a number.
        symbols: Count and dense count by the index of a symbolic size.
        keywords: Arguments that it must be given.
    """

    numbers: dict[int, float] = field(default_factory=dict)
    symbols: dict[int, tuple[int, int]] = field(default_factory=dict)
    keywords: dict[str, float] = field(default_factory=dict)


def wanted(keep: Keep) -> dict[TorchCall, Wanted]:
    """New arguments of the calls that have a size or a default that changes."""
    program = keep.coupling.program
    out: dict[TorchCall, Wanted] = defaultdict(Wanted)
    for node in keep.coupling.effects:
        number = call_of(node)
        if number is None or node not in program.sizes:
            continue
        call = program.torch_calls[number]
        for literal, value, dense, count in keep.literals(node):
            if isinstance(value, int):
                at = number_of(node, literal.path)
                if at is not None:
                    out[call].numbers[at] = literal.sign * count
            elif dense != count and isinstance(value, fx.Node):
                expression = size_expression(value.meta["val"])
                for i, (_, symbol) in enumerate(call.symbols):
                    if size_expression(symbol) == expression:
                        out[call].symbols[i] = count, dense
        out[call].keywords.update(keep.pins(node))
    return out


def observe(slim: nn.Module, keep: Keep, others: Collection[str] = ()) -> list[Mismatch]:
    """The numbers that a smaller model's own code gets wrong.

    Args:
        slim: The smaller model; it is only read.
        keep: What stays.
        others: Modules that run other code than the dense model's.
    """
    found: list[Mismatch] = []
    for each in keep.calls:
        observer = _Observer(each, others)
        program = each.coupling.program
        corrected_calls(slim, (program.args, program.kwargs), program.batching, observer)
        found += observer.found
    return found


class _Observer:
    """Compares each call with the dense model's, module by module, and corrects its arguments."""

    def __init__(self, keep: Keep, others: Collection[str]) -> None:
        self.keep, self.program = keep, keep.coupling.program
        self.wanted = wanted(keep)
        self.found: list[Mismatch] = []
        self.streams: dict[str, list[int]] = defaultdict(list)
        for i, call in enumerate(self.program.torch_calls):
            self.streams[call.module].append(i)
        self.at: dict[str, int] = defaultdict(int)
        self.made: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for name, stream in self.streams.items():
            for at, i in enumerate(stream):
                call = self.program.torch_calls[i]
                self.made[name, _place(call), _form(call)].append(at)
        names = {call.module for call in self.program.torch_calls}
        self.lost = {name for name in names if {"", name, *enclosing(name)} & {*others}}
        self.truths: dict[tuple[Any, ...], list[Comparison]] = defaultdict(list)
        for comparison in self.program.comparisons:
            if comparison.plain and None not in comparison.sides:
                self.truths[comparison.place].append(comparison)
        gone = keep.gone.nodes
        alive = {call_of(n) for n in self.program.sizes if n not in gone}
        self.removed = {call_of(n) for n in gone} - alive

    def __call__(
        self, _number: int, call: TorchCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dense = self._counterpart(call)
        if dense is None:
            return args, kwargs
        change = self.wanted.get(dense, Wanted())
        arguments: Any = {"args": args, "kwargs": kwargs}
        for i, ((steps, value), (_, old)) in enumerate(
            zip(call.numbers, dense.numbers, strict=True)
        ):
            new = change.numbers.get(i, old)
            if abs(new - value) > 1e-12 * abs(new):
                self.found.append(Mismatch(dense, steps, _plain(value), _plain(new), index=i))
                arguments = _put(arguments, steps, new)
        for k, (at, _) in enumerate(call.symbols):
            count, size = change.symbols.get(k, (1, 1))
            arguments = self._symbol(dense, k, at, count, size, arguments)
        for name, value in change.keywords.items():
            if kwargs.get(name) is None:
                self.found.append(Mismatch(dense, (name,), 0, value, keyword=True))
                arguments["kwargs"] = {**arguments["kwargs"], name: value}
        return arguments["args"], arguments["kwargs"]

    def compared(self, made: Comparison) -> bool:
        """What a comparison of the smaller model's code is to give: of widths, what it gave."""
        dense = self.truths.get(made.place, [])
        fixed = all(is_fixed(side, self.keep.coupling) for each in dense for side in each.sides)
        if len({each.truth for each in dense}) != 1 or not fixed:
            return made.truth
        truth = dense[0].truth
        if truth != made.truth:
            call = dense[0].call
            self.found.append(Mismatch(call, (), made.truth, truth, truth=True))
        return truth

    def _symbol(
        self, dense: TorchCall, i: int, steps: Steps, count: int, size: int, arguments: Any
    ) -> Any:
        """Compare a multiple of the batch, by its value in the example."""
        value = _get(arguments, steps)
        _, symbol = dense.symbols[i]
        actual, old = hint(value), _evaluated(size_expression(symbol), self.program)
        if old is None or actual == (new := old * count // size):
            return arguments
        self.found.append(Mismatch(dense, steps, actual, new, symbolic=True))
        return _put(arguments, steps, value * new // actual)

    def _counterpart(self, call: TorchCall) -> TorchCall | None:
        """The same call of the dense model; None where the module's calls cannot be matched."""
        name = call.module
        if name in self.lost:
            return None
        stream, at = self.streams[name], self.at[name]
        form = _form(call)
        while at < len(stream) and form != _form(self.program.torch_calls[stream[at]]):
            if stream[at] not in self.removed:
                # Where the dense model makes it after others that the smaller one leaves out.
                others = self.made.get((name, _place(call), form), [])
                later = bisect.bisect_right(others, at)
                at = others[later] if later < len(others) else len(stream)
                break
            at += 1
        if at == len(stream):
            self.lost.add(name)
            return None
        self.at[name] = at + 1
        return self.program.torch_calls[stream[at]]


def _place(call: TorchCall) -> tuple[Any, ...]:
    """Where the call stands, all the way from the model's forward."""
    return tuple((frame.code, frame.span) for frame in call.frames)


def _form(call: TorchCall) -> tuple[Any, ...]:
    """What a call of the smaller model has in common with the same call of the dense one."""
    steps = (tuple(s for s, _ in call.numbers), tuple(s for s, _ in call.symbols))
    return id(call.function), *steps


def _plain(value: float) -> float:
    return int(value) if isinstance(value, int) else float(value)


def _evaluated(expression: Any, program: Program) -> int | None:
    """The value of a symbolic size in the example, where the batch is its only symbol."""
    symbols = list(expression.free_symbols)
    if len(symbols) > 1:
        return None
    return int(expression.subs(dict.fromkeys(symbols, program.batch)))


def _get(arguments: Any, steps: Steps) -> Any:
    value = arguments["args" if isinstance(steps[0], int) else "kwargs"]
    for step in steps:
        value = getattr(value, step) if isinstance(value, slice) else value[step]  # type: ignore
    return value


def _put(arguments: Any, steps: Steps, new: Any) -> Any:
    """The arguments with one number exchanged."""
    key = "args" if isinstance(steps[0], int) else "kwargs"
    return {**arguments, key: _exchanged(arguments[key], steps, lambda: new)}


def _exchanged(value: Any, steps: Steps, new: Callable[[], Any]) -> Any:
    if not steps:
        return new()
    step, rest = steps[0], steps[1:]
    if isinstance(value, slice):
        parts = {n: getattr(value, n) for n in ("start", "stop", "step")}
        parts[str(step)] = _exchanged(parts[str(step)], rest, new)
        return slice(*parts.values())
    if isinstance(value, dict):
        return {**value, step: _exchanged(value[step], rest, new)}
    items = list(value)
    items[int(step)] = _exchanged(items[int(step)], rest, new)
    return items if isinstance(value, list) else tuple(items)
