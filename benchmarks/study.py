"""The study: which method, when, and what the field's claims are worth on nets one can train.

    python benchmarks/study.py --hours 2          # goes on where it stopped, for two hours
    python benchmarks/study.py --report           # tables, plots and claims from the results alone

Nets of four architectures on two kinds of data each, and a perceptron on a table
(study_tasks.py), three seeds; what is measured is in PARTS. A job's rows are appended to
results/study.jsonl.gz as soon as it is done, and no job is run twice; several processes may share
the work (`--share 0/2`, `--share 1/2`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import measure
import study_report
import torch
from measure import Row
from study_papers import papers
from study_prune import Job, criteria, rivals, times
from study_sparse import sparse_times, unstructured
from study_tasks import STUDY
from study_tickets import before_training, tickets
from study_train import Trained
from study_zeros import sparse_dense, sparse_tickets

SEEDS = (0, 1, 2)
PARTS: Mapping[str, Callable[[Trained], Iterator[Job]]] = {
    part.__name__: part
    for part in (
        criteria,
        unstructured,
        papers,
        tickets,
        sparse_dense,
        sparse_tickets,
        before_training,
        rivals,
        times,
        sparse_times,
    )
}
ALONE = ("times", "sparse_times")  # parts that time: to be run with nothing beside them
VERSION = 1  # of the jobs' code; rows of another one are measured anew


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not options.report:
        run(options, Results())
    return study_report.main()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=STUDY, default=list(STUDY))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", default=None, help="of the parts; all if left out")
    parser.add_argument("--hours", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--share", default="0/1", help="K/N: every Nth pair of task and seed")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parser.parse_args()


class Results:
    """What is done; rows go to disk as soon as a job is."""

    def __init__(self) -> None:
        self.done = {self._of(row) for row in study_report.rows()}

    @staticmethod
    def _of(row: Row) -> tuple[Any, ...]:
        return row["task"], row["seed"], row["part"], row["method"], row["key"]

    def has(self, facts: Row) -> bool:
        return self._of(facts) in self.done

    def add(self, rows: list[Row]) -> None:
        study_report.append(rows)
        self.done |= {self._of(row) for row in rows}


def run(options: argparse.Namespace, results: Results) -> None:
    """All jobs that are not done, seed by seed, until the time is over."""
    stop = time.monotonic() + 3600 * options.hours
    share, shares = map(int, options.share.split("/"))
    pairs = [(seed, name) for seed in options.seeds for name in options.tasks]
    for seed, name in pairs[share::shares]:
        subject = Trained(STUDY[name], seed)
        for part in options.parts:
            for job in PARTS[part](subject):
                facts = identity(subject, job)
                if results.has(facts) or job.method not in (options.methods or [job.method]):
                    continue
                if time.monotonic() > stop:
                    print("the time is over: the same command goes on", flush=True)
                    return
                start = time.monotonic()
                results.add([{**facts, **row} for row in ran(job)])
                spent = time.monotonic() - start
                print(f"{name}, seed {seed}, {part}: {job.method} ({spent:.0f} s)", flush=True)


def identity(subject: Trained, job: Job) -> Row:
    """What a job's rows have in common; the key changes with the dense weights."""
    text = json.dumps([VERSION, subject.task.path(subject.seed).stem])
    return {
        "task": subject.task.name,
        "seed": subject.seed,
        "part": job.part,
        "method": job.method,
        "key": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def ran(job: Job) -> list[Row]:
    """The rows of a job; whatever fails is a row that says so, and the others still run.

    Seconds are the process's own, on one thread: what else the machine does is not in them.
    """
    rows: list[Row] = []
    start = time.process_time()
    try:
        rows.extend(job.run())
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        rows.append({"error": measure.first_line(error)})
    if rows:
        rows[0]["job_seconds"] = round(time.process_time() - start, 1)
    return rows or [{"error": "it has nothing to measure here"}]


if __name__ == "__main__":
    sys.exit(main())
