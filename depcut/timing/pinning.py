"""Keeping a measurement on chosen processors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from depcut.errors import InputError, listed
from depcut.support.checks import check_integer, check_items
from depcut.support.failures import shown

_TASKS = Path("/proc/self/task")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@contextlib.contextmanager
def pinned(pin: bool | Sequence[int], threads: int) -> Iterator[tuple[int, ...]]:
    """Keep all threads of this process on some processors, and let them go afterwards.

    Threads and processes that start meanwhile inherit the choice; those that are still there at
    the end are let go too.

    Args:
        pin: The processors' numbers; True picks as many as there are threads, on separate cores
            where there are enough; False leaves everything as it is.
        threads: Threads that will be busy.

    Yields:
        The processors, in order; none of them when nothing is pinned.

    Raises:
        InputError: The system cannot pin, or has no such processors.
    """
    if pin is False:
        yield ()
        return
    if not isinstance(pin, bool | int):
        remedy = "pass True, or numbers of CPUs such as (0, 1)"
        pin = tuple(
            check_integer(cpu, "pin", 0, remedy=remedy) for cpu in check_items(pin, "pin", remedy)
        )
    if not hasattr(os, "sched_setaffinity"):
        raise InputError(
            "this system cannot pin a process to processors",
            where="pin",
            remedy="leave pin out, or measure on Linux",
        )
    own = os.sched_getaffinity(0)
    cpus = _choice(pin, threads, sorted(own))
    before = {}
    for task in _tasks():
        with contextlib.suppress(ProcessLookupError):
            before[task] = os.sched_getaffinity(task)
    try:
        _move({task: set(cpus) for task in before})
        yield cpus
    finally:
        _move({task: before.get(task, own) for task in _tasks()})


def _choice(pin: bool | Sequence[int], threads: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """The processors to use; of those allowed, the last ones, as the first serve the interrupts."""
    if pin is True:
        picked: list[int] = []
        for cpu in reversed(allowed):
            if not _siblings(cpu) & set(picked):
                picked.append(cpu)
        picked += [cpu for cpu in reversed(allowed) if cpu not in picked]
        chosen = picked[:threads]
    elif isinstance(pin, int):
        raise InputError(
            f"pin={shown(pin)} is one number", where="pin", remedy="pass a tuple of them"
        )
    else:
        chosen = list(pin)
    absent = sorted(set(chosen) - set(allowed))
    if absent:
        raise InputError(
            f"this process may not run on CPU {listed([str(cpu) for cpu in absent])}",
            where="pin",
            remedy=f"choose from {', '.join(map(str, allowed))}",
        )
    if len(set(chosen)) < threads:
        raise InputError(
            f"{threads} threads on {len(set(chosen))} CPUs would wait for each other",
            where="pin",
            remedy="pin to as many CPUs as there are threads, or use fewer threads",
        )
    return tuple(sorted(set(chosen)))


def _siblings(cpu: int) -> set[int]:
    """The processors that share this one's core, itself included."""
    siblings = {cpu}
    with contextlib.suppress(OSError, ValueError):
        for part in Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii").strip().split(","):
            first, _, last = part.partition("-")
            siblings |= set(range(int(first), int(last or first) + 1))
    return siblings


def _tasks() -> list[int]:
    """The threads of this process, as the system numbers them."""
    with contextlib.suppress(OSError):
        return [int(task.name) for task in _TASKS.iterdir()]
    return [threading.get_native_id()]


def _move(places: dict[int, set[int]]) -> None:
    """Let each thread run on its processors; one that has ended meanwhile needs none."""
    for task, cpus in places.items():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(task, cpus)
