"""From numbers that a class's code gets wrong to patches of its source."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from depcut.capture.calls import Frame, Steps, TorchCall
from depcut.capture.provenance import Expr, call_of, literals_of
from depcut.plan.keep import Keep
from depcut.plan.lengths import is_fixed
from depcut.rewrite.callees import by_name, importable_name
from depcut.rewrite.edits import EXCHANGES, Edit, FunctionPatch, Patch
from depcut.rewrite.functions import (
    NoSourceError,
    Source,
    holds,
    method_holding,
    reachable,
    source_of,
)
from depcut.rewrite.not_run import Branches, guard_patch, with_branches
from depcut.rewrite.observe import Mismatch, Wanted, wanted
from depcut.rewrite.patches import resolved
from depcut.rewrite.places import Place, is_typed, keyword_of, place_of

# With one size given as -1, torch computes it.
_VIEWS = frozenset({"view", "reshape", "unflatten"})


class CannotPatchError(Exception):
    """The numbers cannot be exchanged in the source of a module's class."""


def patches(
    model: nn.Module,
    keep: Keep,
    mismatches: Sequence[Mismatch],
    branches: Callable[[str], Branches],
) -> tuple[dict[str, Patch], dict[str, str]]:
    """Patches of the classes whose code gets numbers wrong.

    Args:
        model: The smaller model, whose modules are to be patched.
        keep: What stays.
        mismatches: The numbers.
        branches: Gives what deals with the branches of a module that did not run.

    Returns:
        Patches by module, and why there is none by module.
    """
    wrong: dict[str, list[Mismatch]] = defaultdict(list)
    for mismatch in mismatches:
        wrong[mismatch.call.module].append(mismatch)
    provenance = _provenance(keep)
    sizes = {call: change for each in keep.calls for call, change in wanted(each).items()}
    found: dict[str, Patch] = {}
    failed: dict[str, str] = {}
    for name, items in wrong.items():
        patcher = _Patcher(model.get_submodule(name), name, keep, provenance, sizes, branches(name))
        patch = patcher.attempt(items)
        if isinstance(patch, str):
            failed[name] = patch
        else:
            found[name] = patch
    return found, failed


def _provenance(keep: Keep) -> dict[TorchCall, tuple[Expr | None, ...]]:
    """Where the numbers of each call come from."""
    out = {}
    for program in keep.coupling.program.examples:
        for node in program.graph.graph.nodes:
            number = call_of(node)
            if number is not None:
                out[program.torch_calls[number]] = tuple(e for _, e in literals_of(node))
    return out


@dataclass(frozen=True)
class _Function:
    """A function to be patched: a method, or what a patched one calls at some place."""

    code: CodeType
    caller: _Function | None = None
    at: tuple[int, ...] = ()
    module: str = ""


