"""Tests that run no line of depcut that no other test runs, and are long: run without tracing.

Tracing takes longer than the tests themselves. After a run of

    DEPCUT_TESTS=whole pytest -n 2 --cov --cov-context=test --durations=0 > log

    python tests/untraced.py log

writes the names to untraced.txt, the longest first, as long as what is left runs the same lines.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections import Counter, defaultdict
from contextlib import closing
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


def arcs(data: Path) -> dict[str, set[tuple[int, int, int]]]:
    """By test function, the (file, line, next line) that it runs; "" for what is no test.

    Read by one query of the schema that coverage documents: its own methods take one for each test
    and file, a million.

    Args:
        data: The file of coverage.
    """
    out = defaultdict[str, set[tuple[int, int, int]]](set)
    with closing(sqlite3.connect(f"file:{data}?mode=ro", uri=True)) as read:
        names = dict(read.execute("select id, context from context"))
        for context, *arc in read.execute("select context_id, file_id, fromno, tono from arc"):
            name = names[context]
            test = _function(name.removesuffix("|run")) if name.endswith("|run") else ""
            out[test].add((arc[0], arc[1], arc[2]))
    return out


def needless(lines: dict[str, set[tuple[int, int, int]]], took: dict[str, float]) -> list[str]:
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
