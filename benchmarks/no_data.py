"""What do inputs that are made from the model itself bring, where there is no data?

Half of the MACs are removed without retraining: by the weights alone (`data=None`), by the inputs
that `data="auto"` makes, at most as many as there are of real data, and by real data. The recipes
were fixed on seed 0 of the tasks of accuracy.py; those of no_data_nets.py were only judged. The
peer is what Torch-Pruning's best criterion loses with real data (results/accuracy.json).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import measure
import torch
import zoo
from accuracy_tasks import TASKS as TUNED
from accuracy_tasks import Task
from measure import Row
from no_data_nets import HELD_OUT
from no_data_texts import TASKS as TEXTS
from rich.table import Table
from torch import nn

import depcut

REMOVED = 0.5
SEEDS = (0, 1, 2)
BATCHES, BATCH_SIZE = 8, 32
METHODS = ("weights alone", "made data", "real data")
PLAIN: Mapping[str, Any] = {"align": 1, "progress": False}

# Of every task: trained(seed), example(), calibration(seed, batches, batch_size), metric(model),
# higher_is_better and unit.
TASKS: Mapping[str, Task] = {**TUNED, **{task.name: task for task in HELD_OUT}, **TEXTS}


def row(task: Task, seed: int, method: str) -> Row:
    """What one method loses."""
    model, example = task.trained(seed), task.example()
    found: Row = {"name": task.name, "seed": seed, "method": method, "dense": task.metric(model)}
    data: Any = "auto" if method == "made data" else None
    if method == "real data":
        data = [inputs for inputs, _ in task.calibration(seed, BATCHES, BATCH_SIZE)]
    start = time.perf_counter()
    slim = depcut.shrink(model, REMOVED, example, seed=seed, data=data, **PLAIN)
    found["seconds"] = round(time.perf_counter() - start, 1)
    if method == "made data":
        found["said"] = " | ".join(depcut.report(slim).notes)
    found["metric"] = task.metric(slim)
    found["lost"] = metric_lost(task, model, slim)
    return found


def metric_lost(task: Task, model: nn.Module, slim: nn.Module) -> float:
    """By how much the metric of a smaller model is worse than the dense one's."""
    change = task.metric(model) - task.metric(slim)
    return round(change if task.higher_is_better else -change, 4)


def summary(rows: Iterable[Row]) -> Row:
    """Mean loss of each task and method, and of the peer."""
    out: Row = {}
    rows = [r for r in rows if "lost" in r]
    for name in dict.fromkeys(r["name"] for r in rows):
        for method in METHODS:
            lost = [r["lost"] for r in rows if (r["name"], r["method"]) == (name, method)]
            if lost:
                out[f"{name}: lost by {method}"] = round(mean(lost), 3)
        best = peer(name)
        if best is not None:
            out[f"{name}: lost by Torch-Pruning, best, with data"] = round(best, 3)
    return out


def peer(name: str) -> float | None:
    """What Torch-Pruning's best variant loses on average with real data, where it was measured."""
    lost: dict[str, list[float]] = {}
    for point in measure.read("accuracy")["rows"]:
        is_peer = point["method"].startswith("Torch-Pruning") and "lost" in point
        if is_peer and (point["name"], point["removed"]) == (name, REMOVED):
            lost.setdefault(point["method"], []).append(point["lost"])
    means = [mean(values) for values in lost.values() if len(values) == len(SEEDS)]
    return min(means, default=None)


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One row a task: the metric of the dense model, and of each method by seed."""
    table = Table(title=f"{REMOVED:.0%} of the MACs removed; seeds {', '.join(map(str, SEEDS))}")
    for column in ("task", "dense", *METHODS):
        table.add_column(column, overflow="fold")
    for name in dict.fromkeys(r["name"] for r in rows):
        own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["seed"])
        dense = {r["seed"]: r["dense"] for r in own}
        cells = [" ".join(f"{v:.4g}" for v in dense.values())]
        for method in METHODS:
            metrics = [r.get("metric") for r in own if r["method"] == method]
            cells.append(" ".join("-" if m is None else f"{m:.4g}" for m in metrics))
        table.add_row(name, *cells)
    yield table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--train", action="store_true", help="train the dense models and stop")
    chosen = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = measure.console()
    for name in chosen.tasks:
        for seed in chosen.seeds:
            if chosen.train:
                console.print(name, seed, TASKS[name].metric(TASKS[name].trained(seed)))
                continue
            for method in chosen.methods:
                found = row(TASKS[name], seed, method)
                console.print(*found.values())
                rows = [r for r in measure.read("no_data")["rows"] if not _same(r, found)] + [found]
                rows.sort(key=lambda r: (list(TASKS).index(r["name"]), r["seed"]))
                measure.write("no_data", rows, summary(rows))
    for table in tables(measure.read("no_data")["rows"]):
        console.print(table)
    return 0


def _same(a: Row, b: Row) -> bool:
    return all(a[k] == b[k] for k in ("name", "seed", "method"))


if __name__ == "__main__":
    sys.exit(main())