@dataclass
class _Patcher:
    """Patches one module."""

    module: nn.Module
    name: str
    keep: Keep
    provenance: dict[TorchCall, tuple[Expr | None, ...]]
    wanted: dict[TorchCall, Wanted]
    branches: Branches
    edits: dict[_Function, set[Edit]] = field(default_factory=dict)
    inferred: set[tuple[TorchCall, Steps]] = field(default_factory=set)

    def attempt(self, mismatches: Sequence[Mismatch]) -> Patch | str:
        """The patch, or why there can be none."""
        try:
            return self.patch(mismatches)
        except (CannotPatchError, NoSourceError) as error:
            return str(error)

    def patch(self, mismatches: Sequence[Mismatch]) -> Patch:
        """The edits of every function, methods first."""
        if "forward" in vars(self.module):
            raise CannotPatchError("its forward is set on the instance")
        by_call: dict[TorchCall, list[Mismatch]] = defaultdict(list)
        for mismatch in mismatches:
            by_call[mismatch.call].append(mismatch)
        chains = self._chains(by_call)
        for call, items in by_call.items():
            function = self._function(chains[call])
            for item in items:
                self._add(function, self._edit(item))
        for function in list(self.edits):
            self._calls(function)
        return self._ordered()

    def _chains(self, wrong: dict[TorchCall, list[Mismatch]]) -> dict[TorchCall, tuple[Frame, ...]]:
        """For each call, the frames (innermost first) up to the method that is patched.

        As few as tell it from the calls at the same place that need other numbers.
        """
        programs = self.keep.coupling.program.examples
        mine = [call for p in programs for call in p.torch_calls if call.module == self.name]
        out: dict[TorchCall, tuple[Frame, ...]] = {}
        for call in wrong:
            frames = call.frames
            if not frames:
                raise CannotPatchError("a call of torch is not made by the model's code")
            if frames[0].node is None:
                raise CannotPatchError(
                    f"the source of {frames[0].code.co_name} is not at hand, or not what runs"
                )
            length = self._to_method(frames, 1)
            while True:
                key = _key(frames[:length])
                alike = [c for c in mine if _key(c.frames[:length]) == key]
                varying = self._varying(alike, wrong)
                if not varying or length == len(frames):
                    break
                length = self._to_method(frames, length + 1)
            if varying:
                self._infer(alike, varying)
            out[call] = frames[:length]
        lengths: dict[CodeType, int] = {}
        for frames in out.values():
            lengths[frames[0].code] = max(lengths.get(frames[0].code, 0), len(frames))
        return {c: c.frames[: max(len(f), lengths[f[0].code])] for c, f in out.items()}

    def _varying(
        self, alike: Sequence[TorchCall], wrong: dict[TorchCall, list[Mismatch]]
    ) -> set[Steps]:
        """Where the calls of one expression need different numbers."""
        steps = {m.steps for call in alike for m in wrong.get(call, ())}
        needed: dict[Steps, set[Any]] = {at: set() for at in steps}
        for call in alike:
            change = self.wanted.get(call, Wanted())
            numbers = {at: change.numbers.get(k, old) for k, (at, old) in enumerate(call.numbers)}
            shares = {at: change.symbols.get(k, (1, 1)) for k, (at, _) in enumerate(call.symbols)}
            for at in steps:
                needed[at].add(numbers.get(at, shares.get(at, change.keywords.get(str(at[0])))))
        return {at for at, values in needed.items() if len(values) > 1}

    def _infer(self, calls: Sequence[TorchCall], varying: set[Steps]) -> None:
        """Leave the one size in which views at one place differ to torch."""
        views = all(getattr(call.function, "__name__", "") in _VIEWS for call in calls)
        if len(varying) > 1 or not views or any(v == -1 for c in calls for _, v in c.numbers):
            raise CannotPatchError("one line of its code would need several numbers")
        [steps] = varying
        self.inferred |= {(call, steps) for call in calls}

    def _to_method(self, frames: tuple[Frame, ...], length: int) -> int:
        while length <= len(frames):
            if method_holding(type(self.module), frames[length - 1].code) is not None:
                return length
            length += 1
        raise CannotPatchError(f"{frames[0].code.co_name} is not reached by a method of its class")

    def _function(self, frames: tuple[Frame, ...]) -> _Function:
        """The innermost function; each further one is called by the one outside of it."""
        function: _Function | None = None
        outer: Frame | None = None
        for frame in reversed(frames):
            if function is None:
                function = _Function(_outermost(type(self.module), frame.code))
            elif outer is not None and not holds(outer.code, frame.code):
                if not isinstance(outer.node, ast.Call):
                    raise CannotPatchError(f"{frame.code.co_name} is not called by name")
                function = _Function(frame.code, function, outer.span or (), frame.module)
            outer = frame
        assert function is not None
        return function

    def _add(self, function: _Function, edit: Edit) -> None:
        edits = self.edits.setdefault(function, set())
        if edit.kind == "scale" and any(
            e != edit and (e.span, e.steps) == (edit.span, edit.steps) for e in edits
        ):
            raise CannotPatchError("one line of its code would need several ratios")
        edits.add(edit)

    def _calls(self, function: _Function) -> None:
        """Let the caller call the patched function in place of the original."""
        while function.caller is not None:
            known = function.caller in self.edits
            self.edits.setdefault(function.caller, set())
            function = function.caller
            if known:
                return

    def _edit(self, mismatch: Mismatch) -> Edit:
        call = mismatch.call
        code = call.frames[0].code
        source = source_of(_outermost(type(self.module), code))
        if mismatch.keyword:
            return self._keyword(call, mismatch, source)
        if mismatch.truth:
            assert call.frames[0].node is not None
            return Edit(source.span(call.frames[0].node), "set", mismatch.wanted)
        place = place_of(call, mismatch.steps)
        if place is None:
            raise CannotPatchError(
                f"{mismatch.actual:.6g} is not seen in the code that calls "
                f"{getattr(call.function, '__name__', call.function)}"
            )
        if (mismatch.call, mismatch.steps) in self.inferred:
            return Edit(source.span(place.node), "set", -1, 0, place.steps)
        kind = self._kind(mismatch, place, source)
        if kind == "scale" and not mismatch.actual:
            kind = "swap"  # nothing can be a multiple of 0
        old = 0.0 if kind == "set" else mismatch.actual
        return Edit(source.span(place.node), kind, mismatch.wanted, old, place.steps)

    def _kind(self, mismatch: Mismatch, place: Place, source: Source) -> str:
        """How the number is exchanged: see `Edit`."""
        if mismatch.symbolic:
            return "scale"
        exprs = self.provenance.get(mismatch.call, ())
        index = mismatch.index
        expr = exprs[index] if index is not None and index < len(exprs) else None
        if expr is not None:
            return "set" if is_fixed(expr, self.keep.coupling) else "scale"
        typed = not place.steps and is_typed(place.node, source.tree)
        return "set" if typed else "swap"

    def _keyword(self, call: TorchCall, mismatch: Mismatch, source: Source) -> Edit:
        node, name = call.frames[0].node, str(mismatch.steps[0])
        if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
            raise CannotPatchError(f"{name!r} cannot be given to {call.function}")
        given = keyword_of(node, name)
        if given is not None:
            return Edit(source.span(given), "set", mismatch.wanted)
        return Edit(source.span(node), "keyword", mismatch.wanted, name=name)

    def _ordered(self) -> Patch:
        """Functions in an order in which callers stand before those they call."""
        order: list[_Function] = []

        def place(function: _Function) -> None:
            if function in order:
                return
            if function.caller is not None:
                place(function.caller)
            order.append(function)

        for function in self.edits:
            place(function)
        out: list[FunctionPatch] = []
        inner: list[FunctionType] = []
        for function in order:
            name, found = self._found(function, order, inner)
            inner.append(found)
            caller = None if function.caller is None else order.index(function.caller)
            digest = source_of(found.__code__).digest
            edits = tuple(sorted(self.edits[function]))
            out.append(FunctionPatch(name, caller, found.__qualname__, digest, edits))
        for number, function in enumerate(order):
            if function.caller is not None:
                caller = order.index(function.caller)
                edit = self._call(function, number, inner[caller], out[number].name)
                out[caller] = replace(out[caller], edits=tuple(sorted((*out[caller].edits, edit))))
        further = {
            i: self.branches.edits(found, self.edits[function])
            for i, (function, found) in enumerate(zip(order, inner, strict=True))
        }
        return self._with_other_methods(with_branches(tuple(out), further))

    def _with_other_methods(self, patch: Patch) -> Patch:
        """The patch, and the branches that did not run of methods that need no other."""
        methods = {part.name for part in patch if part.caller is None}
        others = guard_patch(type(self.module), self.branches)
        return (*patch, *(part for part in others if part.name not in methods))

    def _found(
        self, function: _Function, order: list[_Function], inner: list[FunctionType]
    ) -> tuple[str, FunctionType]:
        """The name by which a function is reached, and the function itself."""
        if function.caller is None:
            found = method_holding(type(self.module), function.code)
            assert found is not None
            return found
        caller = inner[order.index(function.caller)]
        call = _call_at(source_of(caller.__code__), function.at)
        name = self._called(call.func, caller, function.code) if call is not None else ""
        holder = resolved(caller, name, type(self.module)) if _is_dotted(name) else None
        innermost = reachable(holder, function.code) if holder is not None else None
        if innermost is None:  # what the name stands for is known when it runs
            name = importable_name(function.module, function.code) or ""
            innermost = reachable(by_name(name), function.code) if name else None
        if innermost is None:
            raise CannotPatchError(f"{function.code.co_name} is not called by a name that lasts")
        return name, innermost

    def _called(self, node: ast.expr, caller: FunctionType, code: CodeType) -> str:
        """The text of a callee; where an earlier patch exchanges it, the name of what does."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if not name.startswith(EXCHANGES) or len(node.args) != 1:
                break
            if reachable(resolved(caller, name, type(self.module)), code) is not None:
                return name
            node = node.args[0]
        return ast.unparse(node)

    def _call(self, function: _Function, number: int, caller: FunctionType, name: str) -> Edit:
        source = source_of(caller.__code__)
        call = _call_at(source, function.at)
        assert call is not None
        if ":" in name or name.startswith(EXCHANGES):
            others = "others" if self._calls_others(function) else ""
            return Edit(source.span(call.func), "callee", number, name=others)
        held = resolved(caller, name, type(self.module))
        first = caller.__code__.co_varnames[:1]
        bound = name.split(".")[:1] == list(first) and isinstance(held, FunctionType)
        return Edit(source.span(call.func), "function", number, name="method" if bound else "")

    def _calls_others(self, function: _Function) -> bool:
        """Whether the expression that calls a function calls others as well."""
        assert function.caller is not None
        place = function.caller.code, function.at
        calls = (c for p in self.keep.coupling.program.examples for c in p.torch_calls)
        return any(
            (frame.code, frame.span) == place
            and (inner is None or not holds(function.code, inner.code))
            for call in calls
            for inner, frame in zip((None, *call.frames), call.frames, strict=False)
        )


def _call_at(source: Source, span: tuple[int, ...]) -> ast.Call | None:
    return next(
        (
            node
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call)
            and (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset) == span
        ),
        None,
    )


def _is_dotted(name: str) -> bool:
    return bool(name) and all(part.isidentifier() for part in name.split("."))


def _key(frames: tuple[Frame, ...]) -> tuple[Any, ...]:
    return tuple((frame.code, frame.span) for frame in frames)


def _outermost(kind: type, code: CodeType) -> CodeType:
    """The code of the function in whose source another stands: a method's, or its own."""
    found = method_holding(kind, code)
    return found[1].__code__ if found is not None else code
