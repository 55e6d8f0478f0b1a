"""Counts as people write them."""

from __future__ import annotations


def quantity(number: float) -> str:
    """A count in the unit that keeps it short: 25.6 M, 4.09 G.

    Args:
        number: The count.

    Returns:
        Three digits and a unit.
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{number:g}"
