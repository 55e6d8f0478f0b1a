"""What do fewer MACs win in time, and does depcut know beforehand? onnxruntime, one thread.

For each model: dense, slim at 25, 50 and 75 % of the MACs removed with widths as they come and in
multiples of 8, and at the same shares of the *time* removed; Torch-Pruning's results at the same
MACs where it completes; ten random plans, predicted and measured; and the score that is kept at
equal measured time. All candidates of a model are timed in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import zoo
from measure import Row
from torch import nn

import depcut
from depcut.allocate.choose import Chooser, Request
from depcut.allocate.space import space
from depcut.analysis import Analysis
from depcut.apply.plan import Plan
from depcut.deploy.convert import draft
from depcut.latency.designs import designs
from depcut.latency.model import LatencyModel
from depcut.plan.preferences import preferences

REMOVED = (0.25, 0.5, 0.75)
PEER_LIMIT = 150.0  # seconds
RANDOM_SEED = 1234  # not the seed of the widths that the model of time was made from


def resnet50() -> tuple[nn.Module, Any]:
    return zoo.libraries()["torchvision"].models.resnet50(weights=None), torch.randn(1, 3, 224, 224)


def mobilenet_v2() -> tuple[nn.Module, Any]:
    models = zoo.libraries()["torchvision"].models
    return models.mobilenet_v2(weights=None), torch.randn(1, 3, 224, 224)


def vit_b_16() -> tuple[nn.Module, Any]:
    return zoo.libraries()["torchvision"].models.vit_b_16(weights=None), torch.randn(1, 3, 224, 224)


def bert_base() -> tuple[nn.Module, Any]:
    transformers = zoo.libraries()["transformers"]
    return transformers.BertModel(transformers.BertConfig()), torch.randint(0, 30522, (1, 128))


def llama_block() -> tuple[nn.Module, Any]:
    transformers = zoo.libraries()["transformers"]
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
    )
    return transformers.LlamaModel(config), torch.randint(0, 1000, (1, 128))


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "vit_b_16": vit_b_16,
    "bert_base": bert_base,
    "llama_block": llama_block,
}

COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "name": lambda r: r["name"],
    "candidate": lambda r: r["candidate"],
    "MACs kept": lambda r: f"{r['macs_kept']:.3f}",
    "time ms": lambda r: f"{r['ms']:.2f}",
    "speedup": lambda r: f"{r['speedup']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
    "of the MACs' ratio": lambda r: f"{r['realised']:.2f}",
    "score kept": lambda r: f"{r['score_kept']:.3f}" if "score_kept" in r else "",
}


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console, results = measure.console(), Results(options.results)
    for name in options.names or MODELS:
        console.rule(name)
        try:
            rows, facts = measured(name, options)
        except depcut.DepcutError as error:
            rows, facts = [{"name": name, "error": measure.first_line(error)}], {}
        results.add(name, rows, facts)
        console.print(measure.table(name, COLUMNS, rows))
        for key, value in facts.items():
            console.print(f"{key}: {value}")
    return int(any("error" in row for row in results.rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each candidate")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--results", default="latency", help="name of the files under results/")
    return parser.parse_args()


class Results:
    """Rows and facts of the models measured so far, those of earlier runs kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        data = measure.read(name)
        self.rows: list[Row] = data["rows"]
        self.facts: dict[str, Any] = data["summary"]

    def add(self, name: str, rows: list[Row], facts: Mapping[str, Any]) -> None:
        self.rows = [row for row in self.rows if row["name"] != name] + rows
        self.facts = {k: v for k, v in self.facts.items() if not k.startswith(f"{name}: ")}
        self.facts |= {f"{name}: {key}": value for key, value in facts.items()}
        measure.write(self.name, self.rows, self.facts)


def measured(name: str, options: argparse.Namespace) -> tuple[list[Row], Row]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    analysis = depcut.analyze(model, inputs)
    started = time.perf_counter()
    times = analysis.latency(refresh=True)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        candidates = Candidates(name, analysis, inputs, Path(folder))
        rows = compared(candidates, options)
        predicted = random_plans(candidates, times, options)
        equal = equal_time(candidates, times, options)
    at_half = {r["candidate"]: r for r in rows}
    landed = {
        f"{removed:.0%}": round(row["ms"] / row["dense_ms"] / (1 - removed) - 1, 4)
        for removed in REMOVED
        if (row := at_half.get(f"latency, {removed:.0%} removed"))
    }
    return rows, {
        "seconds to make the model of time": round(seconds, 1),
        "its largest error where it was fitted": round(float(np.abs(times.errors).max()), 4),
        "its errors on ten random plans": [round(e, 4) for e in predicted],
        "largest of these": round(max(map(abs, predicted)), 4),
        "share realised at 50 % of the MACs, multiples of 8": round(
            at_half["aligned, 50% removed"]["realised"], 3
        ),
        "the same, widths as they come": round(at_half["unaligned, 50% removed"]["realised"], 3),
        "of='latency' off its target": landed,
        **equal,
    }


