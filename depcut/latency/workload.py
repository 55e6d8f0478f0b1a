"""The calls whose time is budgeted, each with its model of time, measured one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone
from depcut.capture.eager import refuse_failing_call
from depcut.capture.random_state import preserved
from depcut.deploy.runtime import bind_inputs, resized
from depcut.errors import InputError, in_part
from depcut.latency.measure import Bench, Beside, Call, called, settled
from depcut.latency.model import LatencyModel
from depcut.options import Options
from depcut.plan.cost import Cost
from depcut.plan.workload import Setting
from depcut.support.failures import first_line, reraise_fatal


@dataclass(frozen=True, eq=False)
class Timed:
    """One kind of call and its model of time.

    Attributes:
        name: Of the setting; "" where there is no workload.
        inputs: What is passed, or a function of the model, see `depcut.latency.measure.Call`.
        times: How often it is made.
        model: Its time as a function of the kept counts.
    """

    name: str
    inputs: Any
    times: float
    model: LatencyModel


@dataclass(frozen=True, eq=False)
class Workload:
    """The calls whose times are summed.

    Attributes:
        calls: At least one.
        progress: Whether to say on standard error what is being measured.
    """

    calls: tuple[Timed, ...]
    progress: bool = True

    @property
    def cost(self) -> Cost:
        """Seconds of all calls together, as a function of the kept counts."""
        return reduce(Cost.plus, [call.model.cost.scaled(call.times) for call in self.calls])

    @property
    def dense_seconds(self) -> float:
        """What the dense model took for all of them when they were modelled."""
        return sum(call.times * call.model.dense_seconds for call in self.calls)


@dataclass(frozen=True)
class Together(Beside):
    """All calls of a workload, see `Beside`: the sums of their times.

    Attributes:
        parts: Of each call: its name, how often it is made and what was measured.
    """

    parts: tuple[tuple[Timed, Beside], ...]


class Benches:
    """The dense model in each setting of a workload, to be run beside smaller ones.

    Args:
        model: The dense model.
        workload: What is timed.
        folder: For files; it outlives the benches.
    """

    def __init__(self, model: nn.Module, workload: Workload, folder: Path) -> None:
        self._workload, self._benches = workload, []
        for number, call in enumerate(workload.calls):
            own = folder / str(number)
            own.mkdir()
            with settled(call.model.engine, call.model.threads):
                bench = Bench(
                    model, call.inputs, call.model.threads, own, runtime=call.model.engine
                )
            self._benches.append(bench)

    def beside(self, model: nn.Module | None, rounds: int) -> Together:
        """Time a model in turns with the dense one, setting by setting.

        Args:
            model: A smaller model; None: the dense one.
            rounds: Turns of each in each setting.
        """
        parts = []
        for call, bench in zip(self._workload.calls, self._benches, strict=True):
            with settled(call.model.engine, call.model.threads):
                runner = bench.dense if model is None else bench.written(model)
                parts.append((call, bench.beside(runner, rounds)))
        dense = sum(call.times * beside.dense_seconds for call, beside in parts)
        slim = sum(call.times * beside.ratio * beside.dense_seconds for call, beside in parts)
        return Together(slim / dense, dense, tuple(parts))


def workload(
    options: Options, model: nn.Module, inputs: Any, model_of_time: Callable[..., LatencyModel]
) -> Workload:
    """The calls that the options name, or the one of the inputs, each with its model of time.

    Args:
        options: What was chosen.
        model: The dense model; it is only read.
        inputs: What is passed where a setting says nothing else.
        model_of_time: Measures the time of one setting, see `Analysis.latency`.

    Raises:
        DepcutError: A setting cannot be called or measured; the message names it.
    """
    settings: dict[str, Setting] = dict(options.workload or {"": Setting()})
    passed = {name: _inputs(name, setting, inputs) for name, setting in settings.items()}
    for name in filter(None, settings):  # all of them before the first is measured
        with in_part(_where(name)):
            module, given = called(model, passed[name])
            bound = bind_inputs(module, given)
            refuse_failing_call(module, (_where(name), bound.args, bound.kwargs))
    calls = []
    for name, setting in settings.items():
        own = {"inputs": passed[name]} if name else {}
        with in_part(name and _where(name)):
            times = model_of_time(
                runtime=options.runtime,
                threads=setting.threads or options.threads,
                progress=options.progress,
                **own,
            )
        calls.append(Timed(name, passed[name], setting.times, times))
    return Workload(tuple(calls), options.progress)


def recorded(parts: Sequence[tuple[Timed, Beside]]) -> dict[str, dict[str, Any]]:
    """What was measured of each call, as a plan records it.

    Args:
        parts: Of what was measured, see `Together`.
    """
    return {
        call.name: {
            "times": call.times,
            "threads": call.model.threads,
            "dense_ms": 1e3 * beside.dense_seconds,
            "measured_ms": 1e3 * beside.ratio * beside.dense_seconds,
        }
        for call, beside in parts
    }


def _inputs(name: str, setting: Setting, otherwise: Any) -> Any:
    """What is passed in a setting: as it was given where that needs no model, else a function."""
    given = otherwise if setting.inputs is None else setting.inputs
    if setting.module is None and setting.batch_size is None and not callable(given):
        return given
    return _call(name, setting, given)


def _call(name: str, setting: Setting, given: Any) -> Call:
    """A function of the model that returns the module that a setting calls and what it passes."""

    @preserved()
    def call(model: nn.Module) -> tuple[nn.Module, Any]:
        try:
            module = clone(model, buffers=True)
            with torch.no_grad():
                module = module if setting.module is None else setting.module(module)
                inputs = given(module) if callable(given) else given
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"what makes its module and inputs fails: {first_line(error)}",
                where=_where(name),
                remedy="it is called with the dense model and with smaller ones of the same class",
            ) from error
        if not isinstance(module, nn.Module):
            raise InputError(
                f"its module is a {type(module).__name__}",
                where=_where(name),
                remedy="return the nn.Module that is called",
            )
        if setting.batch_size is None:
            return module, inputs
        bound = resized(bind_inputs(module, inputs), setting.batch_size)
        return module, dict(bound.arguments) if bound.kwargs else tuple(bound.args)

    return call


def _where(name: str) -> str:
    return f"workload[{name!r}]"
