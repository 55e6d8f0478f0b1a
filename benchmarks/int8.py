"""Pruned, quantized, or both: what is left of the metric, the file and the time of one call?

The trained tasks (accuracy_tasks.py, seed 0) lose 30, 50 and 70 % of their MACs with data;
ResNet-50, MobileNetV2 and BERT-base, with random weights, half of them without, and have no metric
but their distance from the float file. Every file is made by `depcut.export`, the int8 ones with
`quantize="int8"`, which takes only what the runtime's own profile shows to compute in int8; all
files of a net are timed in turns, in one process, one thread, batch 1. Rows of other nets stay.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
import zoo
from accuracy_tasks import TASKS
from measure import Row
from torch import Tensor, nn

import depcut
from depcut.deploy.export import ExportReport
from depcut.deploy.runtime import open_session

REMOVED = (0.3, 0.5, 0.7)
BATCHES, BATCH_SIZE = 8, 32  # calibration of pruning and of quantization, of tasks
SIZE_BATCHES = 4  # of nets with random weights, of noise


@dataclass(frozen=True)
class Net:
    """A dense net and what it is judged on; without a task there is no metric."""

    model: nn.Module
    inputs: Any
    data: Sequence[Any]
    task: Any = None


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    console = measure.console()
    rows = [
        row for row in measure.read(options.results)["rows"] if row["name"] not in options.names
    ]
    for name in options.names:
        rows += attempt(name, options)
    order = list(NETS)
    rows.sort(key=lambda row: order.index(row["name"]))
    for name in options.names:
        own = [row for row in rows if row["name"] == name]
        console.print(measure.table(name, COLUMNS, own))
    totals = summary(rows)
    for key, value in totals.items():
        console.print(f"{key}: {value}")
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NETS), help=f"of {', '.join(NETS)}")
    parser.add_argument("--rounds", type=int, default=30, help="turns that every file has")
    parser.add_argument("--results", default="int8", help="name of the file under results/")
    options = parser.parse_args()
    unknown = set(options.names) - NETS.keys()
    if unknown:
        parser.error(f"no such net: {', '.join(sorted(unknown))}")
    return options


def attempt(name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one net; a failure becomes a row, too."""
    try:
        return of_net(name, options)
    except Exception as error:  # noqa: BLE001  (whatever a net does, the others still run)
        return [{"name": name, "variant": "none", "error": measure.first_line(error)}]


def of_task(name: str) -> Net:
    task = TASKS[name]
    data = task.calibration(0, BATCHES, BATCH_SIZE)
    return Net(task.trained(0), task.example()[:1], data, task)


def of_torchvision(name: str) -> Net:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    batches = [torch.randn(8, 3, 224, 224) for _ in range(SIZE_BATCHES)]
    return Net(settled(model, batches), batches[0][:1], batches)


def of_bert() -> Net:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False).eval()
    batches = [{"input_ids": torch.randint(0, 30_000, (2, 128))} for _ in range(SIZE_BATCHES)]
    return Net(model, {"input_ids": batches[0]["input_ids"][:1]}, batches)


