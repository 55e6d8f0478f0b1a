"""Patches of source code as JSON: positions, numbers, and a hash of each source."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from depcut.rewrite.edits import Edit, FunctionPatch, Patch

_KINDS = frozenset(("set", "scale", "swap", "keyword", "function", "callee", "guard"))


def patch_data(patch: Patch) -> list[dict[str, Any]]:
    """A patch as plain data.

    Args:
        patch: The patch.
    """
    return [asdict(part) for part in patch]


def patch_of(data: Any) -> Patch:
    """The patch that `patch_data` gave.

    What of it becomes source code is checked: numbers and identifiers alone.

    Args:
        data: Plain data, of a file.

    Raises:
        ValueError: It is something else.
    """
    try:
        return tuple(_part(each, number) for number, each in enumerate(data))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a patch is damaged: {type(error).__name__}: {error}") from error


def _part(data: dict[str, Any], number: int) -> FunctionPatch:
    caller = data["caller"]
    if caller is not None and not (type(caller) is int and 0 <= caller < number):
        raise ValueError("a patched function is called by none before it")
    texts = [data["name"], data["qualname"], data["digest"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a patched function has no name")
    edits = tuple(_edit(each) for each in data["edits"])
    return FunctionPatch(texts[0], caller, texts[1], texts[2], edits)


def _edit(data: dict[str, Any]) -> Edit:
    span, kind, name = tuple(data["span"]), data["kind"], data["name"]
    steps, numbers = tuple(data["steps"]), (data["new"], data["old"])
    sound = (
        len(span) == 4
        and all(type(n) is int and n >= 0 for n in span)
        and kind in _KINDS
        and isinstance(name, str)
        and all(type(step) in (int, str) for step in steps)
        and all(type(n) in (int, float) for n in numbers)
        and (kind != "keyword" or name.isidentifier())
    )
    if not sound:
        raise ValueError(f"an edit of the source is damaged: {str(data)[:100]}")
    return Edit(span, kind, *numbers, steps, name)
