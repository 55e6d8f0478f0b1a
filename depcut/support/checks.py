"""Checks of what a user passes: its kind and range; errors name the argument."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, cast

from depcut.errors import DepcutError, InputError
from depcut.support.failures import first_line, reraise_fatal, shown

KindT = TypeVar("KindT")

LARGEST = 2**63 - 1  # of a seed that torch takes, and of a step
THREADS = 1024  # more than any machine has that one operator could use


def check_integer(
    value: object,
    name: str,
    least: int,
    most: float = math.inf,
    *,
    what: str | None = None,
    where: str | None = None,
    remedy: str | None = None,
) -> int:
    """Check an integer and return it as Python's own; NumPy's count as integers, booleans do not.

    Args:
        value: What the user passed.
        name: Name of the argument.
        least: The smallest value allowed.
        most: The largest.
        what: The mistake, for messages; by default that the argument is the value.
        where: Where it was passed; by default as the argument.
        remedy: What to pass; by default an integer of the range.

    Raises:
        InputError: It is something else.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(cast(int, value))
    except Exception as error:  # noqa: BLE001  (of a class that is not ours)
        reraise_fatal(error)
        number = None
    if number is None or not least <= number <= most:
        span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(
            what or f"{name} is {shown(value)}",
            where=where or f"{name}=",
            remedy=remedy or f"pass an integer {span}",
        )
    return number


def check_number(
    value: object,
    name: str,
    remedy: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    what: str | None = None,
    where: str | None = None,
) -> float:
    """Check that a value is a finite number; NumPy's count, booleans and tensors do not.

    Args:
        value: What the user passed.
        name: Name of the argument.
        remedy: What to pass.
        above: What it must exceed.
        least: The smallest value allowed.
        most: The largest.
        below: What it must stay below.
        what: The mistake, for messages; by default that the argument is the value.
        where: Where it was passed; by default as the argument.

    Raises:
        InputError: It is something else.
    """
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:  # an integer or a fraction beyond the largest float
            number = math.nan
    if not (above < number < below and least <= number <= most):
        what = what or f"{name} is {shown(value)}"
        raise InputError(what, where=where or f"{name}=", remedy=remedy)
    return number


def check_flag(value: object, name: str) -> bool:
    """Check that a value is True or False, and return it.

    Args:
        value: What the user passed.
        name: Name of the argument.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}", where=f"{name}=", remedy="pass True or False")
    return value


def check_kind(
    value: object,
    kind: type[KindT],
    name: str,
    remedy: str,
    error: type[DepcutError] = InputError,
) -> KindT:
    """Check that a value is an instance of a class, and return it.

    Args:
        value: What the user passed.
        kind: The class.
        name: Name of the argument.
        remedy: What to pass.
        error: What to raise.

    Raises:
        InputError: It is something else; as `error`.
    """
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else _kind(value)
        raise error(f"{name} is {got}, not a {kind.__name__}", where=f"{name}=", remedy=remedy)
    return value


def check_function(value: Any, name: str, remedy: str) -> Callable[..., Any]:
    """Check that a value can be called, and return it.

    Args:
        value: What the user passed.
        name: Name of the argument.
        remedy: What to pass.

    Raises:
        InputError: It cannot.
    """
    if not callable(value):
        raise InputError(
            f"{name} is {_kind(value)}, not a function", where=f"{name}=", remedy=remedy
        )
    function: Callable[..., Any] = value
    return function


def check_names(value: Any, name: str, remedy: str) -> tuple[str, ...]:
    """Check names or globs, one or several, and return them as a tuple.

    Args:
        value: What the user passed; what can be read only once is read here.
        name: Name of the argument.
        remedy: What to pass.

    Raises:
        InputError: It is something else.
    """
    names: tuple[Any, ...] = (None,)
    if isinstance(value, str):
        names = (value,)
    elif isinstance(value, Iterable) and type(value) is not dict:
        names = check_items(value, name, remedy)
    if not all(isinstance(each, str) for each in names):
        raise InputError(f"{name} is {shown(value)}", where=f"{name}=", remedy=remedy)
    return names


def check_items(value: Any, name: str, remedy: str) -> tuple[Any, ...]:
    """The items of an iterable, which is read here.

    Args:
        value: What the user passed.
        name: Name of the argument.
        remedy: What to pass.

    Raises:
        InputError: It is no iterable, or raises while it is read.
    """
    try:
        return tuple(value)
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"{name} cannot be read: {first_line(error)}", where=f"{name}=", remedy=remedy
        ) from error


def check_path(value: Any, name: str, error: type[DepcutError] = InputError) -> Path:
    """Check the path of a file or folder, and return it as pathlib's.

    Args:
        value: What the user passed.
        name: Name of the argument.
        error: What to raise.

    Raises:
        InputError: No file system has such a path; as `error`.
    """
    text = value if isinstance(value, str) else None
    if isinstance(value, os.PathLike):
        try:
            text = os.fspath(value)
        except Exception as problem:  # noqa: BLE001  (of a class that is not ours)
            reraise_fatal(problem)
    try:
        fits = isinstance(text, str) and text != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise error(
            f"{name} is {shown(value)}", where=f"{name}=", remedy="pass a path, as str or Path"
        )
    return Path(str(text))


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
