"""How much of the metric is left after one-shot structured pruning, without any retraining?

Four tasks trained from scratch (accuracy_tasks.py), three seeds, 30, 50, 70 and 80 % of the MACs
removed, by every method below and by Torch-Pruning (accuracy_peer.py). Points that were measured
before are not measured again; `--redo` measures those that are selected anew.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import accuracy_peer as peer
import measure
import torch
from accuracy_summary import print_tables, summary
from accuracy_tasks import TASKS, Task
from measure import Row
from rich.progress import Progress
from torch import nn

import depcut
from depcut.scores import CRITERIA

REMOVED = (0.3, 0.5, 0.7, 0.8)
SEEDS = (0, 1, 2)
BATCHES, BATCH_SIZE = 8, 32  # calibration, for every method that reads data
PEER = "Torch-Pruning"
DATA_FREE = ("random", "magnitude", "l1")  # and l2, another name of magnitude

Pruned = tuple[float, nn.Module]

# What depcut.shrink is called with beside the model, the ratio and the inputs; "data" stands for
# the calibration pairs, their loss and their number. Any width, as for Torch-Pruning, unless said.
PLAIN = {"align": 1}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {**PLAIN, "score": name} for name in DATA_FREE},
    **{
        name: {**PLAIN, "score": name, "data": True, "compensate": False}
        for name in CRITERIA
        if name not in (*DATA_FREE, "l2")
    },
    "magnitude, global": {**PLAIN, "score": "magnitude", "allocation": "global"},
    "magnitude, align=8": {"score": "magnitude"},
    "random+compensate": {**PLAIN, "score": "random", "data": True, "compensate": True},
    "magnitude+compensate": {**PLAIN, "score": "magnitude", "data": True, "compensate": True},
    "obs+compensate": {**PLAIN, "score": "obs", "data": True, "compensate": True},
    "default": {**PLAIN, "data": True},
    "default, no data": {**PLAIN, "data": "auto"},
    "default, align=8": {"data": True},
}


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.train:
        for seed in options.seeds:
            for name in options.tasks:
                model = TASKS[name].trained(seed)
                print(f"{name}, seed {seed}: {TASKS[name].metric(model):.4g} {TASKS[name].unit}")
        return 0
    console, results = measure.console(), Results(options.results)
    methods = [m for m in options.methods if not reported(unsupported(METHODS.get(m, {})), m)]
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(options.tasks) * len(options.seeds))
        for seed in options.seeds:
            for name in options.tasks:
                progress.update(bar, description=f"{name}, seed {seed}")
                for row in measured(Dense(TASKS[name], seed), methods, options, results):
                    results.add(row)
                progress.advance(bar)
    print_tables(console, results.rows)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*METHODS, PEER]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="METHOD")
    parser.add_argument("--points", nargs="+", type=float, default=list(REMOVED))
    parser.add_argument("--redo", action="store_true", help="measure again what was measured")
    parser.add_argument("--train", action="store_true", help="train the dense models and stop")
    parser.add_argument("--results", default="accuracy", help="name of the files under results/")
    return parser.parse_args()


def unsupported(arguments: Mapping[str, Any]) -> str:
    """Why this depcut cannot be called so; empty where it can."""
    score = arguments.get("score", "magnitude")
    if score not in CRITERIA:
        return f"no criterion {score!r}"
    known = inspect.signature(depcut.shrink).parameters
    missing = [name for name in arguments if name not in known]
    return f"shrink() has no {missing[0]}=" if missing else ""


def reported(reason: str, method: str) -> str:
    if reason:
        print(f"skipped: {method} ({reason})")
    return reason


class Results:
    """Points measured so far, written after each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = measure.read(name)["rows"]

    def has(self, row: Row) -> bool:
        return any(self._same(r, row) and r["key"] == row["key"] for r in self.rows)

    def add(self, row: Row) -> None:
        self.rows = [r for r in self.rows if not self._same(r, row)] + [row]
        self.rows.sort(key=lambda r: (list(TASKS).index(r["name"]), r["seed"]))
        measure.write(self.name, self.rows, summary(self.rows))

    @staticmethod
    def _same(a: Row, b: Row) -> bool:
        return all(a[k] == b[k] for k in ("name", "seed", "method", "removed"))


class Dense:
    """One trained model and what all methods prune it with."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.model, self.inputs = task.trained(seed), task.example()
        self.macs = sum(measure.counted_macs(self.model, (self.inputs,)).values())
        self.metric = task.metric(self.model)
        self.pairs = task.calibration(seed, BATCHES, BATCH_SIZE)

    @cached_property
    def gradients(self) -> peer.Gradients:
        return peer.gradients(self.task, self.model, self.pairs)

    def shrunk(self, arguments: Mapping[str, Any], removed: float) -> Pruned:
        """By depcut, with the share of the MACs that is kept."""
        options = {"data": None, **arguments, "seed": self.seed}
        if options["data"] is True:
            options |= {"data": self.pairs, "loss": self.task.loss, "batches": BATCHES}
        slim = depcut.shrink(self.model, removed, self.inputs, **options)
        return sum(measure.counted_macs(slim, (self.inputs,)).values()) / self.macs, slim

    def by_peer(self, variant: peer.Variant, removed: float) -> Pruned:
        """By Torch-Pruning, the same."""
        return peer.pruned(
            self.task, self.model, self.gradients, variant, 1 - removed, seed=self.seed
        )

    def row(self, row: Row, prune: Callable[[float], Pruned]) -> Row:
        """A point with its result, or with the reason why there is none."""
        start = time.perf_counter()
        try:
            kept, slim = prune(row["removed"])
        except (depcut.DepcutError, RuntimeError) as error:
            return {**row, "error": measure.first_line(error).removeprefix("RuntimeError: ")}
        seconds = round(time.perf_counter() - start, 2)
        metric = self.task.metric(slim)
        lost = self.metric - metric if self.task.higher_is_better else metric - self.metric
        facts = {"macs_kept": kept, "metric": metric, "dense": self.metric, "lost": lost}
        return {**row, **{k: round(v, 5) for k, v in facts.items()}, "seconds": seconds}


def measured(
    dense: Dense, methods: Sequence[str], options: argparse.Namespace, results: Results
) -> Iterator[Row]:
    """All points of one dense model that are not known yet."""
    weights = dense.task.path(dense.seed).stem
    for method, arguments, prune in pruners(dense, methods):
        text = json.dumps([weights, arguments, BATCHES, BATCH_SIZE])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        for removed in options.points:
            row = {"name": dense.task.name, "seed": dense.seed, "method": method}
            row |= {"removed": removed, "key": key}
            if options.redo or not results.has(row):
                yield dense.row(row, prune)


def pruners(
    dense: Dense, methods: Sequence[str]
) -> Iterator[tuple[str, Any, Callable[[float], Pruned]]]:
    """Name, what its results depend on, and the function, of every method and every variant."""
    for method in methods:
        if method != PEER:
            yield method, METHODS[method], partial(dense.shrunk, METHODS[method])
    if PEER in methods:
        for variant in peer.variants(dense.model):
            yield variant.name, "peer", partial(dense.by_peer, variant)


if __name__ == "__main__":
    sys.exit(main())
