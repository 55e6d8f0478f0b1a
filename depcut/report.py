"""Dense beside slim: parameters, bytes, MACs and the time they really take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from depcut.cost import count_macs, count_params
from depcut.latency import BenchResult, Runtime, Speedup, Timing, bench
from depcut.tables import rendered


@dataclass(frozen=True)
class Figures:
    """What one model costs.

    Attributes:
        params: Number of parameters, shared ones counted once.
        bytes: Memory of parameters and buffers, shared ones counted once.
        macs: Multiply-accumulates of one example.
        latency: Measured time of one call, if it was measured.
    """

    params: int
    bytes: int
    macs: int
    latency: Timing | None = None


@dataclass(frozen=True)
class Comparison:
    """A dense model beside its slim version.

    Attributes:
        dense: What the dense model costs.
        slim: What the slim one costs.
        speedup: Measured speedup with its interval, if it was measured.
        conditions: What the measurement holds for, or an empty string.
    """

    dense: Figures
    slim: Figures
    speedup: Speedup | None = None
    conditions: str = ""

    @property
    def params_kept(self) -> float:
        """Share of the parameters that the slim model has."""
        return _share(self.slim.params, self.dense.params)

    @property
    def macs_kept(self) -> float:
        """Share of the MACs that the slim model needs."""
        return _share(self.slim.macs, self.dense.macs)

    @property
    def realised(self) -> float | None:
        """Measured speedup as a share of the ratio of MACs: 1.0 is all that theory promises."""
        return None if self.speedup is None else self.speedup.ratio * self.macs_kept

    def __rich__(self) -> Table:
        table = Table(caption=self.conditions or None)
        for column in ("", "dense", "slim", "slim / dense"):
            table.add_column(column, justify="right" if column else "left")
        for label, dense, slim in (
            ("parameters", self.dense.params, self.slim.params),
            ("bytes", self.dense.bytes, self.slim.bytes),
            ("MACs per example", self.dense.macs, self.slim.macs),
        ):
            table.add_row(label, quantity(dense), quantity(slim), f"{_share(slim, dense):.1%}")
        if self.speedup and self.dense.latency and self.slim.latency:
            table.add_row(
                "latency", str(self.dense.latency), str(self.slim.latency), str(self.speedup)
            )
        return table

    def __str__(self) -> str:
        return rendered(self)


def compare(
    dense: nn.Module,
    slim: nn.Module,
    inputs: Any = None,
    *,
    runtime: Runtime | None = "onnxruntime",
    threads: int = 1,
    rounds: int = 30,
) -> Comparison:
    """Measure what was won by going from `dense` to `slim`.

    Args:
        dense: The model before.
        slim: The model after; it takes the same inputs.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; inferred from the
            first layer when left out.
        runtime: What to time both in, see `bench`; None measures no time.
        threads: Threads that one operator may use.
        rounds: Turns that both have.

    Returns:
        The figures of both models.

    Raises:
        ExportError: A model cannot be exported to the runtime.
        InputError: The inputs do not fit, or an argument is out of its range.
    """
    timed: BenchResult | None = None
    if runtime is not None:
        timed = bench(
            {"dense": dense, "slim": slim}, inputs, runtime=runtime, threads=threads, rounds=rounds
        )
    return Comparison(
        dense=_figures(dense, inputs, timed.timings["dense"] if timed else None),
        slim=_figures(slim, inputs, timed.timings["slim"] if timed else None),
        speedup=timed.speedup("dense", "slim") if timed else None,
        conditions=timed.conditions if timed else "",
    )


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


def _figures(model: nn.Module, inputs: Any, latency: Timing | None) -> Figures:
    """Count what a model holds and does."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Figures(
        params=count_params(model),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        macs=count_macs(model, inputs),
        latency=latency,
    )


def _share(part: float, whole: float) -> float:
    """Part / whole, where nothing of nothing is all of it."""
    return part / whole if whole else 1.0
