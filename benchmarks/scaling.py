"""How does the time grow with depth and width, and does a decoder of 7 billion parameters fit?

Depth: residual MLPs of 16 to 128 blocks; the exponent of the time after capture against depth.
Width: 16 blocks of width 256 to 4096; the time to analyse and plan.
Decoder: Llama-2-7B's sizes on the meta device, in a fresh process; seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import measure
import numpy as np
import torch
from measure import Row
from rich.progress import track
from torch import Tensor, nn

from depcut.analysis import Analysis, analyze
from depcut.capture.capture import capture
from depcut.coupling.infer import infer_coupling

DEPTHS = (16, 32, 64, 128)
WIDTHS = (256, 512, 1024, 2048, 4096)
SECONDS, GIBIBYTES = 20.0, 2.0


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.decoder:
        sys.stdout.write(json.dumps(decoder()) + "\n")
        return 0
    console = measure.console()

    def each(values: Iterable[Any], what: str) -> Iterable[Any]:
        return track(list(values), what, console=console)

    depth = [attempt(at_depth, n, options.repeat) for n in each(DEPTHS, "depth")]
    width = [attempt(at_width, n, options.repeat) for n in each(WIDTHS, "width")]
    runs = [attempt(fresh_decoder, i) for i in each(range(options.repeat), "decoder")]
    totals = summary(depth, width, runs)
    console.print(measure.table("Depth (residual MLP, width 256)", DEPTH, depth))
    console.print(measure.table("Width (residual MLP, 16 blocks)", WIDTH, width))
    console.print(measure.table("Llama-2-7B's sizes on the meta device", DECODER, runs))
    for key, value in totals.items():
        console.print(f"{key}: {value}")
    rows = depth + width + runs
    for row in rows:
        if "error" in row:
            console.print(f"FAIL {row['name']}: {row['error']}", style="red")
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs that a median is taken over")
    parser.add_argument("--results", default="scaling", help="name of the files under results/")
    parser.add_argument("--decoder", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def attempt(function: Callable[..., Row], *args: Any) -> Row:
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001  (the other sizes still run)
        return {"name": f"{function.__name__} {args[0]}", "error": measure.first_line(error)}


def at_depth(blocks: int, repeat: int) -> Row:
    torch.manual_seed(0)
    model, x = ResidualMLP(256, blocks).eval(), torch.randn(4, 32)
    program = capture(model, x)
    coupling = infer_coupling(program)
    plan = Analysis(model, coupling).plan(0.5, align=1)
    row = {
        "name": f"{blocks} blocks",
        "blocks": blocks,
        "groups": len(coupling.groups),
        "capture_s": measure.median_of(lambda: capture(model, x), min(repeat, 3)),
        "infer_s": measure.median_of(lambda: infer_coupling(program), repeat),
        "plan_s": measure.median_of(lambda: Analysis(model, coupling).plan(0.5, align=1), repeat),
        "apply_s": measure.median_of(lambda: plan.apply(model), repeat),
    }
    row["after_capture_s"] = measure.median_of(
        lambda: Analysis(model, infer_coupling(program)).plan(0.5, align=1).apply(model), repeat
    )
    return row


def at_width(width: int, repeat: int) -> Row:
    torch.manual_seed(0)
    model, x = ResidualMLP(width, 16).eval(), torch.randn(4, 32)
    capture_s, program = measure.timed(lambda: capture(model, x))

    def planned(score: str) -> Any:
        return Analysis(model, infer_coupling(program)).plan(0.5, align=1, score=score)

    return {
        "name": f"width {width}",
        "width": width,
        "params": measure.params_of(model),
        "capture_s": capture_s,
        "infer_s": measure.median_of(lambda: infer_coupling(program), repeat),
        "analysis_plan_random_s": measure.median_of(lambda: planned("random"), repeat),
        "analysis_plan_magnitude_s": measure.median_of(lambda: planned("magnitude"), 3),
    }


# The decoder --------------------------------------------------------------------------------------


def fresh_decoder(_: int) -> Row:
    """One run in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--decoder"], capture_output=True, text=True, check=False
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(run.stdout.splitlines()[-1])


