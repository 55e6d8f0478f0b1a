"""A progress bar on standard error, of bytes and of operators."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """A bar for each stage of a run; it vanishes when the run is done.

    Args:
        wanted: Whether to show any; where standard error is no terminal, none is.
    """

    def __init__(self, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        shown = wanted and (console.is_interactive or console.is_jupyter)
        self._bars: Any = Bars(console=console, transient=True, disable=not shown)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, stage: str, done: float, total: float) -> None:
        """Show how far a stage is.

        Args:
            stage: What is done.
            done: How much of it.
            total: Of how much.
        """
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done)
