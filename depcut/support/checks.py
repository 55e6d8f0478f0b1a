"""Checks of numbers that a user passes: their kind and range; errors name the argument."""

from __future__ import annotations

import math
import operator
from numbers import Real

from depcut.errors import InputError


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
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(
            what or f"{name} is {value!r}",
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
    if isinstance(value, bool) or not isinstance(value, Real):
        fits = False
    else:
        fits = above < float(value) < below and least <= float(value) <= most
    if not fits:
        raise InputError(what or f"{name} is {value!r}", where=where or f"{name}=", remedy=remedy)
    return float(value)  # type: ignore[arg-type]