def decoder() -> Row:
    transformers = imported()
    imports = peak()
    config = transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.ones(2, 16, dtype=torch.long)}
    start = time.perf_counter()
    analysis = analyze(model, inputs)
    analysed = time.perf_counter()
    plan = analysis.plan(0.5, score="random")
    planned = time.perf_counter()
    row = {
        "name": "Llama-2-7B",
        "params": measure.params_of(model),
        "groups": len(analysis.groups),
        "analyze_s": analysed - start,
        "plan_random_s": planned - analysed,
        "total_s": planned - start,
        "imports_gib": imports,
        "peak_gib": peak(),
        "decoder_macs_kept": plan.macs / analysis.macs,
    }
    try:
        start = time.perf_counter()
        slim = plan.apply(model)
        row["decoder_apply_s"] = time.perf_counter() - start
        row["apply_peak_gib"] = peak()
        row["params_kept"] = measure.params_of(slim) / row["params"]
        row["on_meta"] = all(p.is_meta for p in slim.parameters())
    except Exception as error:  # noqa: BLE001  (the error is the finding)
        row["apply_error"] = measure.first_line(error)
    return row


def imported() -> Any:
    """Transformers; beside a torchvision that cannot load, by way of the zoo's imports."""
    try:
        import transformers

        _ = transformers.LlamaForCausalLM
    except (ImportError, RuntimeError):
        import zoo

        return zoo.libraries()["transformers"]
    return transformers


def peak() -> float:
    """Largest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        # ru_maxrss would start from what the parent held at the fork
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# Results ------------------------------------------------------------------------------------------


def exponent(rows: list[Row], size: str, seconds: str) -> float:
    """Slope of log seconds over log size."""
    done = [r for r in rows if "error" not in r]
    if len(done) < 2:
        return float("nan")
    x, y = (np.log([r[key] for r in done]) for key in (size, seconds))
    return float(np.polyfit(x, y, 1)[0])


def summary(depth: list[Row], width: list[Row], runs: list[Row]) -> Row:
    done = [r for r in runs if "error" not in r]
    wide = [r for r in width if "error" not in r]
    out: Row = {
        f"exponent of {key} in depth": round(exponent(depth, "blocks", f"{key}_s"), 3)
        for key in ("capture", "infer", "plan", "apply", "after_capture")
    }
    if wide:
        first, last = wide[0]["analysis_plan_random_s"], wide[-1]["analysis_plan_random_s"]
        out["widest / narrowest, analysis + random plan"] = round(last / first, 2)
    if done:
        seconds = median(r["total_s"] for r in done)
        memory = max(r["peak_gib"] for r in done)
        out["decoder"] = (
            f"{seconds:.2f} s (target {SECONDS:g}), {memory:.2f} GiB (target {GIBIBYTES:g}): "
            + ("met" if seconds <= SECONDS and memory <= GIBIBYTES else "missed")
        )
        out["decoder, apply"] = done[0].get("apply_error") or (
            f"{median(r['decoder_apply_s'] for r in done):.2f} s, "
            f"{done[0]['params_kept']:.3f} of the parameters kept"
        )
    return out


def milliseconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{1e3 * row[key]:.1f}"


DEPTH = {
    "blocks": lambda r: str(r["blocks"]),
    "groups": lambda r: str(r["groups"]),
    "capture ms": milliseconds("capture_s"),
    "infer ms": milliseconds("infer_s"),
    "plan ms": milliseconds("plan_s"),
    "rewrite, verify ms": milliseconds("apply_s"),
    "after capture ms": milliseconds("after_capture_s"),
}
WIDTH = {
    "width": lambda r: str(r["width"]),
    "parameters": lambda r: f"{r['params']:,}",
    "capture ms": milliseconds("capture_s"),
    "infer ms": milliseconds("infer_s"),
    "analysis + random plan ms": milliseconds("analysis_plan_random_s"),
    "analysis + magnitude plan ms": milliseconds("analysis_plan_magnitude_s"),
}
DECODER = {
    "name": lambda r: r["name"],
    "groups": lambda r: str(r["groups"]),
    "analyze s": lambda r: f"{r['analyze_s']:.2f}",
    "plan s": lambda r: f"{r['plan_random_s']:.2f}",
    "imports GiB": lambda r: f"{r['imports_gib']:.2f}",
    "peak GiB": lambda r: f"{r['peak_gib']:.2f}",
    "MACs kept": lambda r: f"{r['decoder_macs_kept']:.4f}",
    "apply s": lambda r: f"{r['decoder_apply_s']:.2f}" if "decoder_apply_s" in r else "FAIL",
}

if __name__ == "__main__":
    sys.exit(main())
