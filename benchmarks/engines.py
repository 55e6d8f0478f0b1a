"""Does time fall with the MACs in every engine, and does of='latency' land where it was told to?

For each model and engine, on one thread: the dense model, the one with half of the MACs removed,
and the one with half of the *time* removed (by that engine's model of time), timed in turns in one
process. Printed are the realised share (speedup / ratio of MACs) and how far the time lands from
its target; an engine that is absent or fails is a row that says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import latency
import measure
import torch
from measure import Row
from torch import nn

import depcut
from depcut.analysis import Analysis
from depcut.deploy.convert import draft
from depcut.timing.backends import RUNTIMES

ENGINES = ("onnxruntime", "openvino", "torch", "torch.compile")
REMOVED = 0.5
GOAL_SHARE, GOAL_MISS = 0.95, 0.03  # of the table: at least, and at most

COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "name": lambda r: r["name"],
    "engine": lambda r: r["engine"],
    "dense ms": lambda r: f"{r['dense_ms']:.2f}",
    "MACs kept": lambda r: f"{r['macs_kept']:.3f}",
    "speedup": lambda r: f"{r['speedup']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
    "of the MACs' ratio": lambda r: f"{r['realised']:.2f}",
    "of='latency' off": lambda r: (
        f"{r['missed']:+.1%}"
        + (f" ({r['missed_low']:+.1%} to {r['missed_high']:+.1%})" if "missed_low" in r else "")
    ),
    "plan s": lambda r: f"{r['plan_s']:.0f}",
}


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = measure.console()
    for name in options.names or latency.MODELS:
        rows = measured(name, options)
        store(rows, options.results)
        console.print(measure.table(name, COLUMNS, rows))
        for row in rows:
            if "error" in row:
                console.print(f"{row['engine']}: {row['error']}")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=", ".join(latency.MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=45, help="turns of each candidate")
    parser.add_argument("--results", default="engines", help="name of the file under results/")
    return parser.parse_args()


def store(rows: list[Row], name: str) -> None:
    """Put rows in the place of those of the same models and engines."""
    fresh = {(row["name"], row["engine"]) for row in rows}
    kept = [r for r in measure.read(name)["rows"] if (r["name"], r["engine"]) not in fresh]
    every = kept + rows
    done = [row for row in every if "error" not in row]
    measure.write(
        name,
        every,
        {
            f"realised share below {GOAL_SHARE}": [
                f"{r['name']} in {r['engine']}: {r['realised']:.2f}"
                for r in done
                if r["realised"] < GOAL_SHARE
            ],
            f"of='latency' off by more than {GOAL_MISS:.0%}": [
                f"{r['name']} in {r['engine']}: {r['missed']:+.1%}"
                for r in done
                if abs(r["missed"]) > GOAL_MISS
            ],
            "CUDA and TensorRT": "not measured: no GPU",
        },
    )


def measured(name: str, options: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    model, inputs = latency.MODELS[name]()
    model.eval()
    analysis = depcut.analyze(model, inputs)
    rows = []
    for engine in options.engines:
        try:
            found = timed(analysis, inputs, engine, options.rounds)
        except depcut.DepcutError as error:
            found = {"error": measure.first_line(error)}
        rows.append({"name": name, "engine": engine, **found})
    return rows


def timed(analysis: Analysis, inputs: Any, engine: str, rounds: int) -> Row:
    """Dense, half of the MACs and half of the time, in turns in one engine."""
    by_macs = analysis.plan(REMOVED, align="auto", runtime=engine)
    started = time.perf_counter()
    by_time = analysis.plan(REMOVED, of="latency", align="auto", runtime=engine, progress=False)
    seconds = time.perf_counter() - started
    models = {"dense": analysis.model}
    models |= {n: p.apply(analysis.model) for n, p in (("macs", by_macs), ("time", by_time))}
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        candidates = candidates_of(models, inputs, engine, Path(folder))
        result = depcut.bench(candidates, inputs, runtime=engine, rounds=rounds)
    speedup, reached = (result.speedup("dense", n) for n in ("macs", "time"))
    macs_kept = by_macs.macs / analysis.macs
    return {
        "runtime": result.runtime,
        "dense_ms": 1e3 * result.timings["dense"].median,
        "macs_kept": macs_kept,
        "speedup": speedup.ratio,
        "low": speedup.low,
        "high": speedup.high,
        "realised": speedup.ratio * macs_kept,
        "missed": missed(reached.ratio),
        "missed_low": missed(reached.high),
        "missed_high": missed(reached.low),
        "candidates": by_time.settings["latency"]["candidates"],
        "plan_s": round(seconds, 1),
        "unstable": bool(result.warning),
        "load": round(os.getloadavg()[0], 1),
    }


def missed(speedup: float) -> float:
    """By what share of its target a model takes longer that is so many times as fast."""
    return 1 / speedup / (1 - REMOVED) - 1


def candidates_of(
    models: Mapping[str, nn.Module], inputs: Any, engine: str, folder: Path
) -> dict[str, Any]:
    """What the engine takes: models, or files that were only converted."""
    if RUNTIMES[engine].in_place:
        return dict(models)
    for name, model in models.items():
        draft(model, inputs, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in models}


if __name__ == "__main__":
    sys.exit(main())
