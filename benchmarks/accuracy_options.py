"""Which way of summing up a unit's members, and of comparing groups, keeps most of the metric?

The tasks of accuracy.py at 50 % of the MACs removed, without compensation. Aggregation and members
are tried with the uniform allocation, where only ranks within a group count; normalisation with the
global one, where groups compete.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import measure
import torch
from accuracy import BATCH_SIZE, BATCHES, SEEDS
from accuracy_tasks import TASKS, Task
from rich.table import Table

import depcut
from depcut.scores.context import AGGREGATES, MEMBERS, NORMALIZATIONS

REMOVED = 0.5
CRITERIA = ("magnitude", "taylor")


def options() -> Iterator[tuple[str, dict[str, str]]]:
    """Allocation, and the options of the criterion."""
    for aggregate in AGGREGATES:
        for members in MEMBERS:
            yield "uniform", {"aggregate": aggregate, "members": members}
    for normalize in NORMALIZATIONS:
        yield "global", {"normalize": normalize}


def measured(task: Task, seed: int) -> Iterator[measure.Row]:
    """What each choice loses."""
    model, inputs = task.trained(seed), task.example()
    dense, pairs = task.metric(model), task.calibration(seed, BATCHES, BATCH_SIZE)
    for criterion in CRITERIA:
        data: dict[str, Any] = {} if criterion == "magnitude" else {"data": pairs}
        data |= {"loss": task.loss, "batches": BATCHES} if data else {}
        for allocation, chosen in options():
            slim = depcut.shrink(
                model,
                REMOVED,
                inputs,
                score=depcut.Score(criterion, **chosen),
                allocation=allocation,
                align=1,
                compensate=False,
                progress=False,
                **data,
            )
            metric = task.metric(slim)
            lost = dense - metric if task.higher_is_better else metric - dense
            method = " ".join([criterion, allocation, *chosen.values()])
            yield {"name": task.name, "seed": seed, "method": method, "lost": round(lost, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console, rows = measure.console(), []
    for name in chosen.tasks:
        for seed in chosen.seeds:
            for row in measured(TASKS[name], seed):
                rows.append(row)
                console.print(*row.values())
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table(title="lost at 50 %, mean over the seeds")
    for column in ("choice", *chosen.tasks):
        table.add_column(column)
    means: dict[str, list[float]] = {}
    for method in methods:
        means[method] = [
            sum(found) / len(found)
            for name in chosen.tasks
            if (found := [r["lost"] for r in rows if (r["name"], r["method"]) == (name, method)])
        ]
        table.add_row(method, *(f"{value:.3g}" for value in means[method]))
    console.print(table)
    measure.write("accuracy_options", rows, {"mean_lost": means})
    return 0


if __name__ == "__main__":
    sys.exit(main())
