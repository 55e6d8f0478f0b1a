"""Branches, widths, or both in one allocation: what is left of a metric at equal cost?

    python benchmarks/branches.py [--tasks char_gpt] [--seeds 0] [--of macs latency]

Tasks are those of accuracy_tasks.py, weights trained from scratch; obs with 8 batches of 32
examples, then compensation, no retraining. Branches alone cannot meet any budget: they go in the
order of their loss for what they save, and the share that 1, 2, ... of them save is the budget of
the others; of these budgets, those nearest to 30, 50 and 70 % are taken. Time is that of
onnxruntime on one thread, each model in turns with the dense one. The error is that of the outputs
on other data, as a share of their variance: what compensation is for, also where a metric is
saturated.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import measure
import torch
from accuracy_tasks import TASKS, Task
from measure import Row
from torch import Tensor, nn

import depcut
from depcut.allocate.branch_losses import branch_losses
from depcut.allocate.influence import cheapest_first
from depcut.allocate.savings import Savings

WANTED = (0.3, 0.5, 0.7)
NEAR = 0.16
WAYS = ("branches", "widths", "both")
ROUNDS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--of", nargs="+", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--results", default="branches", help="name of the files under results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = {(t, s, of) for t in options.tasks for s in options.seeds for of in options.of}
    kept = [r for r in measure.read(options.results)["rows"] if key(r) not in asked]
    for task, seed, of in sorted(asked):
        for row in rows(TASKS[task], seed, of):
            print(row, flush=True)
            kept.append(row)
            measure.write(options.results, kept, {})
    measure.console().print(measure.table("branches and widths", COLUMNS, kept))
    return 0


def key(row: Row) -> tuple[str, int, str]:
    return row["name"], row["seed"], row["of"]


def rows(task: Task, seed: int, of: str) -> Any:
    """A row for each budget that branches alone meet."""
    model, example = task.trained(seed), task.example()
    analysis = depcut.analyze(model, example)
    data = analysis.calibrate(task.calibration(seed, 8, 32), progress=False)
    assert data is not None
    order = branches_in_order(analysis, data)
    plans = [analysis.plan_keeping({}, dropped=order[: n + 1]) for n in range(len(order))]

    def share(model_or_plan: Any) -> float:
        """Of the dense cost that is left."""
        if of == "macs":
            return float(model_or_plan.macs / analysis.macs)
        figures = depcut.compare(model, model_or_plan, example, rounds=ROUNDS)
        assert figures.speedup is not None
        return 1 / figures.speedup.ratio

    def applied(plan: Any) -> Any:
        return plan.apply(model, data=data, progress=False)

    alone = {n: plan if of == "macs" else applied(plan) for n, plan in enumerate(plans)}
    removed = {n: 1 - share(it) for n, it in alone.items()}
    nearest = {min(removed, key=lambda n: abs(removed[n] - w)) for w in WANTED if removed}
    budgets = [n for n in sorted(nearest) if min(abs(removed[n] - w) for w in WANTED) < NEAR]
    for n in budgets:
        ratio = removed[n]
        row: Row = {"name": task.name, "seed": seed, "of": of, "ratio": ratio}
        row["dense"] = task.metric(model)
        others = [inputs for inputs, _ in task.calibration(seed + 77, 4, 32)]
        slim = applied(plans[n])
        row |= {"branches": task.metric(slim), "branches dropped": n + 1}
        row["branches error"] = error(model, slim, others)
        for name, depth in (("widths", False), ("both", True)):
            align = 1 if of == "macs" else 8
            plan = analysis.plan(ratio, of=of, data=data, align=align, depth=depth, progress=False)
            slim = applied(plan)
            row |= {name: task.metric(slim), f"{name} dropped": len(plan.dropped)}
            row[f"{name} error"] = error(model, slim, others)
            row[f"{name} share"] = share(plan if of == "macs" else slim)
        yield row


@torch.no_grad()
def error(dense: nn.Module, slim: nn.Module, batches: list[Tensor]) -> float:
    """Squared difference of the outputs, as a share of their variance."""
    pairs = [(dense(x), slim(x)) for x in batches]
    missed = sum(float((a - b).square().sum()) for a, b in pairs)
    return missed / sum(float((a - a.mean()).square().sum()) for a, _ in pairs)


def branches_in_order(analysis: Any, data: Any) -> list[str]:
    """Names, by loss for what each saves."""
    losses = branch_losses(analysis.coupling, analysis.model, analysis.branches, data)
    saved = Savings(analysis.coupling, analysis.residuals, "macs")
    gains = {b.name: saved((b.name,)) for b in analysis.branches}
    return [b.name for b in cheapest_first(analysis.branches, losses, gains)]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "task": lambda row: row["name"],
    "seed": lambda row: str(row["seed"]),
    "budget": lambda row: f"{row['ratio']:.0%} of {row['of']}",
    "dense": lambda row: f"{row['dense']:.3f}",
    "branches": lambda row: f"{row['branches']:.3f} ({row['branches dropped']})",
    "widths": lambda row: f"{row['widths']:.3f}",
    "both": lambda row: f"{row['both']:.3f} ({row['both dropped']})",
    "errors": lambda row: ", ".join(f"{row.get(f'{n} error', math.nan):.3g}" for n in WAYS),
    "cost left": lambda row: f"{row['widths share']:.1%}, {row['both share']:.1%}",
}


if __name__ == "__main__":
    sys.exit(main())
