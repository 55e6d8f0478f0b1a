"""Amounts of memory as people write them: "4GiB"."""

from __future__ import annotations

import os
import re
from pathlib import Path

from depcut.errors import InputError
from depcut.support.failures import shown

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_REMEDY = 'pass a number of bytes, or text such as "4GiB" or "500MB"'


def bytes_of(amount: int | str, name: str = "memory") -> int:
    """A number of bytes.

    Args:
        amount: The number, or text with a unit: "2GiB".
        name: Of the argument.

    Raises:
        InputError: It is something else, or not more than 0.
    """
    found = None
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if match and match[2].lower() in units:
            found = int(float(match[1]) * units[match[2].lower()])
    elif isinstance(amount, int) and not isinstance(amount, bool):
        found = amount
    if found is None or found <= 0:
        raise InputError(f"{name} is {shown(amount)}", where=f"{name}=", remedy=_REMEDY)
    return found


def free_memory() -> int | None:
    """Bytes that this machine has free, caches counted as free; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        told = dict(line.split(":", 1) for line in lines)
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def written(amount: int) -> str:
    """A number of bytes as people write it: "3.25 GiB".

    Args:
        amount: The number.
    """
    size = float(amount)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
