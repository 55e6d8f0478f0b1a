"""Plot results/int8.json: metric or file size against the time of one call, one panel a net."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from accuracy_tasks import TASKS
from figures import panels, save
from measure import RESULTS, Row, read

mpl.use("Agg")
from matplotlib.axes import Axes

STYLES = {False: ("floating point", "tab:blue", "o"), True: ("int8", "tab:orange", "s")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="int8", help="name of the file under results/")
    parser.add_argument("--out", type=Path, help="image to write; results/NAME.png by default")
    options = parser.parse_args()
    data = read(options.results)
    title = f"onnxruntime, 1 thread, {data['machine']['cpu']}; batch 1, medians in turns"
    figure = panels(data["rows"], panel, title, legend=2)
    save(figure, options.out or RESULTS / f"{options.results}.png")


def panel(axes: Axes, name: str, rows: list[Row]) -> None:
    """One net: from the dense one down, in floating point and in int8."""
    key = "metric" if name in TASKS else "bytes"
    for in_int8, (label, colour, marker) in STYLES.items():
        own = [row for row in rows if row["variant"].endswith("int8") is in_int8]
        own.sort(key=lambda row: row["removed"])
        values = [row[key] / (1 if key == "metric" else 1e6) for row in own]
        times = [row["ms"] for row in own]
        axes.plot(times, values, color=colour, marker=marker, label=label, lw=1.2, ms=4)
        for row, time, value in zip(own, times, values, strict=True):
            text = f"-{row['removed']:.0%}" if row["removed"] else "dense"
            axes.annotate(text, (time, value), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(title=name, xlabel="ms a call", ylabel=TASKS[name].unit if name in TASKS else "MB")


if __name__ == "__main__":
    main()
