"""What a model loses at each ratio: one plan a row, each ready to be applied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.apply.plan import Plan
from depcut.calibration.data import Calibration, Data
from depcut.capture.inputs import Inputs
from depcut.errors import InputError, listed
from depcut.options import ApplyKeywords, Options
from depcut.pictures.plots import Point
from depcut.pictures.plots import frontier as plot_frontier
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary, Table
from depcut.support.checks import check_path
from depcut.support.failures import shown
from depcut.support.files import replacing
from depcut.support.keywords import takes_options
from depcut.support.quantities import quantity
from depcut.support.tables import rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table as RichTable

_FORMAT = "png"  # of a plot whose file has no suffix


@dataclass(frozen=True, eq=False, repr=False)
class FrontierRow:
    """One ratio of a frontier.

    Attributes:
        ratio: Fraction removed of what is budgeted.
        plan: The units that stay.
        loss: Predicted: the share of the criterion's score that goes, from 0 to 1; of all groups
            together where scores are losses that add up ("obs"), else the mean of the groups'.
        macs: MACs of one example that are left.
        params: Parameters that are left.
        latency_ms: Milliseconds: measured where time is budgeted, predicted where that was asked
            for, else None.
        calibration: The data that the units were scored on, if any.
    """

    ratio: float
    plan: Plan
    loss: float
    macs: int
    params: int
    latency_ms: float | None = None
    calibration: Calibration | None = None

    @takes_options(Options, ApplyKeywords)
    def apply(
        self,
        model: nn.Module,
        inputs: Inputs = None,
        *,
        data: Data | Calibration | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        options: Options | None = None,
        **given: Unpack[ApplyKeywords],
    ) -> nn.Module:
        """The smaller model, as `Plan.apply` makes it; `model` is not changed.

        Args:
            model: The model the frontier is of, or another instance of its architecture.
            inputs: Example inputs, of all example calls; left out, those of the plan.
            data: Calibration data for the repair; left out, what the units were scored on.
            optimizer: One that trains `model`; it is pointed at the smaller model.
            options: What else is chosen, as one object; the keywords that follow go before it.
            **given: The fields of `depcut.Options`.

        Raises:
            InputError: The data does not fit the model.
            PlanError: The model has another architecture, or has changed since it was analysed.
            VerificationError: The smaller model does not compute what it should.
            ProcessError: Another of several processes failed, or has another model or other data.
        """
        data = self.calibration if data is None else data
        return self.plan.apply(
            model, inputs, data=data, optimizer=optimizer, options=options, **given
        )

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data; the plan by its digest."""
        return {
            "ratio": self.ratio,
            "loss": self.loss,
            "macs": self.macs,
            "params": self.params,
            "latency_ms": self.latency_ms,
            "plan": self.plan.digest,
        }

    def __repr__(self) -> str:
        return (
            f"<ratio {self.ratio:g}: predicted loss {self.loss:.3g}, MACs {quantity(self.macs)}, "
            f"parameters {quantity(self.params)}>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Frontier(Shown):
    """Plans for several ratios, of units that were scored once.

    A sequence of `FrontierRow`, in the order of the ratios that were asked for.

    Attributes:
        entries: Its rows.
        macs: MACs of one example of the dense model.
        params: Parameters of the dense model.
        settings: What the plans have in common: what is budgeted, criterion, allocation.
        unreached: Ratios that cannot be reached, with the reason.
    """

    entries: tuple[FrontierRow, ...]
    macs: int
    params: int
    settings: Mapping[str, Any]
    unreached: Mapping[float, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[FrontierRow]:
        return iter(self.entries)

    @overload
    def __getitem__(self, place: int) -> FrontierRow: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[FrontierRow, ...]: ...

    def __getitem__(self, place: int | slice) -> FrontierRow | tuple[FrontierRow, ...]:
        return self.entries[place]

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Axes | None = None) -> Axes:
        """Plot the score that stays against the cost that stays; needs matplotlib.

        The cost is milliseconds where they are known, else MACs; if parameters are budgeted, those.

        Args:
            path: An image to make or replace, of the kind that its suffix says.
            ax: Axes of matplotlib; a new figure when left out.

        Raises:
            InputError: matplotlib is not installed, or `ax` is none of its axes.
            DepcutError: The file cannot be written.
        """
        timed = all(row.latency_ms is not None for row in self)
        of = "latency_ms" if timed else "params" if self.settings["of"] == "params" else "macs"
        unit = {"latency_ms": "latency (ms)", "params": "parameters", "macs": "MACs"}[of]
        points = [Point(float(getattr(r, of)), 1 - r.loss, f"{r.ratio:g}") for r in self]
        worth = f"score that stays, by {self.settings['score']} (predicted)"
        axes = plot_frontier(points, cost=unit, quality=worth, ax=ax)
        if path is not None:
            _draw(axes, path)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """The frontier as plain data."""
        return {
            "settings": dict(self.settings),
            "dense": {"macs": self.macs, "params": self.params},
            "rows": self.rows(),
            "unreached": {f"{ratio:g}": why for ratio, why in self.unreached.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each ratio."""
        return [row.to_dict() for row in self]

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        ratios = listed([f"{row.ratio:g}" for row in self])
        return f"Frontier of {self.settings['of']}: {len(self)} plans, ratios {ratios}"

    def summary(self) -> Summary:
        """What notebooks show."""
        facts = {"MACs": quantity(self.macs), "parameters": quantity(self.params)}
        facts |= {name: str(value) for name, value in self.settings.items()}
        table = Table(self._columns, [self._cells(row) for row in self], "ratios")
        return Summary(self.headline, facts, (table,), tuple(self._notes))

    @property
    def _timed(self) -> bool:
        return any(row.latency_ms is not None for row in self)

    @property
    def _columns(self) -> tuple[str, ...]:
        last = ("ms",) if self._timed else ()
        return ("ratio", "predicted loss", "MACs", "parameters", *last)

    def _cells(self, row: FrontierRow) -> tuple[str, ...]:
        cells = [f"{row.ratio:g}", f"{row.loss:.4f}"]
        for now, dense in ((row.macs, self.macs), (row.params, self.params)):
            cells.append(f"{quantity(now)} ({now / dense:.1%})" if dense else quantity(now))
        if self._timed:
            cells.append("" if row.latency_ms is None else f"{row.latency_ms:.3g}")
        return tuple(cells)

    @property
    def _notes(self) -> list[str]:
        return [f"ratio {ratio:g}: {why}" for ratio, why in self.unreached.items()]

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        caption = Text("\n".join(self._notes)) if self.unreached else None
        table = RichTable(title=f"frontier: {settings}", caption=caption)
        for column in self._columns:
            table.add_column(column, justify="right")
        for row in self:
            table.add_row(*self._cells(row))
        return table

    def __str__(self) -> str:
        return rendered(self)


def _draw(axes: Axes, path: str | os.PathLike[str]) -> None:
    """Write the figure of a plot; the file appears complete or not at all."""
    target = check_path(path, "path")
    kind = target.suffix[1:] or _FORMAT
    canvas = axes.figure.canvas
    known = sorted(canvas.get_supported_filetypes())
    if kind not in known:
        raise InputError(
            f"matplotlib writes no {kind!r}",
            where=f"path={shown(path)}",
            remedy=f"use {listed(known)}",
        )
    with replacing(target, "plot") as draft:
        canvas.print_figure(draft, format=kind)
