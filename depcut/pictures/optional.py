"""Libraries that only pictures need: a clear word where one is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from depcut.errors import InputError


@contextmanager
def needs(library: str, what: str) -> Iterator[None]:
    """An import that the user may have to install something for.

    Args:
        library: Its name, also that of its distribution.
        what: What needs it.

    Raises:
        InputError: It is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{library} cannot be imported: {error}",
            where=what,
            remedy=f"pip install {library}, or pip install 'depcut[plot]'",
        ) from error
