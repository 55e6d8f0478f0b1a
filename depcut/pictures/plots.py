"""Plots with matplotlib: widths before and after, scores of units, frontiers of what was measured.

Each function draws into the axes that it is given, or into a new figure, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from depcut.errors import InputError
from depcut.pictures.alike import Record
from depcut.pictures.optional import needs
from depcut.support.checks import check_items, check_kind, check_number
from depcut.support.failures import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE, _KEPT = "#c9d4e8", "#2f6fdf"
_NAMED = 48  # bars that have room for their names


def _axes(ax: Axes | None, what: str, height: float = 4.0) -> Axes:
    """The axes given, or those of a new figure."""
    with needs("matplotlib", what):
        from matplotlib import pyplot as plt
        from matplotlib.axes import Axes as MatplotlibAxes
    if ax is None:
        return plt.subplots(figsize=(9, height), layout="constrained")[1]
    if not isinstance(ax, MatplotlibAxes):
        raise InputError(
            f"ax is {shown(ax)}", where=what, remedy="pass axes of matplotlib, or leave it out"
        )
    return ax


def plot_widths(rows: Sequence[Record], title: str, ax: Axes | None = None) -> Axes:
    """Units of each group, dense and kept, in the order of the model.

    Args:
        rows: See `depcut.pictures.plans.plan_rows`.
        title: Of the plot.
        ax: Where to draw.

    Raises:
        InputError: matplotlib is not installed, or `ax` is none of its axes.
    """
    named = len(rows) <= _NAMED
    axes = _axes(ax, "plot", height=max(2.5, 0.22 * len(rows) + 1.2) if named else 4.0)
    place = np.arange(len(rows))
    dense, kept = ([row[n] for row in rows] for n in ("units", "kept"))
    if named:
        axes.barh(place, dense, color=_DENSE, label="dense")
        axes.barh(place, kept, color=_KEPT, height=0.5, label="kept")
        axes.set_yticks(place, [row["group"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("units")
    else:
        axes.fill_between(place, dense, step="mid", color=_DENSE, label="dense")
        axes.step(place, kept, where="mid", color=_KEPT, linewidth=1.2, label="kept")
        axes.set_xlabel("group, in the order of the model")
        axes.set_ylabel("units")
        axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend(frameon=False)
    return axes


def plot_scores(
    scores: Mapping[str, NDArray[np.float64]],
    kept: Mapping[str, int],
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """Scores of each group's units, from the best to the worst; a dot where a plan cuts.

    Args:
        scores: Of the units, by group, in the order of the model; of rows, their mean is drawn.
        kept: Number of units that stay, by group; those not in it get no dot.
        title: Of the plot.
        ax: Where to draw.

    Raises:
        InputError: matplotlib is not installed, or `ax` is none of its axes.
    """
    axes = _axes(ax, "plot_scores")
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.92, max(len(scores), 1)))
    for (name, values), colour in zip(scores.items(), colours, strict=True):
        flat = values.mean(axis=0) if values.ndim == 2 else values
        curve = np.sort(flat)[::-1]
        largest = float(np.abs(curve).max()) or 1.0
        share = np.arange(1, len(curve) + 1) / len(curve)
        label = name if len(scores) <= 10 else None
        axes.plot(share, curve / largest, color=colour, linewidth=1, alpha=0.8, label=label)
        if name in kept and 0 < kept[name] <= len(curve):
            last = kept[name] - 1
            axes.plot(share[last], curve[last] / largest, ".", color=colour, markersize=7)
    axes.set_xlabel("share of the group's units, best first")
    axes.set_ylabel("score, relative to the group's best")
    axes.set_title(title)
    if 0 < len(scores) <= 10:
        axes.legend(frameon=False, fontsize=8)
    return axes


@dataclass(frozen=True)
class Point:
    """One model that was measured.

    Attributes:
        cost: What it costs: milliseconds, MACs, bytes; less is better.
        quality: What it is worth: accuracy; more is better (pass a loss with its sign turned).
        name: Of the model.
        interval: Ends of the interval of the cost, if they are known.
    """

    cost: float
    quality: float
    name: str = ""
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_number(self.cost, "cost", "pass a finite number")
        check_number(self.quality, "quality", "pass a finite number")
        check_kind(self.name, str, "name", "pass a text")


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats in cost and quality, the cheapest first.

    Args:
        points: Any points.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best


def frontier(
    points: Iterable[Point],
    *,
    cost: str = "latency (ms)",
    quality: str = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Quality against cost of models that were measured, with the line of those none beats.

    Args:
        points: What was measured.
        cost: What the cost is, with its unit.
        quality: What the quality is.
        ax: Where to draw.

    Raises:
        InputError: There are no points, matplotlib is not installed, or `ax` is none of its axes.
    """
    remedy = "pass one or more depcut.pictures.Point"
    listed = check_items(points, "points", remedy)
    if not listed or not all(isinstance(point, Point) for point in listed):
        raise InputError(f"points is {shown(points)}", where="frontier", remedy=remedy)
    axes = _axes(ax, "frontier")
    best = pareto(listed)
    axes.step(
        [p.cost for p in best],
        [p.quality for p in best],
        where="post",
        color=_KEPT,
        alpha=0.6,
        linewidth=1.4,
    )
    for point in listed:
        colour = _KEPT if point in best else "#8a94a6"
        low, high = point.interval or (point.cost, point.cost)
        axes.errorbar(
            point.cost,
            point.quality,
            xerr=[[max(point.cost - low, 0.0)], [max(high - point.cost, 0.0)]],
            fmt="o",
            color=colour,
            markersize=5,
            capsize=2 if point.interval else 0,
        )
        axes.annotate(
            point.name,
            (point.cost, point.quality),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(cost)
    axes.set_ylabel(quality)
    return axes
