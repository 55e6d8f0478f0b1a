"""What retraining gives back: schedules, rewinding, iterations, controls from scratch, a rival.

Two tasks of accuracy_tasks.py, three seeds; 50, 70 and 90 % of the MACs removed; T_rt of 2.5, 10
and 25 % of the original training's T steps. Points that were measured before are not measured
again; every part can be run by itself, and several processes may write one results file.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean

import measure
import torch
from accuracy_tasks import TASKS
from measure import Row
from retrain_parts import BUDGETS, NAMES, PARTS, REMOVED, Point, Wanted
from retrain_summary import print_tables, summary
from retrain_tasks import Subject

import depcut

NETS = ("digits_resnet", "char_gpt")
SEEDS = (0, 1, 2)
VERSION = 1  # of the way in which points are measured
IDENTITY = ("name", "seed", "part", "method", "removed", "budget")


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = Results(options.results)
    wanted = Wanted(options.ratios, options.budgets, options.schedules)
    todo = [(seed, name) for seed in options.seeds for name in options.tasks]
    for position, (seed, name) in enumerate(todo):
        subject = Subject(TASKS[name], seed, BUDGETS)
        points = [p for part in options.parts for p in PARTS[part](subject, wanted)]
        missing = [p for p in points if options.redo or not results.has(identity(subject, p))]
        print(f"{name}, seed {seed}: {len(missing)} of {len(points)} points to measure")
        for number, point in enumerate(missing):
            row = measured(subject, point)
            results.add(row)
            left = remaining(results.rows, name, missing[number + 1 :])
            later = len(todo) - position - 1
            print(
                f"  {number + 1}/{len(missing)} {point.part}: {point.method}, {point.removed:.0%} "
                f"removed, {point.budget:.1%} of T: {row.get('metric', row.get('error'))} "
                f"({row['seconds']} s); {left / 60:.1f} minutes left"
                + (f", and {later} more nets" if later else ""),
                flush=True,
            )
    results.write()  # with the statements as they are made now
    print_tables(measure.console(), results.rows)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(REMOVED))
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=list(BUDGETS), choices=BUDGETS,
        help="T_rt / T; the parts scratch, lottery and long have their own",
    )  # fmt: skip
    parser.add_argument("--schedules", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--results", default="retrain", help="name of the files under results/")
    return parser.parse_args()


class Results:
    """The rows, read again and written after every point."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self._read()

    def _read(self) -> list[Row]:
        return list(measure.read(self.name)["rows"])

    def has(self, row: Row) -> bool:
        return any(_same(r, row) and r["key"] == row["key"] for r in self.rows)

    def add(self, row: Row) -> None:
        with self._locked():
            rows = [r for r in self._read() if not _same(r, row)] + [row]
            tasks, parts = list(TASKS), list(PARTS)
            rows.sort(key=lambda r: (tasks.index(r["name"]), r["seed"], parts.index(r["part"])))
            self.rows = rows
            measure.write(self.name, rows, summary(rows))

    def write(self) -> None:
        with self._locked():
            self.rows = self._read()
            measure.write(self.name, self.rows, summary(self.rows))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time reads the file and writes it."""
        with (measure.RESULTS / f".{self.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _same(a: Row, b: Row) -> bool:
    return all(a[k] == b[k] for k in IDENTITY)


def identity(subject: Subject, point: Point) -> Row:
    text = json.dumps([VERSION, subject.task.path(subject.seed).stem, point.steps])
    return {
        "name": subject.task.name,
        "seed": subject.seed,
        "part": point.part,
        "method": point.method,
        "removed": point.removed,
        "budget": point.budget,
        "steps": point.steps,
        "key": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def measured(subject: Subject, point: Point) -> Row:
    """A point with its result, or with the reason why there is none."""
    row = identity(subject, point)
    if point.rewinds and not subject.snapshots.taken:  # made once, outside of the point's time
        raise RuntimeError("there are no snapshots")
    start = time.perf_counter()
    try:
        slim = point.run()
    except (depcut.DepcutError, RuntimeError) as error:
        seconds = round(time.perf_counter() - start, 2)
        return {**row, "error": measure.first_line(error), "seconds": seconds}
    seconds = round(time.perf_counter() - start, 2)
    metric = subject.task.metric(slim)
    lost = subject.metric - metric if subject.task.higher_is_better else metric - subject.metric
    kept = sum(measure.counted_macs(slim, (subject.inputs,)).values()) / subject.macs
    facts = {"macs_kept": kept, "metric": metric, "dense": subject.metric, "lost": lost}
    return {**row, **{k: round(v, 5) for k, v in facts.items()}, "seconds": seconds}


def remaining(rows: Sequence[Row], name: str, points: Sequence[Point]) -> float:
    """Seconds, by what a step took at the same width; NaN where nothing is known yet."""
    known: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["name"] == name and row["steps"] and "error" not in row:
            known[0.0 if row["part"] == "gradual" else row["removed"]].append(
                row["seconds"] / row["steps"]
            )
    everything = [value for values in known.values() for value in values] or [float("nan")]
    total = 0.0
    for point in points:
        values = known.get(0.0 if point.wide else point.removed, everything)
        total += point.steps * mean(values)
    return total


if __name__ == "__main__":
    sys.exit(main())
