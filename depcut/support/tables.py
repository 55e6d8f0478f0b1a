"""Rich tables as plain text, for `print` and for log files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def rendered(table: RenderableType, width: int = 120) -> str:
    """The table as text without colours.

    Args:
        table: Anything that rich can print.
        width: Columns available; a table that needs fewer takes fewer.

    Returns:
        Lines of text, without a newline at the end.
    """
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))