@torch.no_grad()
def settled(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Batch norms know what they read, or the layers behind them would see made-up sizes."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    for batch in batches:
        model(batch)
    return model.eval()


NETS = {
    "digits_resnet": lambda: of_task("digits_resnet"),
    "digits_vit": lambda: of_task("digits_vit"),
    "char_gpt": lambda: of_task("char_gpt"),
    "resnet50": lambda: of_torchvision("resnet50"),
    "mobilenet_v2": lambda: of_torchvision("mobilenet_v2"),
    "bert-base": of_bert,
}


def of_net(name: str, options: argparse.Namespace) -> list[Row]:
    zoo.libraries()
    net = NETS[name]()
    models: dict[str, tuple[float, nn.Module]] = {"dense": (0.0, net.model)}
    for removed in REMOVED if net.task else (0.5,):
        data = net.data if net.task else None
        slim = depcut.shrink(net.model, removed, net.inputs, data=data)
        models[f"slim {removed:.0%}"] = (removed, slim)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = exported(models, net, Path(folder))
        files = {variant: report.path for variant, report in reports.items()}
        timed = depcut.bench(files, net.inputs, rounds=options.rounds)
        dense_macs = depcut.compare(net.model, net.model, net.inputs, runtime=None).dense.macs
        rows = []
        for variant, report in reports.items():
            removed, model = models[variant.removesuffix(" int8")]
            macs = depcut.compare(model, model, net.inputs, runtime=None).dense.macs
            latency, faster = timed.at(variant).latency, timed.speedup("dense", variant)
            rows.append(
                {
                    "name": name,
                    "variant": variant,
                    "removed": removed,
                    "macs_kept": macs / dense_macs,
                    **of_file(report),
                    "ms": 1e3 * latency.median,
                    "ms_low": 1e3 * latency.low,
                    "ms_high": 1e3 * latency.high,
                    "speedup": faster.ratio,
                    "speedup_low": faster.low,
                    "speedup_high": faster.high,
                    "metric": net.task.metric(InRuntime(report)) if net.task else None,
                }
            )
    return rows


def exported(
    models: Mapping[str, tuple[float, nn.Module]], net: Net, folder: Path
) -> dict[str, ExportReport]:
    """A float and an int8 file of every model."""
    reports = {}
    for variant, (_, model) in models.items():
        stem = folder / variant.replace(" ", "_").replace("%", "")
        reports[variant] = depcut.export(model, stem.with_suffix(".onnx"), net.inputs)
        reports[f"{variant} int8"] = depcut.export(
            model,
            stem.with_name(f"{stem.name}_int8.onnx"),
            net.inputs,
            quantize="int8",
            data=net.data,
        )
    return reports


def of_file(report: ExportReport) -> Row:
    """What a report says of its file."""
    found = report.quantization
    if found is None:
        return {"bytes": report.bytes}
    return {
        "bytes": report.bytes,
        "scheme": found.scheme,
        "int8_kernels": sum(found.kernels.values()),
        "int8_share": found.share,
        "rms_error": found.rms_error,
        "max_rel_error": found.max_rel_error,
        "corrected": int(found.corrected),
        "seven_bits": int(found.seven_bits),
    }


class InRuntime(nn.Module):
    """A file with one input and one output, called as a module."""

    def __init__(self, report: ExportReport) -> None:
        super().__init__()
        self.session, self.name = open_session(report.path), report.inputs[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


def summary(rows: Sequence[Row]) -> Row:
    """What pruning, quantizing, and quantizing after pruning cost each task."""
    found: Row = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        by_variant = {row["variant"]: row for row in rows if row["name"] == name}
        if name not in TASKS or "dense" not in by_variant:
            continue
        sign = 1 if TASKS[name].higher_is_better else -1
        metric = {v: sign * row["metric"] for v, row in by_variant.items()}
        for slim in [v for v in metric if v.startswith("slim") and not v.endswith("int8")]:
            pruning = metric["dense"] - metric[slim]
            alone = metric["dense"] - metric["dense int8"]
            after = metric[slim] - metric[f"{slim} int8"]
            found[f"{name}, {slim}"] = {
                "lost by pruning": pruning,
                "lost by int8 alone": alone,
                "lost by int8 after pruning": after,
                "no more than int8 alone and pruning's own loss": after <= alone + max(pruning, 0),
            }
    return found


def number(key: str, form: str) -> measure.Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


COLUMNS = {
    "": lambda r: r["variant"],
    "MACs kept": number("macs_kept", ".3f"),
    "metric": number("metric", ".3f"),
    "file, kB": lambda r: f"{r['bytes'] / 1e3:.1f}",
    "ms": lambda r: f"{r['ms']:.3f} ({r['ms_low']:.3f} to {r['ms_high']:.3f})",
    "times dense": lambda r: (
        f"{r['speedup']:.2f} ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})"
    ),
    "scheme": lambda r: r.get("scheme") or "",
    "int8 kernels": number("int8_kernels", "d"),
    "of the products": number("int8_share", ".0%"),
    "rms error": number("rms_error", ".1e"),
    "largest": number("max_rel_error", ".1e"),
}

if __name__ == "__main__":
    sys.exit(main())
