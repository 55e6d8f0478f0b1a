"""Plot results/accuracy.json: the metric against the MACs kept, one panel a task."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from accuracy_summary import BEST, PEER, with_best
from accuracy_tasks import TASKS
from figures import save
from measure import RESULTS, Row, read

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STYLES = {
    "default": ("default, with data", "tab:blue", "o"),
    "magnitude+compensate": ("magnitude + compensation", "tab:green", "D"),
    "magnitude": ("magnitude", "tab:orange", "s"),
    "random": ("random", "tab:red", "^"),
    BEST: (f"{PEER}, the best of all its criteria", "black", "x"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="accuracy", help="name of the file under results/")
    parser.add_argument("--out", type=Path, help="image to write; results/NAME.png by default")
    options = parser.parse_args()
    data = read(options.results)
    rows = [row for row in with_best(data["rows"]) if "error" not in row]
    names = [name for name in TASKS if any(row["name"] == name for row in rows)]
    figure, panels = plt.subplots(
        -(-len(names) // 2), 2, figsize=(9.6, 3.8 * -(-len(names) // 2)), layout="constrained"
    )
    for axes, name in zip(panels.flat, names, strict=False):
        panel(axes, name, [row for row in rows if row["name"] == name])
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label, _, _ in STYLES.values() if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=3)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"One shot, no retraining; mean of {seeds} seed{'s' * (seeds > 1)}"
        + (", bands: standard deviation" if seeds > 1 else "")
    )
    out = options.out or RESULTS / f"{options.results}.png"
    save(figure, out)


def panel(axes: Axes, name: str, rows: list[Row]) -> None:
    """One task: a curve a method, from the dense model down."""
    dense = np.array(list({row["seed"]: row["dense"] for row in rows}.values()))
    for method, (label, colour, marker) in STYLES.items():
        own = [row for row in rows if row["method"] == method]
        points = sorted({row["removed"] for row in own})
        if not points:
            continue
        metrics = [dense] + [
            np.array([row["metric"] for row in own if row["removed"] == point]) for point in points
        ]
        kept = [1.0] + [
            float(np.mean([row["macs_kept"] for row in own if row["removed"] == point]))
            for point in points
        ]
        mean = np.array([values.mean() for values in metrics])
        spread = np.array([values.std(ddof=1) if len(values) > 1 else 0.0 for values in metrics])
        axes.plot(kept, mean, color=colour, marker=marker, label=label, lw=1.2, ms=4)
        axes.fill_between(kept, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    axes.axhline(dense.mean(), color="lightgray", lw=0.8, zorder=0)
    axes.set(title=name, xlabel="MACs kept", ylabel=TASKS[name].unit)
    axes.invert_xaxis()


if __name__ == "__main__":
    main()
