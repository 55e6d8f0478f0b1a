"""The calls whose time is budgeted together: of what, with what, on how many threads, how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from torch import nn

from depcut.errors import InputError, listed
from depcut.support.checks import LARGEST, THREADS, check_integer, check_number
from depcut.support.failures import shown

_EXAMPLE = '{"one": {"batch_size": 1}, "eight": {"batch_size": 8, "threads": 2}}'
_NOT_RECORDED = ("inputs", "module")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of call.

    Attributes:
        inputs: What is passed: a tensor, a tuple of positional or a dict of keyword arguments; or a
            function of the module that is called which returns them, where they have sizes of the
            model (the cache of a decoder); None: what the model was analysed with.
        module: A function of the model that returns the module to call, where that is not the
            model itself (one step of a decoder, see `depcut.integrations.decoding`).
        batch_size: What the inputs are brought to; None: as they are.
        threads: Threads that one operator may use; None: those of the options.
        times: How often this call is made while the others are made as often as they say.
    """

    inputs: Any = field(default=None, compare=False)
    module: Callable[[nn.Module], nn.Module] | None = None
    batch_size: int | None = None
    threads: int | None = None
    times: float = 1.0

    def record(self) -> dict[str, Any]:
        """What is not the default, as JSON; inputs and modules by their types alone."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _NOT_RECORDED:
            if given[name] is not None:
                given[name] = getattr(given[name], "__qualname__", type(given[name]).__name__)
        return {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}


def settings_of(given: Any) -> dict[str, Setting]:
    """The settings of a workload, checked.

    Args:
        given: By name, a `Setting` or a mapping with some of its attributes.

    Raises:
        InputError: It is something else, or a value is out of its range.
    """
    named = isinstance(given, Mapping) and all(isinstance(n, str) and n for n in given)
    if not named or not given:
        raise InputError(
            f"workload is {shown(given)}",
            where="workload=",
            remedy=f"name the calls that are timed, such as {_EXAMPLE}",
        )
    return {name: _setting(name, one) for name, one in given.items()}


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a recorded workload says all that the workload said.

    Args:
        record: By name, what `Setting.record` returned.
    """
    return not any(name in one for one in record.values() for name in _NOT_RECORDED)


def _setting(name: str, given: Any) -> Setting:
    """One setting, checked."""
    where = f"workload[{name!r}]"
    known = [f.name for f in fields(Setting)]
    if isinstance(given, Setting):
        given = {key: getattr(given, key) for key in known}
    unknown = [key for key in given if key not in known] if isinstance(given, Mapping) else None
    if unknown is None or unknown:
        what = f"it is {shown(given)}" if unknown is None else f"unknown: {listed(unknown)}"
        remedy = f"pass a dict with some of {', '.join(known)}"
        raise InputError(what, where=where, remedy=remedy)
    chosen = dict(given)
    limits = (("batch_size", LARGEST), ("threads", THREADS))
    for key, most in limits:
        if chosen.get(key) is not None:
            chosen[key] = check_integer(chosen[key], f"{where}: {key}", 1, most)
    if "times" in chosen:
        remedy = "pass how often the call is made, more than 0"
        chosen["times"] = check_number(
            chosen["times"], f"{where}: times", remedy, above=0, below=inf
        )
    if chosen.get("module") is not None and not callable(chosen["module"]):
        raise InputError(
            f"module is {shown(chosen['module'])}",
            where=where,
            remedy="pass a function of the model that returns the module to call",
        )
    if chosen.get("module") is not None and chosen.get("inputs") is None:
        raise InputError(
            "a module of its own, but no inputs", where=where, remedy="pass inputs= for the module"
        )
    return Setting(**chosen)
