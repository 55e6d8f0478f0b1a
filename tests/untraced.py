"""Tests that run no line of depcut that no other test runs, and are long: run without tracing.

Tracing takes longer than the tests themselves. After a run of

    DEPCUT_TESTS=whole pytest -n 2 --cov --cov-context=test --durations=0 > log

    python tests/untraced.py log

writes the names to untraced.txt, the longest first, as long as what is left runs the same lines.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

FILE = Path(__file__).parent / "untraced.txt"
_LONG = 1.0  # seconds of all cases of a test, traced


def untraced() -> list[str]:
    """Names of test functions, "test_file.py::test_name", the longest first."""
    return FILE.read_text(encoding="utf-8").split()


def seconds(log: str) -> dict[str, float]:
    """Of all cases of each test function.

    Args:
        log: What pytest printed with --durations=0.
    """
    out: dict[str, float] = defaultdict(float)
    for time, place in re.findall(r"^\s*([\d.]+)s call\s+(\S+)", log, re.MULTILINE):
        out[_function(place)] += float(time)
    return out


def _function(place: str) -> str:
    return place.partition("[")[0].rpartition("/")[2]


def arcs(data: Path) -> dict[str, set[tuple[str, int, int]]]:
    """By test function, the (file, line, next line) that it runs; "" for what is no test.

    Args:
        data: The file of coverage.
    """
    import coverage

    read, out = coverage.CoverageData(str(data)), defaultdict[str, set[tuple[str, int, int]]](set)
    read.read()
    for context in read.measured_contexts():
        test = _function(context.removesuffix("|run")) if context.endswith("|run") else ""
        read.set_query_context(context)
        for file in read.measured_files():
            out[test] |= {(file, *arc) for arc in read.arcs(file) or ()}
    return out


def needless(lines: dict[str, set[tuple[str, int, int]]], took: dict[str, float]) -> list[str]:
    """Tests, the longest first, without which the others run the same lines.

    Args:
        lines: See `arcs`.
        took: See `seconds`.
    """
    times = Counter(arc for found in lines.values() for arc in found)
    out = []
    for test in sorted(took, key=lambda test: (-took[test], test)):
        if took[test] >= _LONG and all(times[arc] > 1 for arc in lines[test]):
            times.subtract(lines[test])
            out.append(test)
    return out


if __name__ == "__main__":
    found = needless(arcs(Path(".coverage")), seconds(Path(sys.argv[1]).read_text()))
    FILE.write_text("\n".join(found) + "\n", encoding="utf-8")
    print(f"{len(found)} tests")
