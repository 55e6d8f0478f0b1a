"""Pictures of the results as small PNG files."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
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
