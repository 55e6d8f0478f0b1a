"""Plot results/latency.json: measured speedup against the ratio of MACs, one panel a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from figures import panels, save
from measure import RESULTS, Row, read

mpl.use("Agg")
from matplotlib.axes import Axes

STYLES = {
    "unaligned": ("widths as they come", "tab:orange", "o"),
    "aligned": ("multiples of 8", "tab:blue", "s"),
    "latency": ("of='latency'", "tab:green", "D"),
    "Torch-Pruning": ("Torch-Pruning", "tab:gray", "x"),
    "Torch-Pruning round_to=8": ("Torch-Pruning, round_to=8", "black", "+"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="latency", help="name of the file under results/")
    parser.add_argument("--out", type=Path, help="image to write; results/NAME.png by default")
    options = parser.parse_args()
    data = read(options.results)
    title = f"onnxruntime, 1 thread, {data['machine']['cpu']}; batch 1, medians in turns"
    figure = panels(data["rows"], panel, title, legend=3)
    save(figure, options.out or RESULTS / f"{options.results}.png")


def panel(axes: Axes, name: str, rows: list[Row]) -> None:
    """One model: candidates against the line where all that theory promises is won."""
    most = 1.05 * max(1 / row["macs_kept"] for row in rows)
    axes.plot([0.9, most], [0.9, most], color="lightgray", label="all that the MACs promise")
    for kind, (label, colour, marker) in STYLES.items():
        own = sorted(
            (1 / row["macs_kept"], row["speedup"], row["low"], row["high"])
            for row in rows
            if row["candidate"].rpartition(", ")[0] == kind
        )
        if own:
            x, y, low, high = zip(*own, strict=True)
            errors = (
                [b - a for a, b in zip(low, y, strict=True)],
                [b - a for a, b in zip(y, high, strict=True)],
            )
            axes.errorbar(x, y, yerr=errors, color=colour, marker=marker, label=label, lw=1)
        elif axes.get_subplotspec() and axes.get_subplotspec().is_first_row():
            axes.plot([], [], color=colour, marker=marker, label=label, lw=1)
    dense = next(row["ms"] for row in rows if row["candidate"] == "dense")
    axes.set(
        title=f"{name} (dense {dense:.3g} ms)",
        xlabel="MACs, dense / slim",
        ylabel="measured speedup",
        xscale="log",
        yscale="log",
    )
    ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 4, 5) if t <= most]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}x" for t in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlim(0.95, most)


if __name__ == "__main__":
    main()
