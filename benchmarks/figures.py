"""Pictures of the results as small PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Row
from PIL import Image

DPI = 90
COLOURS = 255  # of the palette: lines, translucent bands and their antialiased edges


def save(figure: Figure, path: Path) -> None:
    """Write a figure with a palette of few colours, which takes half of the space."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    image = (
        Image.open(raw)
        .convert("RGB")
        .quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)
    print(f"written: {path} ({path.stat().st_size / 1e3:.0f} kB)")


def panels(
    rows: list[Row], draw: Callable[[Axes, str, list[Row]], None], title: str, legend: int
) -> Figure:
    """A panel for each name, of the rows that have no error; one legend of so many columns."""
    rows = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.9 * lines), squeeze=False, layout="constrained"
    )
    for axes, name in zip(grid.flat, names, strict=False):
        draw(axes, name, [row for row in rows if row["name"] == name])
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=legend)
    figure.suptitle(title)
    return figure
