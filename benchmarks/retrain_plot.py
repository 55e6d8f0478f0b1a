"""Plot results/retrain.json: schedules over budgets, a panel for each task and ratio."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from accuracy_tasks import TASKS
from figures import save
from measure import RESULTS, read
from retrain_summary import DEFAULT, FT_SHARE, LOW, OWN, SCHEDULES, found

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

METHODS = (*SCHEDULES, DEFAULT, OWN, LOW)
COLOURS = dict(
    zip(METHODS, [f"C{i}" for i in (7, 5, 1, 4, 9, 0, 2)] + ["black", "C6", "C3"], strict=True)
)
DASHED = (FT_SHARE, DEFAULT, OWN, LOW)
FLOOR = 0.2  # percent of errors that a logarithmic axis shows as the least: less than one image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="retrain", help="name of the file under results/")
    options = parser.parse_args()
    rows = read(options.results)["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    finds = {name: found(rows, name) for name in names}
    seeds = {n: len({r["seed"] for r in rows if r["name"] == n}) for n in names}
    save(schedules(finds, seeds), RESULTS / f"{options.results}.png")


def schedules(finds: Mapping[str, Mapping], seeds: Mapping[str, int]) -> Figure:
    """A row a task, a panel a ratio, a line a schedule."""
    ratios = sorted({r for find in finds.values() for _, _, r, _ in find})
    figure, panels = plt.subplots(
        len(finds),
        len(ratios),
        figsize=(3.6 * len(ratios), 3.4 * len(finds) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for line, (name, find) in zip(panels, finds.items(), strict=True):
        for axes, removed in zip(line, ratios, strict=True):
            for method in METHODS:
                _line(axes, name, find, method, removed)
            axes.set(title=f"{name}, {removed:.0%} removed", xlabel="T_rt / T", xscale="log")
            budgets = sorted({b for p, _, r, b in find if (p, r) == ("schedules", removed) and b})
            if not budgets:
                axes.axis("off")
                continue
            axes.set_xticks(budgets, [f"{b:.1%}" for b in budgets])
            axes.minorticks_off()
            if TASKS[name].higher_is_better:
                axes.set(yscale="log")
                ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(axes, t)]
                axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
                axes.minorticks_off()
        line[0].set_ylabel(_label(name))
    shown: dict[str, Artist] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    order = [m for m in METHODS if m in shown]
    figure.legend([shown[m] for m in order], order, loc="outside lower center", ncols=len(order))
    figure.suptitle(
        "Retrained after magnitude selection, or after the default with data\n" + _seeds(seeds),
        fontsize=10,
    )
    return figure


def _line(axes: Axes, name: str, find: Mapping, method: str, removed: float) -> None:
    at = sorted({b for p, m, r, b in find if (p, m, r) == ("schedules", method, removed)})
    if not at:
        return
    values = [_shown(name, list(find["schedules", method, removed, b].values())) for b in at]
    centre = np.array([v.mean() for v in values])
    deviation = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in values])
    style = "--" if method in DASHED else "-"

    axes.plot(at, centre, style, color=COLOURS[method], marker="o", ms=3.5, lw=1.3, label=method)
    low = centre - deviation
    if TASKS[name].higher_is_better:
        low = np.maximum(low, FLOOR)
    axes.fill_between(at, low, centre + deviation, color=COLOURS[method], alpha=0.12, lw=0)


def _shown(name: str, values: Sequence[float]) -> np.ndarray:
    """Errors where the metric is an accuracy: they differ by factors."""
    array = np.array(values)
    return np.maximum(100 - array, FLOOR) if TASKS[name].higher_is_better else array


def _label(name: str) -> str:
    return "100 - test accuracy in %" if TASKS[name].higher_is_better else TASKS[name].unit


def _within(axes: Axes, value: float) -> bool:
    low, high = axes.get_ylim()
    return low <= value <= high


def _seeds(seeds: Mapping[str, int]) -> str:
    return "mean and deviation over seeds: " + ", ".join(f"{n} {c}" for n, c in seeds.items())


if __name__ == "__main__":
    main()
