"""Prints what the size of the surface is: root modules, exports, parameters, files, import time."""

from __future__ import annotations

import inspect
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from layers import MODULES, PACKAGE
from rich.console import Console
from rich.table import Table

import depcut

_IMPORT = (
    "import time, torch; t = time.process_time(); import depcut; print(time.process_time() - t)"
)
_PROCESSES = 5


def own_parameters(function: Any) -> int:
    """Parameters that a function spells itself, without `self` and the flat options.

    Args:
        function: A function or a class.
    """
    code = inspect.unwrap(function.__init__ if inspect.isclass(function) else function).__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return len([name for name in names if name != "self"])


def import_seconds() -> float:
    """Median processor seconds of `import depcut` after `import torch`, in fresh processes."""
    # Compiled files are written by a first run, as they are for every user.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _IMPORT]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        for _ in range(1 + _PROCESSES)
    ]
    return statistics.median(float(run.stdout) for run in runs[1:])


def counts() -> Iterator[tuple[str, str]]:
    """What is counted, and the count."""
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    yield "modules in the package root", str(len(list(PACKAGE.glob("*.py"))))
    yield "modules in all", str(len(MODULES))
    yield "lines of the longest module", str(max(lengths.values()))
    yield "names that the root exports", str(len(dir(depcut)))
    functions = {
        "shrink": depcut.shrink,
        "Analysis.plan": depcut.Analysis.plan,
        "Plan.apply": depcut.Plan.apply,
        "training.retrain": depcut.training.retrain,
        "training.iterate": depcut.training.iterate,
        "training.Gradual": depcut.training.Gradual,
    }
    for name, function in functions.items():
        shown = len([p for p in inspect.signature(function).parameters if p != "self"])
        yield (
            f"parameters of {name}",
            f"{own_parameters(function)} of its own, {shown} with options",
        )
    yield "import depcut after torch, processor", f"{import_seconds():.2f} s"


def main() -> None:
    """Print the table."""
    table = Table("what", "count")
    for row in counts():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