class Candidates:
    """Files to time, each with what is known of it."""

    def __init__(self, name: str, analysis: Analysis, inputs: Any, folder: Path) -> None:
        self.name, self.analysis, self.inputs, self.folder = name, analysis, inputs, folder
        request = Request(allocation="uniform")
        self.scores = Chooser(analysis.coupling, analysis.model, request).scores
        self.dense = folder / "dense.onnx"
        draft(analysis.model, inputs, self.dense)

    def write(self, plan: Plan, file: str) -> Path:
        path = self.folder / f"{file}.onnx"
        draft(plan.apply(self.analysis.model), self.inputs, path)
        return path

    def score_kept(self, plan: Plan) -> float:
        """Share of each group's score that stays, averaged over the groups."""
        groups = zip(self.analysis.groups, self.scores, strict=True)
        shares = [
            np.take_along_axis(s, plan.kept[g.name], axis=-1).sum() / s.sum()
            if g.name in plan.kept
            else 1.0
            for g, s in groups
        ]
        return float(np.mean(shares))

    def time(self, files: Mapping[str, Path], rounds: int) -> Any:
        return depcut.bench({"dense": self.dense, **files}, self.inputs, rounds=rounds)


def compared(candidates: Candidates, options: argparse.Namespace) -> list[Row]:
    """Dense, slim in all ways, and the peer, in turns."""
    analysis = candidates.analysis
    files: dict[str, Path] = {}
    known: dict[str, Row] = {"dense": {"macs_kept": 1.0, "score_kept": 1.0}}
    for label, plan in plans(analysis):
        files[label] = candidates.write(plan, f"slim{len(files)}")
        known[label] = {
            "macs_kept": plan.macs / analysis.macs,
            "score_kept": candidates.score_kept(plan),
        }
    failures = []
    for label, arguments in () if options.no_peer else peers():
        path = candidates.folder / f"peer{len(files)}.onnx"
        found = peer(candidates.name, path, *arguments)
        if "error" in found:
            failures.append({"name": candidates.name, "candidate": label, **found})
        else:
            files[label], known[label] = path, found
    result = candidates.time(files, options.rounds)
    dense = result.timings["dense"].median
    rows = []
    for label, facts in known.items():
        speedup = result.speedup("dense", label)
        rows.append(
            {
                "name": candidates.name,
                "candidate": label,
                **facts,
                "ms": 1e3 * result.timings[label].median,
                "dense_ms": 1e3 * dense,
                "speedup": speedup.ratio,
                "low": speedup.low,
                "high": speedup.high,
                "realised": speedup.ratio * facts["macs_kept"],
            }
        )
    return rows + failures


def plans(analysis: Analysis) -> Iterator[tuple[str, Plan]]:
    for removed in REMOVED:
        yield f"unaligned, {removed:.0%} removed", analysis.plan(removed, align=1)
        yield f"aligned, {removed:.0%} removed", analysis.plan(removed)
        yield f"latency, {removed:.0%} removed", analysis.plan(removed, of="latency")


def peers() -> Iterator[tuple[str, tuple[float, int]]]:
    for removed in REMOVED:
        yield f"Torch-Pruning, {removed:.0%} removed", (1 - removed, 1)
        yield f"Torch-Pruning round_to=8, {removed:.0%} removed", (1 - removed, 8)


def peer(name: str, path: Path, macs_kept: float, round_to: int) -> Row:
    """Torch-Pruning's result, made and exported in a process of its own."""
    script = Path(__file__).with_name("latency_peer.py")
    command = [sys.executable, str(script), name, str(path), str(macs_kept), str(round_to)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEER_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {PEER_LIMIT:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def random_plans(
    candidates: Candidates, times: LatencyModel, options: argparse.Namespace
) -> list[float]:
    """Relative errors of the prediction on ten plans with random widths."""
    coupling = candidates.analysis.coupling
    steps = space(coupling, 8, set(), preferences(coupling).ties)
    drawn = designs(steps, 12, RANDOM_SEED)[2:]
    files, expected = {}, {}
    for number, counts in enumerate(drawn):
        kept = {
            group.name: np.arange(n)
            for group, n in zip(coupling.groups, counts, strict=True)
            if n < group.size
        }
        plan = candidates.analysis.plan_keeping(kept)
        files[str(number)] = candidates.write(plan, f"random{number}")
        expected[str(number)] = times.predict(plan) / times.dense_seconds
    result = candidates.time(files, options.rounds)
    for path in files.values():
        path.unlink()
    return [e * result.speedup("dense", label).ratio - 1 for label, e in expected.items()]


def equal_time(candidates: Candidates, times: LatencyModel, options: argparse.Namespace) -> Row:
    """Score kept by both allocations when they take the same measured time (half of the dense)."""
    analysis = candidates.analysis
    by_time = analysis.plan(0.5, of="latency")
    goal = times.predict(by_time)
    own = candidates.write(by_time, "by_time")
    for _ in range(4):
        by_macs = uniform_at(analysis, times, goal)
        files = {"time": own, "MACs": candidates.write(by_macs, "by_macs")}
        result = candidates.time(files, options.rounds)
        ratio = result.speedup("time", "MACs").ratio  # above 1: the MACs plan is faster
        if abs(ratio - 1) < 0.01:
            break
        goal *= ratio
    return {
        "at half of the time, score kept by of='latency'": round(candidates.score_kept(by_time), 4),
        "and by of='macs' at equal time": round(candidates.score_kept(by_macs), 4),
        "time of the latter / of the former": round(1 / ratio, 4),
    }


def uniform_at(analysis: Analysis, times: LatencyModel, seconds: float) -> Plan:
    """The plan of a MACs budget that is predicted to take so long."""
    low, high = 0.02, 0.98
    for _ in range(16):
        middle = (low + high) / 2
        plan = analysis.plan(middle)
        if times.predict(plan) > seconds:
            low = middle
        else:
            high = middle
    return plan


if __name__ == "__main__":
    sys.exit(main())
