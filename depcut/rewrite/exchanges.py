"""What a patched line calls: numbers exchanged in what an expression gives, at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from depcut.errors import InputError

Steps = tuple[int | str, ...]


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
    "_depcut_not_run": not_run,
    "_depcut_with_item": with_item,
    "_depcut_scaled": scaled,
    "_depcut_swapped": swapped,
}
