"""Dense beside slim: parameters, bytes, MACs and measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from depcut.capture.plain import check_whole
from depcut.errors import InputError
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary, Table
from depcut.plan.cost import count_macs, count_params
from depcut.support.failures import shown
from depcut.support.quantities import quantity
from depcut.support.tables import rendered
from depcut.timing.bench import bench, check_timing
from depcut.timing.clock import Speedup, Timing
from depcut.timing.measurements import Measurement, byte_size, rate, timing_bar

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_COLUMNS = ("", "dense", "slim", "slim / dense")


@dataclass(frozen=True)
class Figures:
    """What one model costs.

    Attributes:
        params: Number of parameters, shared ones counted once.
        bytes: Memory of parameters and buffers, shared ones counted once.
        macs: Multiply-accumulates of one example.
        latency: Measured time of one call, if it was measured.
        throughput: Examples per second at that batch size, if it was measured.
        peak_memory: Bytes that loading and running it take, if that was measured.
        file_bytes: Size of its ONNX file, if it was timed from one.
    """

    params: int
    bytes: int
    macs: int
    latency: Timing | None = None
    throughput: float | None = None
    peak_memory: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """A dense model beside its slim version.

    Attributes:
        dense: What the dense model costs.
        slim: What the slim one costs.
        speedup: Measured speedup with its interval, if it was measured.
        conditions: What the measurement holds for, or an empty string.
        batch_size: Examples in one call that was timed.
    """

    dense: Figures
    slim: Figures
    speedup: Speedup | None = None
    conditions: str = ""
    batch_size: int | None = None

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
        """Measured speedup as a share of the ratio of MACs; 1.0: time fell as much as MACs did."""
        return None if self.speedup is None else self.speedup.ratio * self.macs_kept

    def cells(self) -> list[tuple[str, str, str, str]]:
        """What is compared, row by row: what it is, dense, slim, and what is left."""
        rows = [
            (label, quantity(dense), quantity(slim), f"{_share(slim, dense):.1%}")
            for label, dense, slim in (
                ("parameters", self.dense.params, self.slim.params),
                ("bytes", self.dense.bytes, self.slim.bytes),
                ("MACs per example", self.dense.macs, self.slim.macs),
            )
        ]
        if self.speedup and self.dense.latency and self.slim.latency:
            label = f"latency, batch {self.batch_size}"
            times = str(self.dense.latency), str(self.slim.latency)
            rows.append((label, *times, str(self.speedup)))
        if self.dense.throughput and self.slim.throughput:
            # The line above says what may be claimed of the ratio.
            rates = rate(self.dense.throughput), rate(self.slim.throughput)
            rows.append(("examples/s", *rates, ""))
        for label, before, after in (
            ("file", self.dense.file_bytes, self.slim.file_bytes),
            ("peak memory", self.dense.peak_memory, self.slim.peak_memory),
        ):
            if before is not None and after is not None:
                share = f"{_share(after, before):.1%}"
                rows.append((label, byte_size(before), byte_size(after), share))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The figures of both models as plain data."""
        verdict = self.speedup.verdict if self.speedup else None
        kept = {"params_kept": self.params_kept, "macs_kept": self.macs_kept}
        return {**asdict(self), **kept, "realised": self.realised, "verdict": verdict}

    def rows(self) -> list[dict[str, Any]]:
        """A row for the dense and one for the slim model."""
        return [figures_row("dense", self.dense), figures_row("slim", self.slim)]

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        both = {"dense": self.dense.latency, "slim": self.slim.latency}
        speedup = self.speedup
        return {
            "measured": {
                "title": "dense beside slim",
                "headline": f"{speedup.ratio:.2f}×" if speedup else "",
                "verdict": f"{speedup.low:.2f} to {speedup.high:.2f}, {speedup.verdict}"
                if speedup
                else "",
                "columns": _COLUMNS,
                "rows": self.cells(),
                "bars": [timing_bar(name, timing) for name, timing in both.items() if timing],
                "conditions": self.conditions,
            }
        }

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        speedup = f", {self.speedup}" if self.speedup else ""
        return (
            f"Comparison: {self.macs_kept:.1%} of the MACs and {self.params_kept:.1%} of the "
            f"parameters left{speedup}"
        )

    def summary(self) -> Summary:
        """What notebooks show."""
        notes = tuple(self.conditions.splitlines())
        return Summary("Comparison", {}, (Table(_COLUMNS, self.cells()),), notes)

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable

        table = RichTable(caption=self.conditions or None)
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        for cells in self.cells():
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        return rendered(self)


