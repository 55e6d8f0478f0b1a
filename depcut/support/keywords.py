"""Options that are given as flat keywords or as one frozen object, from one definition."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, replace
from typing import Any, TypeVar

from depcut.errors import InputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_DOC = "doc"
_WIDTH = 96
# What options were called before, for those who meet an error.
_RENAMED = {"keep": "ignore"}


def option(default: Any, doc: str) -> Any:
    """A field of an options class.

    Args:
        default: Its value where nothing is given; immutable.
        doc: What it means, for docstrings and the command line.
    """
    return field(default=default, metadata={_DOC: doc})


def doc_of(kind: type[Any], name: str) -> str:
    """What an option means.

    Args:
        kind: The options class.
        name: The field.
    """
    return str(_field(kind, name).metadata[_DOC])


def default_of(kind: type[Any], name: str) -> Any:
    """The value of an option where nothing is given.

    Args:
        kind: The options class.
        name: The field.
    """
    return _field(kind, name).default


def _field(kind: type[Any], name: str) -> Field[Any]:
    return next(f for f in fields(kind) if f.name == name)


def names_of(kind: type[Any], keywords: Any) -> list[str]:
    """The options that a function takes, in the order of their definition.

    Args:
        kind: The options class.
        keywords: The TypedDict of the function's flat keywords.
    """
    return [f.name for f in fields(kind) if f.name in keywords.__annotations__]


def settled(
    kind: type[T],
    options: T | None,
    given: Mapping[str, Any],
    keywords: Any,
    where: str,
    *,
    one_stage: bool = False,
) -> T:
    """The options of a call: flat keywords on top of the object, if there is one.

    Args:
        kind: The options class.
        options: What the user passed as options=.
        given: The flat keywords.
        keywords: The TypedDict of what the function takes.
        where: The function, for messages.
        one_stage: The function is one stage of a longer work: an object may carry options of the
            other stages.

    Raises:
        InputError: A keyword is unknown, or the object holds something that has no effect here.
    """
    takes = names_of(kind, keywords)
    for name in given:
        if name not in takes:
            raise InputError(
                f"{where} takes no option {name!r}", where=f"{name}=", remedy=_meant(name, takes)
            )
    if options is None:
        return kind(**given)
    if not isinstance(options, kind):
        raise InputError(
            f"options is a {type(options).__name__}, not a depcut.{kind.__name__}",
            where="options=",
            remedy=f"pass depcut.{kind.__name__}(...), or the options as keywords",
        )
    for f in fields(kind):  # type: ignore[arg-type]  # a dataclass, as option() is for
        if not one_stage and f.name not in takes and getattr(options, f.name) != f.default:
            raise InputError(
                f"{where} has no use for {f.name}={getattr(options, f.name)!r}",
                where="options=",
                remedy=f"leave {f.name} out of the options",
            )
    return replace(options, **given)  # type: ignore[type-var]


def _meant(name: str, takes: list[str]) -> str:
    if _RENAMED.get(name) in takes:
        return f"{name}= is called {_RENAMED[name]}="
    close = difflib.get_close_matches(name, takes, 1, 0.6)
    return f"did you mean {close[0]}=?" if close else f"it takes {', '.join(takes)}"


def takes_options(kind: type[Any], keywords: Any) -> Callable[[F], F]:
    """Show the options in the signature and the docstring of a function or class.

    The docstring's line on the flat keywords (`**given: ...`) gives way to a line an option.

    Args:
        kind: The options class.
        keywords: The TypedDict of what the function takes.
    """
    names = names_of(kind, keywords)

    def decorate(target: F) -> F:
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default_of(kind, name),
                annotation=getattr(
                    annotation := keywords.__annotations__[name], "__forward_arg__", annotation
                ),
            )
            for name in names
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])
        target.__doc__ = _documented(target.__doc__ or "", kind, names)
        return target

    return decorate


def _documented(text: str, kind: type[Any], names: list[str]) -> str:
    """A docstring with a line an option in place of that on the flat keywords."""
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.lstrip().startswith("**given:")]
    if not at:  # python -OO has no docstrings
        return text
    indent = lines[at[0]][: -len(lines[at[0]].lstrip())]
    end = at[0] + 1
    while end < len(lines) and lines[end].startswith(indent + " "):
        end += 1
    entries: list[str] = []
    for name in names:
        default = default_of(kind, name)
        shown = "" if default is MISSING or default is None else f" Default: {default!r}."
        entries += textwrap.wrap(
            f"{name}: {doc_of(kind, name)}{shown}",
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
        )
    return "\n".join([*lines[: at[0]], *entries, *lines[end:]])
