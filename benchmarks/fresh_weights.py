"""Is it told apart whether weights were trained or are as they were drawn?

    python benchmarks/fresh_weights.py [--steps 25 50 100 200 400] [--seeds 0]

Drawn: the 54 architectures of `tests/zoo.py` as their libraries initialise them, and the nets of
accuracy_tasks.py; each that is taken for trained is a miss. Trained: the nets of accuracy_tasks.py
without batch norms, at the end of their training and after so many of its steps; each that is taken
for drawn is a false alarm. Printed: both counts, and for each net the share of its matrices that
stand out. Only trained nets that are in the cache are looked at, and nets of the shortest trainings
are trained anew.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import measure
import torch
import zoo
from accuracy_tasks import TASKS, Recipe, Task, train
from torch import nn
from walk_accuracy import LLAMA

import depcut
from depcut.capture.program import Program
from depcut.synthetic.fresh import fresh, share_standing_out

NAMES = ("digits_vit", "char_gpt", "char_lstm")


def row(name: str, model: nn.Module, program: Program, trained: bool) -> measure.Row:
    """What is said of one net, and what it is."""
    taken = not fresh(program, model)
    out = {"name": name, "trained": trained, "taken_for_trained": taken}
    out["standing_out"] = round(share_standing_out(program, model), 3)
    print(out, flush=True)
    return out


def after(task: Task, steps: int, seed: int) -> nn.Module:
    """A net after the first steps of its training."""
    torch.manual_seed(seed)
    model = task.build()
    recipe = Recipe(steps, task.recipe.batch, task.recipe.rate)
    short = Task(task.name, task.build, task.data, recipe, task.loss)
    train(short, model, seed)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", nargs="*", type=int, default=[25, 50, 100, 200, 400])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    zoo.libraries()
    warnings.simplefilter("ignore")
    rows = []
    for name, member in zoo.ZOO.items():
        model = zoo.build(name)
        rows.append(row(name, model, depcut.analyze(model, member.inputs(2)).program, False))
    for task in (*(TASKS[name] for name in NAMES), LLAMA):
        torch.manual_seed(0)
        model = task.build().eval()
        program = depcut.analyze(model, task.example()).program
        rows.append(row(f"{task.name}, drawn", model, program, False))
        for seed in options.seeds:
            for steps in options.steps:
                if task.name == "digits_vit":  # seconds each; the others take minutes
                    name = f"{task.name}, seed {seed}, {steps} steps"
                    rows.append(row(name, after(task, steps, seed), program, True))
            if task.path(seed).exists():
                rows.append(row(f"{task.name}, seed {seed}", task.trained(seed), program, True))
    misses = [r["name"] for r in rows if not r["trained"] and r["taken_for_trained"]]
    alarms = [r["name"] for r in rows if r["trained"] and not r["taken_for_trained"]]
    drawn = sum(not r["trained"] for r in rows)
    facts = {
        "drawn, taken for trained": f"{len(misses)} of {drawn} {misses}",
        "trained, taken for drawn": f"{len(alarms)} of {len(rows) - drawn} {alarms}",
    }
    for what, found in facts.items():
        print(f"{what}: {found}")
    measure.write("fresh_weights", rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
