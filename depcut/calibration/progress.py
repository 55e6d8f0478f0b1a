"""Progress bars of passes over the calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from depcut.calibration.data import Calibration
from depcut.calibration.reader import Batch

if TYPE_CHECKING:
    from rich.progress import Progress


def bar(calibration: Calibration) -> Progress:
    """A progress bar on standard error that vanishes when it is done."""
    return transient(shown=calibration.progress)


def transient(*, shown: bool) -> Progress:
    """A progress bar on standard error that vanishes when it is done.

    Args:
        shown: Whether to show it where a user looks on.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = shown and (console.is_interactive or console.is_jupyter)
    return Progress(console=console, transient=True, disable=not shown)


def ticking(calibration: Calibration, label: str) -> Iterator[Batch]:
    """The batches, with a progress bar.

    Args:
        calibration: The batches.
        label: What is done with them.
    """
    with bar(calibration) as progress:
        yield from progress.track(calibration.batches, description=label)
