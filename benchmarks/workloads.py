"""Does a budget of several kinds of call come to its sum, and what would one kind alone have given?

ResNet-50: one image, eight images, and eight on two threads. A decoder of two layers: a prompt of
128 tokens and 64 steps behind it, with their cache. Two fifths of the summed time are removed in
onnxruntime, once for all kinds together and once for the first alone; all of them are then timed in
turns with the dense model in each kind of call, in one process.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import measure
import torch
import zoo
from measure import Row
from torch import nn

import depcut
from depcut.analysis import Analysis
from depcut.integrations import decoding_step
from depcut.latency.measure import temporary
from depcut.latency.workload import Benches, workload
from depcut.options import Options

REMOVED, ROUNDS = 0.4, 15
PROMPT, STEPS = 128, 64

Case = tuple[nn.Module, Any, dict[str, Any]]


def images() -> Case:
    model = zoo.libraries()["torchvision"].models.resnet50(weights=None)
    kinds = {
        "one image": {"times": 8},
        "eight images": {"batch_size": 8},
        "eight, two threads": {"batch_size": 8, "threads": 2},
    }
    return model, torch.randn(1, 3, 224, 224), kinds


def decoder() -> Case:
    transformers = zoo.libraries()["transformers"]
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT))
    kinds = {"prompt": {}, "step": decoding_step(prompt, times=STEPS)}
    return transformers.LlamaForCausalLM(config), {"input_ids": prompt}, kinds


CASES: Mapping[str, Callable[[], Case]] = {"resnet50": images, "llama_2_layers": decoder}

COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "name": lambda r: r["name"],
    "calls": lambda r: r["call"],
    "times": lambda r: f"{r['times']:g}",
    "dense ms": lambda r: f"{r['dense_ms']:.2f}",
    "left, planned for all": lambda r: f"{r['left_all']:.3f}",
    "left, planned for the first": lambda r: f"{r['left_first']:.3f}",
}


def main() -> int:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = measure.console()
    kept = [r for r in measure.read(options.results)["rows"] if r["name"] not in options.names]
    rows = kept + [row for name in options.names for row in of_case(name, options)]
    console.print(measure.table("Budgets of several kinds of call", COLUMNS, rows))
    totals = {
        f"{row['name']}: the sum, off its target": f"{row['left_all'] / (1 - REMOVED) - 1:+.1%}"
        for row in rows
        if row["call"] == "sum"
    }
    for key, value in totals.items():
        console.print(f"{key}: {value}")
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--runtime", default="onnxruntime", help="what runs the models")
    parser.add_argument("--results", default="workloads", help="name of the file under results/")
    options = parser.parse_args()
    unknown = set(options.names) - CASES.keys()
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    return options


def of_case(name: str, options: argparse.Namespace) -> list[Row]:
    """A row a kind of call, and one of their sum."""
    torch.manual_seed(0)
    model, inputs, kinds = CASES[name]()
    analysis = depcut.analyze(model.eval(), inputs)
    chosen = Options(of="latency", workload=kinds, runtime=options.runtime, progress=False)
    for_all = analysis.plan(REMOVED, options=chosen)
    first = {kind: kinds[kind] for kind in list(kinds)[:1]}
    for_first = analysis.plan(
        REMOVED, of="latency", workload=first, runtime=options.runtime, progress=False
    )
    return timed(analysis, name, chosen, (for_all.apply(model), for_first.apply(model)))


def timed(
    analysis: Analysis, name: str, chosen: Options, models: tuple[nn.Module, nn.Module]
) -> list[Row]:
    """Both smaller models beside the dense one, in each kind of call and all together."""
    calls = workload(chosen, analysis.model, analysis.inputs, analysis.latency)
    with temporary() as folder:
        benches = Benches(analysis.model, calls, folder)
        both = [benches.beside(slim, ROUNDS) for slim in models]
    lines = [
        (call.name, call.times, of_all.dense_seconds, of_all.ratio, of_first.ratio)
        for (call, of_all), (_, of_first) in zip(both[0].parts, both[1].parts, strict=True)
    ]
    lines.append(("sum", 1.0, both[0].dense_seconds, both[0].ratio, both[1].ratio))
    keys = ("call", "times", "dense_s", "left_all", "left_first")
    rows: list[Row] = [{"name": name, **dict(zip(keys, line, strict=True))} for line in lines]
    for row in rows:
        row["dense_ms"] = 1e3 * row.pop("dense_s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