def compare(
    dense: nn.Module,
    slim: nn.Module,
    inputs: Any = None,
    *,
    runtime: str | None = "onnxruntime",
    provider: str | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    pin: bool | Sequence[int] = False,
    memory: bool = False,
    rounds: int = 30,
    warmup: int = 5,
) -> Comparison:
    """Compare a dense model with its slim version: parameters, bytes, MACs, time, memory.

    Args:
        dense: The model before.
        slim: The model after; it takes the same inputs.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; inferred from the
            first layer when left out.
        runtime: What to time both in, see `bench`; None measures no time.
        provider: What computes there, see `bench`.
        batch_size: Batch size to time at; that of the inputs when left out.
        threads: Threads that one operator may use.
        pin: Processors to stay on while timing, or True to have them chosen.
        memory: Measure peak memory too, see `bench`.
        rounds: Turns that both have.
        warmup: Calls of each that are not counted.

    Returns:
        The figures of both models.

    Raises:
        ExportError: A model cannot be exported to the runtime.
        InputError: The inputs do not fit, an argument is out of its range, or the provider is
            absent.
    """
    dense, slim = check_whole(dense, "dense"), check_whole(slim, "slim")
    if runtime is None:
        check_timing(threads, rounds, warmup, None, memory)
        idle: dict[str, tuple[Any, bool | None]] = {
            "provider": (provider, None),
            "batch_size": (batch_size, None),
            "pin": (pin, False),
            "memory": (memory, False),
        }
        for name, (value, default) in idle.items():
            if value is not default:
                raise InputError(
                    f"{name} is {shown(value)}, and nothing is timed: runtime is None",
                    where=f"{name}=",
                    remedy="leave it out, or pass a runtime",
                )
        return Comparison(_figures(dense, inputs), _figures(slim, inputs))
    timed = bench(
        {"dense": dense, "slim": slim},
        inputs,
        runtime=runtime,
        provider=provider,
        batch_sizes=None if batch_size is None else (batch_size,),
        threads=threads,
        pin=pin,
        memory=memory,
        rounds=rounds,
        warmup=warmup,
    )
    return Comparison(
        dense=_figures(dense, inputs, timed.at("dense"), timed.file_bytes["dense"]),
        slim=_figures(slim, inputs, timed.at("slim"), timed.file_bytes["slim"]),
        speedup=timed.speedup("dense", "slim"),
        conditions=timed.conditions,
        batch_size=timed.batch_sizes[0],
    )


def _figures(
    model: nn.Module,
    inputs: Any,
    measured: Measurement | None = None,
    file_bytes: int | None = None,
) -> Figures:
    """Count what a model holds and does, beside what was measured of it."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Figures(
        params=count_params(model),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        macs=count_macs(model, inputs),
        latency=measured.latency if measured else None,
        throughput=measured.throughput if measured else None,
        peak_memory=measured.peak_memory if measured else None,
        file_bytes=file_bytes,
    )


def figures_row(name: str, figures: Figures) -> dict[str, Any]:
    """The figures of one model as a row of numbers.

    Args:
        name: Of the model.
        figures: What it costs.
    """
    row = {f.name: getattr(figures, f.name) for f in fields(figures)}
    timing = row.pop("latency")
    times = {n: getattr(timing, n) if timing else None for n in ("median", "low", "high")}
    return {"model": name, **row, **{f"latency_{n}": value for n, value in times.items()}}


def _share(part: float, whole: float) -> float:
    """Part / whole, where nothing of nothing is all of it."""
    return part / whole if whole else 1.0
