"""Draw the order of folders and the imports between them; write the table of folders.

    python docs/draw_imports.py

writes docs/imports.svg and the table in CONTRIBUTING.md. Boxes stand in their order from the upper
left to the lower right. A circle is an import: of the box above it by the box to its right, with
the number of pairs of modules. All circles lie below the line of boxes as long as a folder imports
only from those before it; one above it is red.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from layers import ORDER, between_stages, folders

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "imports.svg"
CONTRIBUTING = HERE.parent / "CONTRIBUTING.md"
TABLE = re.compile(r"(<!-- folders -->\n).*?(\n<!-- /folders -->)", re.DOTALL)

PITCH = 27  # pixels from one box to the next
WIDTH, HEIGHT = 92, 20  # of a box
MARGIN = 14
PALETTE = ("#4e79a7", "#59a14f", "#b07aa1", "#e15759", "#9c755f", "#f28e2b", "#76b7b2")
WRONG = "#d00000"


def main() -> None:
    """Write the picture and the table."""
    PICTURE.write_text(picture())
    CONTRIBUTING.write_text(with_table(CONTRIBUTING.read_text()))
    print(f"written: {PICTURE}, and the table of folders in {CONTRIBUTING}")


def with_table(text: str) -> str:
    """A text with the table of folders between its marks."""
    return TABLE.sub(lambda match: match[1] + folders() + match[2], text)


def drawn(text: str) -> set[tuple[str, str]]:
    """The pairs of stages (importer, imported) that a picture shows."""
    return set(re.findall(r"<title>(\w+) imports (\w+):", text))


def picture() -> str:
    """The imports between stages as SVG."""
    size = 2 * MARGIN + PITCH * (len(ORDER) - 1)
    width, height = size + WIDTH, size + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_lines(),
        '<g fill="white" font-size="9" text-anchor="middle">',
        *_boxes(),
        *_circles(),
        "</g>",
        *_legend(width),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _colour(name: str) -> str:
    return PALETTE[ORDER.index(name) % len(PALETTE)]


def _x(name: str) -> float:
    """Where the column of what is imported stands."""
    return MARGIN + PITCH * ORDER.index(name) + PITCH / 2


def _y(name: str) -> float:
    return MARGIN + PITCH * ORDER.index(name) + HEIGHT / 2


def _lines() -> Iterator[str]:
    """From each box to the left, over all that it imports, and down to all that import it."""
    pairs = between_stages()
    for name in ORDER:
        imported = [_x(b) for a, b in pairs if a == name]
        importers = [_y(a) for a, b in pairs if b == name]
        style = f'stroke="{_colour(name)}" stroke-width="1.2" stroke-opacity="0.45"'
        if imported:
            low, high = min(imported), max(*imported, _x(name))
            yield f'<path d="M{high:g} {_y(name):g}H{low:g}" {style}/>'
        if importers:
            low, high = min(*importers, _y(name)), max(importers)
            yield f'<path d="M{_x(name):g} {high:g}V{low:g}" {style} stroke-dasharray="2 3"/>'


def _boxes() -> Iterator[str]:
    for name in ORDER:
        left, top = _x(name) - PITCH / 2, _y(name) - HEIGHT / 2
        yield (
            f'<rect x="{left:g}" y="{top:g}" width="{WIDTH}" height="{HEIGHT}" rx="4" '
            f'fill="{_colour(name)}"/>'
        )
        yield (
            f'<text x="{left + WIDTH / 2:g}" y="{_y(name) + 4:g}" font-size="12">'
            f"{escape(name)}</text>"
        )


def _circles() -> Iterator[str]:
    for (importer, imported), count in sorted(between_stages().items()):
        right = ORDER.index(imported) < ORDER.index(importer)
        colour = _colour(importer) if right else WRONG
        x, y, radius = _x(imported), _y(importer), min(PITCH / 2 - 0.5, 4.5 + count**0.5 * 1.6)
        yield (
            f"<g><title>{importer} imports {imported}: {count}</title>"
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}" fill="{colour}"/>'
            f'<text x="{x:g}" y="{y + 3.2:g}">{count}</text></g>'
        )


def _legend(width: int) -> Iterator[str]:
    """How to read it, in the empty corner at the upper right."""
    lines = (
        "from the upper left: a folder imports from those before it",
        "circle: the folder to its right imports the one above it",
        "number: pairs of modules; red: against the order",
    )
    for i, line in enumerate(lines):
        yield (
            f'<text x="{width - MARGIN}" y="{MARGIN + 14 + 18 * i}" font-size="13" fill="#444" '
            f'text-anchor="end">{line}</text>'
        )


if __name__ == "__main__":
    main()
