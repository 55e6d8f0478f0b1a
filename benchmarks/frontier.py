"""How much more do ten ratios of a frontier take than one plan?

Both read the same calibration data, score by obs and choose from the same analysis; nothing is
applied. In turns in this process on one thread, after one turn that does not count; medians of
processor seconds of the process, since other programs may share the machine. The nets are those of
calibration_time.py. Rows are written to results/frontier.json; the target is 1.3.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import measure
import numpy as np
import torch
import zoo
from calibration_time import NETS
from measure import Row

import depcut

RATIOS = tuple(round(float(ratio), 2) for ratio in np.linspace(0.08, 0.8, 10))
TARGET = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batches", type=int, help="of the data; all when left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    zoo.libraries()
    rows = [measured(name, options.repeat, options.batches) for name in options.nets]
    measure.write("frontier", rows, {row["name"]: row["times"] for row in rows})
    measure.console().print(measure.table("ten ratios against one", COLUMNS, rows))
    return 0


def measured(name: str, repeat: int, batches: int | None) -> Row:
    model, data = NETS[name]()
    data = data[:batches]
    analysis = depcut.analyze(model, data[0])
    rest: dict[str, Any] = {"data": data, "batches": len(data), "progress": False}
    plans: list[int] = []

    def one() -> None:
        analysis.plan(0.5, **rest)

    def ten() -> None:
        plans.append(len(analysis.frontier(RATIOS, **rest)))

    candidates = [seconds(one), seconds(ten)]
    measure.interleaved(candidates, 1)
    alone, family = measure.interleaved(candidates, repeat)
    print(name, [round(s, 2) for s in alone], [round(s, 2) for s in family], flush=True)
    times = median(b / a for a, b in zip(alone, family, strict=True))
    return {
        "name": name,
        "plans": min(plans),
        "batches": len(data),
        "one_s": median(alone),
        "ten_s": median(family),
        "times": times,
        "target": TARGET,
    }


def seconds(function: Callable[[], None]) -> Callable[[], float]:
    """Processor seconds of a call."""

    def taken() -> float:
        with measure.without_collection():
            start = time.process_time()
            function()
            return time.process_time() - start

    return taken


COLUMNS: dict[str, Callable[[Row], str]] = {
    "net": lambda row: row["name"],
    "batches": lambda row: str(row["batches"]),
    "plans": lambda row: str(row["plans"]),
    "one, s": lambda row: f"{row['one_s']:.2f}",
    "ten, s": lambda row: f"{row['ten_s']:.2f}",
    "times": lambda row: f"{row['times']:.3f}",
    "at most": lambda row: f"{row['target']:.1f}",
}


if __name__ == "__main__":
    sys.exit(main())
