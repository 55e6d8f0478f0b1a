"""Numbers in place of others in the source of a function, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from depcut.errors import InputError
from depcut.rewrite.functions import Span, edited, text_at

# Names of what exchanges the function that an expression gives.
EXCHANGES = "_depcut_callee_"

Steps = tuple[int | str, ...]


@dataclass(frozen=True, order=True)
class Edit:
    """A number in place of (an item of) what an expression gives.

    Attributes:
        span: Where the expression stands in the function.
        kind: "set": the number itself; "scale": times new / old; "swap": in place of old, and an
            error where the expression gives something else; "keyword": as a further argument of
            the call; "function": the patched function of that number, called in its place;
            "callee": that function where the expression gives the original; "guard": an error
            before the statement that begins there.
        new: The number.
        old: Of "scale" and "swap", what the expression gives now.
        steps: The item, where the expression gives a sequence.
        name: Of "keyword"; of "callee" "others" where the expression gives others as well; of
            "guard", what would be wrong.
    """

    span: Span
    kind: str
    new: float
    old: float = 0
    steps: Steps = ()
    name: str = ""


@dataclass(frozen=True)
class FunctionPatch:
    """The edits of one function.

    Attributes:
        name: Of a method; of another function, the name (dotted) by which its caller calls it, or
            "module:qualname" where that is known when it runs.
        caller: Number of the patched function that calls it; None for a method.
        qualname: Of the function itself, which decorators may hide.
        digest: Hash of its source.
        edits: What changes in it.
    """

    name: str
    caller: int | None
    qualname: str
    digest: str
    edits: tuple[Edit, ...]


Patch = tuple[FunctionPatch, ...]


def _item(value: Any, steps: Steps, change: Callable[[Any], Any]) -> Any:
    if not steps:
        return change(value)
    if isinstance(value, Mapping):
        return {**value, steps[0]: _item(value[str(steps[0])], steps[1:], change)}
    items = list(value)
    index = int(steps[0])
    items[index] = _item(items[index], steps[1:], change)
    return tuple(items) if isinstance(value, tuple) else items


def with_item(value: Any, new: float, *steps: int | str) -> Any:
    """A sequence of sizes with one of them exchanged."""
    return _item(value, steps, lambda _: new)


def scaled(value: Any, new: int, old: int, *steps: int | str) -> Any:
    """A size, or one of a sequence of sizes, times a ratio."""
    return _item(value, steps, lambda size: size * new // old)


def swapped(value: Any, old: float, new: float, *steps: int | str) -> Any:
    """The new number in place of the old one.

    Raises:
        InputError: The code computes neither: it depends on something that the plan did not see.
    """

    def change(number: Any) -> Any:
        if number in (old, new):
            return new
        raise InputError(
            f"the code computes {number} where it computed {old} in the example call, which "
            f"the smaller model takes for {new}",
            where="a patched module",
            remedy="call it as in the example, or pass such a call as an example, too",
        )

    return _item(value, steps, change)


def not_run(what: str) -> None:
    """Refuse a branch that holds sizes of the dense model.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"{what} is the dense model's, and no example call has run it",
        where="a patched module",
        remedy="shrink with a call that takes this branch as a further example: inputs=[...]",
    )


HELPERS: dict[str, Callable[..., Any]] = {
    "_depcut_with_item": with_item,
    "_depcut_scaled": scaled,
    "_depcut_swapped": swapped,
    "_depcut_not_run": not_run,
}


def _text(expression: str, edit: Edit, level: int) -> str:
    """The text that takes the place of an expression."""
    steps = "".join(f", {step!r}" for step in edit.steps)
    if edit.kind == "set":
        return f"_depcut_with_item({expression}, {edit.new!r}{steps})" if steps else repr(edit.new)
    if edit.kind == "scale":
        if steps:
            return f"_depcut_scaled({expression}, {edit.new!r}, {edit.old!r}{steps})"
        exact = isinstance(edit.new, int) and isinstance(edit.old, int)
        if exact:
            ratio = Fraction(int(edit.new), int(edit.old))
            by = f" * {ratio.numerator}" if ratio.numerator != 1 else ""
            over = f" // {ratio.denominator}" if ratio.denominator != 1 else ""
            return f"(({expression}){by}{over})"
        return f"(({expression}) * {edit.new / edit.old!r})"
    if edit.kind == "swap":
        return f"_depcut_swapped({expression}, {edit.old!r}, {edit.new!r}{steps})"
    if edit.kind == "function":
        if edit.name == "method":
            bound = expression.rpartition(".")[0]
            return f"{patched_name(edit, level)}.__get__({bound})"
        return patched_name(edit, level)
    if edit.kind == "callee":
        return f"{patched_name(edit, level)}({expression})"
    raise ValueError(edit.kind)


def patched_name(edit: Edit, level: int) -> str:
    """The name of a patched function, or of what exchanges it, in the source that calls it."""
    return f"_depcut_{edit.kind}_{level}_{edit.new}"


def level_of(text: str) -> int:
    """How many patches a source has had that gave it such names."""
    levels = re.findall(r"_depcut_(?:function|callee)_(\d+)_\d+", text)
    return 1 + max(map(int, levels), default=-1)


def patched_text(text: str, edits: tuple[Edit, ...]) -> str:
    """The source of a function with its edits.

    Args:
        text: The source.
        edits: None of the expressions stands within another; several may be of one.
    """
    new: dict[Span, str] = {}
    level = level_of(text)
    for edit in sorted(edits):
        if edit.kind == "guard":
            before = text.splitlines()[edit.span[0]].encode()[: edit.span[1]].decode()
            then = "; " if before.strip() else f"\n{before}"
            new[edit.span] = f"_depcut_not_run({edit.name!r}){then}"
        elif edit.kind == "keyword":
            line, column = edit.span[2], edit.span[3] - 1
            head = edited(text, {(line, column, *_end(text)): ""}).rstrip()
            comma = "" if head.endswith(("(", ",")) else ", "
            at = (line, column, line, column)
            new[at] = new.get(at, "") + f"{comma}{edit.name}={edit.new!r}"
        else:
            held = new.get(edit.span, text_at(text, edit.span))
            new[edit.span] = _text(held, edit, level)
    return edited(text, new)


def _end(text: str) -> tuple[int, int]:
    lines = text.splitlines(keepends=True)
    return len(lines) - 1, len(lines[-1].encode())
