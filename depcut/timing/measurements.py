"""What was measured of candidates, and the conditions that it holds under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from depcut.errors import InputError
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary, Table
from depcut.support.tables import rendered
from depcut.timing.clock import Speedup, Timing

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Measurement:
    """One candidate at one batch size.

    Attributes:
        batch: Examples in one call.
        latency: Time of one call.
        peak_memory: Bytes that loading and running it take; None if that was not measured.
    """

    batch: int
    latency: Timing
    peak_memory: int | None = None

    @property
    def throughput(self) -> float:
        """Examples per second."""
        return self.batch / self.latency.median


@dataclass(frozen=True, repr=False)
class BenchResult(Shown):
    """Measurements of all candidates, and the conditions that they hold under.

    Attributes:
        measurements: By candidate name and batch size, both in the order given.
        file_bytes: Size of each candidate's ONNX file, external data included; None in PyTorch.
        runtime: Library and version that ran the candidates.
        provider: Its execution provider or device.
        threads: Threads that one operator could use.
        machine: The processor.
        rounds: Times that every candidate had its turn at a batch size.
        cpus: Processors that the measurement was pinned to; none of them if it was not.
        memory: Whether peak memory was asked for.
    """

    measurements: Mapping[str, Mapping[int, Measurement]]
    file_bytes: Mapping[str, int | None]
    runtime: str
    provider: str
    threads: int
    machine: str
    rounds: int
    cpus: tuple[int, ...] = ()
    memory: bool = False

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes, in the order given."""
        return tuple(next(iter(self.measurements.values())))

    @property
    def timings(self) -> dict[str, Timing]:
        """Time of one call of each candidate, at the first batch size."""
        return {name: self.at(name).latency for name in self.measurements}

    def at(self, candidate: str, batch: int | None = None) -> Measurement:
        """What was measured of one candidate.

        Args:
            candidate: Its name.
            batch: The batch size; the first one when left out.

        Returns:
            The measurement.

        Raises:
            InputError: There is no such candidate or batch size.
        """
        if candidate not in self.measurements:
            raise InputError(
                f"no candidate {candidate!r}", remedy=f"there are: {', '.join(self.measurements)}"
            )
        batch = self.batch_sizes[0] if batch is None else batch
        if batch not in self.batch_sizes:
            raise InputError(
                f"batch size {batch} was not measured",
                remedy=f"there are: {', '.join(map(str, self.batch_sizes))}",
            )
        return self.measurements[candidate][batch]

    def speedup(self, base: str, candidate: str, batch: int | None = None) -> Speedup:
        """How many times faster `candidate` is than `base`.

        Args:
            base: Name of the candidate to compare with.
            candidate: Name of the one in question.
            batch: The batch size; the first one when left out.

        Returns:
            The ratio with its interval and what may be claimed from it.

        Raises:
            InputError: There is no such candidate or batch size.
        """
        return Speedup.between(self.at(base, batch).latency, self.at(candidate, batch).latency)

    @property
    def warning(self) -> str:
        """A line on the candidates whose times scatter too widely, or an empty string."""
        spreads = [
            (measurement.latency.spread, f"{name} at batch size {batch}")
            for name, by_batch in self.measurements.items()
            for batch, measurement in by_batch.items()
            if measurement.latency.is_unstable
        ]
        if not spreads:
            return ""
        spread, worst = max(spreads)
        return (
            f"unstable machine: the middle half of the times of {worst} spans {spread:.0%} of "
            "their median; stop what else runs, or pin"
        )

    @property
    def conditions(self) -> str:
        """What the numbers hold for: one line, and others on what went wrong, if anything did."""
        plural = "thread" if self.threads == 1 else "threads"
        where = f" on CPU {', '.join(map(str, self.cpus))}" if self.cpus else ""
        line = (
            f"{self.runtime}, {self.provider}, {self.threads} {plural}{where}, {self.machine}; "
            f"median of {self.rounds} interleaved rounds, 95 % interval"
        )
        missing = self.memory and any(
            one.peak_memory is None
            for sizes in self.measurements.values()
            for one in sizes.values()
        )
        note = "no way to measure peak memory here" if missing else ""
        return "\n".join(filter(None, (line, note, self.warning)))

    def columns(self) -> tuple[str, ...]:
        """Headings of `cells`."""
        headings = ("candidate", "batch", "latency", f"against {next(iter(self.measurements))}")
        file = ("file",) * any(self.file_bytes.values())
        return (*headings, "examples/s", *file, *(("peak memory",) * self.memory))

    def cells(self) -> list[tuple[str, ...]]:
        """A row for each candidate at each batch size."""
        base = next(iter(self.measurements))
        has_files = any(self.file_bytes.values())
        rows = []
        for batch in self.batch_sizes:
            for name in self.measurements:
                one = self.at(name, batch)
                against = "" if name == base else str(self.speedup(base, name, batch))
                cells = [name, str(batch), str(one.latency), against, rate(one.throughput)]
                cells += [byte_size(self.file_bytes[name])] * has_files
                cells += [byte_size(one.peak_memory)] * self.memory
                rows.append(tuple(cells))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Measurements and conditions as plain data."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row of numbers for each candidate at each batch size; times in seconds."""
        return [
            {
                "candidate": name,
                "batch": batch,
                **{f"latency_{n}": getattr(one.latency, n) for n in ("median", "low", "high")},
                "throughput": one.throughput,
                "file_bytes": self.file_bytes[name],
                "peak_memory": one.peak_memory,
            }
            for name, by_batch in self.measurements.items()
            for batch, one in by_batch.items()
        ]

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        several = len(self.batch_sizes) > 1
        bars = [
            timing_bar(f"{name}, batch {batch}" if several else name, self.at(name, batch).latency)
            for batch in self.batch_sizes
            for name in self.measurements
        ]
        return {
            "measured": {
                "title": f"{len(self.measurements)} candidates",
                "headline": "",
                "verdict": "",
                "columns": self.columns(),
                "rows": self.cells(),
                "bars": bars,
                "conditions": self.conditions,
            }
        }

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        times = (f"{name} {timing}" for name, timing in self.timings.items())
        return f"Measurements in {self.runtime}, {self.provider}: {', '.join(times)}"

    def summary(self) -> Summary:
        """What notebooks show."""
        notes = tuple(self.conditions.splitlines())
        return Summary("Measurements", {}, (Table(self.columns(), self.cells()),), notes)

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable

        table = RichTable(caption=self.conditions)
        for i, heading in enumerate(self.columns()):
            table.add_column(heading, justify="right" if i else "left")
        for cells in self.cells():
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        return rendered(self)


def rate(per_second: float) -> str:
    """Examples per second as text.

    Args:
        per_second: The number.

    Returns:
        Three significant digits, or all before the point from 100 on.
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def timing_bar(name: str, timing: Timing) -> dict[str, Any]:
    """A time as a bar of a chart.

    Args:
        name: What took it.
        timing: The time.
    """
    return {"name": name, "median": timing.median, "low": timing.low, "high": timing.high}


def byte_size(count: int | None) -> str:
    """A number of bytes as text.

    Args:
        count: How many, if that is known.

    Returns:
        One digit after the point and a unit, or that they were not measured.
    """
    from rich.filesize import decimal

    return "not measured" if count is None else decimal(count)
