"""Does what a pass over the data may hold change how much of the metric is left?

    python benchmarks/walk_accuracy.py [--seeds 0] [--tasks char_gpt char_llama]

A character GPT and a character Llama (transformers' class), trained as in accuracy_tasks.py, lose
half of their MACs by obs with compensation: once with all that a pass computes in memory, once with
4 MiB of it, so that it walks through many stretches and keeps the rest in files. Printed: the dense
validation loss, both others, how far the weights are apart, and the stretches of either walk.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import measure
import torch
import zoo
from accuracy_nets import CharLlama
from accuracy_tasks import CONTEXT, RARE, TASKS, Recipe, Task, Text

import depcut
from depcut.calibration.backward import Backward

LLAMA = Task(
    "char_llama",
    lambda: CharLlama(RARE + 1, CONTEXT),
    Text(),
    Recipe(steps=2800, batch=16, rate=3e-3),
)
EVERY = {"char_gpt": TASKS["char_gpt"], "char_llama": LLAMA}
MEMORY = ("16GiB", "4MiB")


def stretches(
    task: Task, model: torch.nn.Module, memory: str, seed: int
) -> tuple[int, float, dict]:
    """Stretches of the walk back, the loss of the smaller model, and its weights."""
    seen: list[int] = []
    plain = Backward.stretches

    def counted(self: Backward, *given: object) -> object:
        seen.append(len(self.cuts) + 1)
        return plain(self, *given)  # type: ignore[arg-type]

    Backward.stretches = counted  # type: ignore[method-assign,assignment]
    try:
        pairs = task.calibration(seed, 8, 32)
        slim = depcut.shrink(
            model, 0.5, task.example(), data=pairs, align=1, seed=seed, memory=memory,
            progress=False,
        )  # fmt: skip
    finally:
        Backward.stretches = plain  # type: ignore[method-assign]
    return seen[0], task.metric(slim), slim.state_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tasks", nargs="+", choices=EVERY, default=list(EVERY))
    options = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.tasks:
        for seed in options.seeds:
            model = EVERY[name].trained(seed)
            row = {"name": name, "seed": seed, "dense": round(EVERY[name].metric(model), 5)}
            found = [stretches(EVERY[name], model, memory, seed) for memory in MEMORY]
            for memory, (count, metric, _) in zip(MEMORY, found, strict=True):
                row[f"{memory}: stretches"] = count
                row[f"{memory}: loss"] = round(metric, 5)
            (_, _, one), (_, _, other) = found
            same = one.keys() == other.keys() and all(one[n].shape == other[n].shape for n in one)
            row["weights"] = (
                max(float((one[n].double() - other[n].double()).abs().max()) for n in one)
                if same
                else float("inf")
            )
            rows.append(row)
            print(row, flush=True)
            measure.write("walk_accuracy", rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
