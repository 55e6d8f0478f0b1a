"""What zeros and whole units save at equal accuracy, from the study's rows.

A method's rows are a curve from the dense net on: what is lost, and what is left, against the share
removed. The curve is followed, on straight lines between its points, to where it first loses more
than is allowed; a curve that never does is followed to its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from measure import Row
from study_plot import SPARSE
from study_verdicts import ranges_of

ALLOWED = (0.05, 0.1)  # of what a task can lose
UNITS = SPARSE[0][0]  # the label of whole units


class Point(NamedTuple):
    """On a method's curve; shares are of the dense net's.

    Attributes:
        lost: Of the metric.
        params: Parameters that are not zero.
        size: Bytes on disk; of zeros the smaller one of zip's and of a bit for every weight.
        speedup: In onnxruntime.
    """

    lost: float
    params: float
    size: float
    speedup: float


DENSE = Point(0.0, 1.0, 1.0, 1.0)


def equal_accuracy(good: Sequence[Row]) -> str:
    """Markdown: a row a method, and what is left where it has lost what is allowed."""
    ranges, timed = ranges_of(good), _times(good)
    head = [f"{name}, {a:.0%} lost" for a in ALLOWED for name in ("left", "file", "faster")]
    lines = [
        "| " + " | ".join(("method", *head, "nets")) + " |",
        "| --- |" + " ---: |" * (len(head) + 1),
    ]
    for label, picks, _ in SPARSE:
        curves = _curves([row for row in good if picks(row)], timed, units=label == UNITS)
        curves = {net: curve for net, curve in curves.items() if net[0] in ranges}
        if not curves:
            continue
        cells: list[str] = []
        for allowed in ALLOWED:
            reached = {n: where(c, allowed * ranges[n[0]]) for n, c in curves.items()}
            left = _over_tasks({net: point.params for net, point in reached.items()})
            size = _over_tasks({net: point.size for net, point in reached.items()})
            faster = _over_tasks({net: point.speedup for net, point in reached.items()})
            cells += [f"{left:.0%}", f"{size:.2f}", f"{faster:.2f}x"]
        lines.append("| " + " | ".join((label, *cells, str(len(curves)))) + " |")
    return "\n".join(lines)


def where(curve: Sequence[Point], allowed: float) -> Point:
    """The point of a curve at which it first loses as much as is allowed."""
    for before, after in pairwise(curve):
        if after.lost > allowed:
            share = (allowed - before.lost) / (after.lost - before.lost)
            return Point(*(b + share * (a - b) for b, a in zip(before, after, strict=True)))
    return curve[-1]


def _curves(
    found: Iterable[Row], timed: Mapping[tuple[str, float], float], *, units: bool
) -> dict[tuple[str, int], list[Point]]:
    """By task and seed, in the order of what is removed."""
    curves: dict[tuple[str, int], list[Point]] = defaultdict(lambda: [DENSE])
    for row in sorted(found, key=lambda row: row["removed"]):
        size, speedup = row["params"], timed.get((row["task"], row["removed"]), 1.0)
        if not units:
            size, speedup = min(row["zip_bytes"], row["bitmap_bytes"]) / row["bytes"], 1.0
        point = Point(row["lost"], row["params"], size, speedup)
        curves[row["task"], row["seed"]].append(point)
    return dict(curves)


def _times(good: Iterable[Row]) -> dict[tuple[str, float], float]:
    return {(row["task"], row["removed"]): row["speedup"] for row in good if row["part"] == "times"}


def _over_tasks(values: Mapping[tuple[str, int], float]) -> float:
    """The mean over tasks of the mean over seeds."""
    by: dict[str, list[float]] = defaultdict(list)
    for (task, _), value in values.items():
        by[task].append(value)
    return mean(map(mean, by.values()))
