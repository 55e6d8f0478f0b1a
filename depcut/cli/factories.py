"""What the command line names by an import path, and the calls that it writes there."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from depcut.errors import InputError
from depcut.support.failures import first_line, reraise_fatal, shown


@dataclass(frozen=True)
class Named:
    """A name with the arguments of a call, as in `package.module:factory(10, pretrained=True)`.

    Attributes:
        name: What stands before the parentheses.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(text: str) -> Named:
        """Read a name and its arguments, which are Python's literals; nothing is evaluated.

        Args:
            text: As the user wrote it; without parentheses, there are no arguments.

        Raises:
            InputError: The arguments are no literals.
        """
        name, opened, rest = text.partition("(")
        if not opened:
            return Named(text)
        try:
            # The name may be none of Python's ("convnext-tiny"), its arguments are.
            call = ast.parse(f"f({rest.strip()}", mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                raise ValueError("it is no single call")
            args = tuple(ast.literal_eval(value) for value in call.args)
            kwargs = {}
            for given in call.keywords:
                if given.arg is None:
                    raise ValueError("**")
                kwargs[given.arg] = ast.literal_eval(given.value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise InputError(
                f"cannot read the arguments of {shown(text)}",
                where=name,
                remedy='write literals, as in package.module:factory(10, kind="small")',
            ) from error
        return Named(name.rstrip(), args, kwargs)


def called(target: str, what: str) -> Any:
    """What the factory at an import path returns.

    Args:
        target: `package.module:factory`, a function, a class or an attribute path such as
            `models:Net.tiny`, with arguments in parentheses if there are any. Modules in the
            current folder are found.
        what: What it makes, for messages.

    Raises:
        InputError: The path cannot be imported, or the factory fails.
    """
    named = Named.read(target)
    return guarded(
        lambda: _imported(named.name)(*named.args, **named.kwargs),
        target,
        what,
        "the factory must be importable from here and take these arguments",
    )


def guarded(make: Callable[[], Any], target: str, what: str, remedy: str) -> Any:
    """The result of other people's code, whose exceptions become an error that names it.

    Args:
        make: Runs it.
        target: What the user wrote.
        what: What it makes, for messages.
        remedy: What to do if it fails.

    Raises:
        InputError: It failed.
    """
    try:
        return make()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a module may be a script that ends the process
        reraise_fatal(error)
        raise InputError(
            f"cannot build {what}: {first_line(error)}", where=target, remedy=remedy
        ) from error


def import_function(target: str) -> Callable[..., Any]:
    """Import a function by `package.module:name`, e.g. torch.nn.functional:cross_entropy.

    Args:
        target: The import path.

    Raises:
        InputError: The path cannot be imported, or its object cannot be called.
    """
    try:
        function = _imported(target)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        reraise_fatal(error)
        raise InputError(
            f"cannot import it: {first_line(error)}",
            where=target,
            remedy="write package.module:function, e.g. torch.nn.functional:cross_entropy",
        ) from error
    if not callable(function):
        raise InputError(
            f"a {type(function).__name__} cannot be called", where=target, remedy="name a function"
        )
    return function  # type: ignore[no-any-return]


def _imported(target: str) -> Any:
    module_name, _, attributes = target.partition(":")
    if not module_name or not attributes:
        raise InputError(
            f"{target!r} is no import path", remedy="write package.module:factory, e.g. models:net"
        )
    if os.getcwd() not in sys.path:  # noqa: PTH109  (sys.path holds strings)
        # A console script's path starts at its own folder, not at the user's.
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    value: Any = importlib.import_module(module_name)
    for name in attributes.split("."):
        value = getattr(value, name)
    return value
