"""Which allocation loses least where nothing but the weights is known?

    python benchmarks/allocations.py [--seeds 0 1 2] [--tasks digits_vit char_llama] [--peer]

The tasks of accuracy_tasks.py and the character Llama of walk_accuracy.py lose 30, 50 and 70 % of
their MACs by magnitude, without data and without retraining: by equal shares ("uniform"), by
"global" (the default), by "global" as if one layer alone read the residual stream, and by the
default without the correction of means. `--peer` adds Torch-Pruning's group L2 norm for the Llama,
whose results on the other tasks are in accuracy.json.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any
from unittest import mock

import measure
import numpy as np
import torch
import zoo
from accuracy_tasks import TASKS, Task
from walk_accuracy import LLAMA

import depcut
from depcut.coupling.groups import Coupling

EVERY = {**TASKS, LLAMA.name: LLAMA}
REMOVED = (0.3, 0.5, 0.7)


def one_reader() -> AbstractContextManager[Any]:
    """As if every group were read by one layer."""

    def alone(coupling: Coupling) -> Any:
        return np.ones(len(coupling.groups), dtype=np.int64)

    return mock.patch("depcut.allocate.space.readers", alone)


Variant = tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]
VARIANTS: dict[str, Variant] = {
    "default": ({}, nullcontext),
    "uniform": ({"allocation": "uniform"}, nullcontext),
    "global, one reader": ({"allocation": "global"}, one_reader),
    "default, compensate=False": ({"compensate": False}, nullcontext),  # differs with batch norms
}


def shrunk(task: Task, model: torch.nn.Module, options: Any, removed: float) -> torch.nn.Module:
    """By weights alone, any width."""
    return depcut.shrink(
        model,
        removed,
        task.example(),
        data=None,
        score="magnitude",
        align=1,
        progress=False,
        **options,
    )


def by_peer(task: Task, model: torch.nn.Module, removed: float) -> torch.nn.Module:
    """Torch-Pruning's group L2 norm, local, on the inner widths of a Llama: those it can prune.

    The ratio is searched until the MACs come to the operating point.
    """
    import copy

    import torch_pruning

    inputs = task.example()
    dense = sum(measure.counted_macs(model, (inputs,)).values())
    low, high, best, gap = 0.0, 1.0, model, 1.0
    for _ in range(9):
        slim, ratio = copy.deepcopy(model), (low + high) / 2
        heads = {}
        for layer in slim.model.model.layers:
            attention = layer.self_attn
            heads |= {attention.q_proj: 4, attention.k_proj: 2, attention.v_proj: 2}
        pruner = torch_pruning.pruner.BasePruner(
            slim,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[
                slim.model.lm_head,
                slim.model.model.embed_tokens,
                *(layer.self_attn.o_proj for layer in slim.model.model.layers),
                *(layer.mlp.down_proj for layer in slim.model.model.layers),
                *heads,
            ],
            num_heads=heads,
        )
        pruner.step()
        kept = sum(measure.counted_macs(slim, (inputs,)).values()) / dense
        if abs(kept - 1 + removed) < gap:
            best, gap = slim, abs(kept - 1 + removed)
        low, high = (ratio, high) if kept > 1 - removed else (low, ratio)
    return best.eval()


def measured(task: Task, seed: int, peer: bool) -> Iterator[measure.Row]:
    """A row for each variant and ratio."""
    model = task.trained(seed)
    dense, sign = task.metric(model), 1 if task.higher_is_better else -1
    for removed in REMOVED:
        for name, (options, context) in VARIANTS.items():
            with context():
                slim = shrunk(task, model, options, removed)
            yield row(task, seed, name, removed, sign * (dense - task.metric(slim)))
        if peer and task is LLAMA:
            slim = by_peer(task, model, removed)
            yield row(task, seed, "Torch-Pruning L2", removed, sign * (dense - task.metric(slim)))


def row(task: Task, seed: int, name: str, removed: float, lost: float) -> measure.Row:
    return {
        "name": task.name, "seed": seed, "allocation": name, "removed": removed,
        "lost": round(lost, 4),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tasks", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = {(name, seed) for name in options.tasks for seed in options.seeds}
    rows = [r for r in measure.read("allocations")["rows"] if (r["name"], r["seed"]) not in chosen]
    for name, seed in sorted(chosen):
        rows += measured(EVERY[name], seed, options.peer)
        measure.write("allocations", rows, {})
    table(rows)
    return 0


def table(rows: list[measure.Row]) -> None:
    """What is lost on average over the seeds, a line a task and allocation."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for r in rows:
        by_ratio = found.setdefault((r["name"], r["allocation"]), {})
        by_ratio.setdefault(r["removed"], []).append(r["lost"])
    for (name, allocation), by_ratio in found.items():
        cells = (f"{fmean(by_ratio[r]):9.3f}" for r in sorted(by_ratio))
        print(f"{name:14} {allocation:26}", *cells)


if __name__ == "__main__":
    sys.exit(main())
