"""Exceptions and values of other people's code in words, whatever their own text functions do."""

from __future__ import annotations

_LONGEST = 300  # characters of another's text in a message


def reraise_fatal(error: BaseException) -> None:
    """Raise again what no caller should handle: memory that ran out.

    Interrupts and exits are no `Exception` and pass by themselves.

    Args:
        error: What was caught.
    """
    if isinstance(error, MemoryError):
        raise error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its class.

    Args:
        error: The error; it need not be able to say what it is.

    Returns:
        One line.
    """
    kind = type(error).__name__
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception as other:  # noqa: BLE001  (of a class that is not ours)
        return f"{kind}: its message cannot be read ({type(other).__name__})"
    return f"{kind}: {lines[0][:_LONGEST] if lines else 'no message'}"


def shown(value: object) -> str:
    """A value as a message shows it: not too long, whatever its `repr` does.

    Args:
        value: What the user passed.
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (of a class that is not ours, or an integer of 5,000 digits)
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
