"""Amounts of memory: as a user writes them, and what the machine has free."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from depcut.errors import InputError
from depcut.support.checks import LARGEST, check_integer
from depcut.support.failures import shown

_UNITS = {"": 1, "k": 1000, "ki": 1024}
_UNITS |= {f"{u}{i}": (1024 if i else 1000) ** n for n, u in enumerate("mgt", 2) for i in ("", "i")}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_REMEDY = 'pass an amount such as "4GiB" or "500MB", a number of bytes, or None'
_SHARE = 2  # a budget that is not given is what is free, divided by it
_UNKNOWN = 4 << 30  # bytes free where the system does not say
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(value: object) -> int | None:
    """An amount of memory in bytes; None where it is left to the machine.

    Args:
        value: What the user passed: bytes, or a text with a unit (kB, MB, GB, TB, KiB, MiB...).

    Raises:
        InputError: It is something else.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        return check_integer(value, "memory", 1, LARGEST, remedy=_REMEDY)
    found = _WRITTEN.fullmatch(value)
    unit = found[2].lower() if found else ""
    nbytes = float(found[1]) * _UNITS[unit] if found and unit in _UNITS else 0.0
    if not 1 <= nbytes <= LARGEST:
        raise InputError(f"memory is {shown(value)}", where="memory=", remedy=_REMEDY)
    return int(nbytes)


def budget(nbytes: int | None) -> int:
    """The bytes that may be taken: as given, else half of what is free."""
    return free_memory() // _SHARE if nbytes is None else nbytes


def free_memory() -> int:
    """Bytes that the process can take: of the machine, or what its control group leaves."""
    free = [_UNKNOWN]
    with contextlib.suppress(OSError, ValueError):
        pages = {*os.sysconf_names} & {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"}
        free = (
            [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if len(pages) > 1 else free
        )
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = [int(line.split()[1]) * 1024]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most, taken = (
                int((_CGROUP / name).read_text(encoding="ascii")) for name in (limit, used)
            )
            free.append(most - taken + _reclaimable())
    return max(min(free), 1)


def _reclaimable() -> int:
    """Bytes of cached files in the process's control group, which it gives up when asked."""
    with contextlib.suppress(OSError, ValueError):
        for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0
