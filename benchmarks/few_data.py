"""Does it pay to mix a few real examples with made ones?

    python benchmarks/few_data.py [--tasks digits_resnet few_resnet char_gpt] [--few 4 16 64]

Half of the MACs are removed without retraining: by a few real examples alone, by what `data="auto"`
makes, by both together, and by 256 real examples. Printed: what each loses of the metric.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import measure
import torch
import zoo
from no_data import TASKS, metric_lost

import depcut
from depcut.calibration.self_made import self_made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ["digits_resnet", "few_resnet", "char_gpt"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=names)
    parser.add_argument("--few", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[measure.Row] = []
    for name in options.tasks:
        for seed in options.seeds:
            task = TASKS[name]
            model, example = task.trained(seed), task.example()
            analysis = depcut.analyze(model, example)
            made = self_made(analysis.coupling, model, seed=seed, progress=False).calibration
            if made is None:
                continue
            items = [made.arguments(batch)[0][0] for batch in made.batches]
            real = [inputs for inputs, _ in task.calibration(seed, 8, 32)]
            sets: dict[str, Any] = {"made": items, "256 real": real}
            for few in options.few:
                some = list(torch.cat(real)[:few].split(16))
                sets |= {f"{few} real": some, f"{few} real and made": [*some, *items]}
            row: measure.Row = {"name": name, "seed": seed}
            for what, data in sets.items():
                slim = depcut.shrink(
                    model, 0.5, example, data=data, batches=len(data), align=1, progress=False
                )
                row[what] = metric_lost(task, model, slim)
            print(row, flush=True)
            rows.append(row)
    measure.write("few_data", rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
