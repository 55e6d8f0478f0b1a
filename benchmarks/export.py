"""Do all public architectures export, dense and halved, and is the file halved with the weights?

For every member of the open zoo, as it is and after `depcut.shrink` by half of the MACs: an ONNX
file that onnx.checker accepts and that agrees with PyTorch in onnxruntime at two batch sizes; and
the bytes of the two files beside those of parameters, buffers and the files' constants. Random
weights are livened up first, or some members would answer the same to every input. Widths are cut
freely (rebuildable=False).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

import measure
import onnx
import torch
import zoo
from measure import Row
from rich.progress import track
from torch import nn

import depcut
from depcut.deploy.export import ExportReport

# How far the share of the file's bytes may be from the share of the model's own tensors.
TOLERANCE = 0.02


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    names = [n for n in zoo.ZOO if any(fnmatchcase(n, p) for p in options.names)]
    console = measure.console()
    rows = [attempt(name) for name in track(names, "open zoo", console=console)]
    rows = [*kept(options.results, names), *rows] if options.add else rows
    rows.sort(key=lambda row: list(zoo.ZOO).index(row["name"]))
    totals = summary(rows)
    console.print(measure.table("ONNX export", COLUMNS, rows))
    for row in rows:
        if "error" in row:
            console.print(f"FAIL {row['name']}: {row['error']}", style="red")
    console.print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in totals.items()))
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="globs over members; default: all")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of other members in the written results"
    )
    parser.add_argument("--results", default="export", help="name of the files under results/")
    return parser.parse_args()


def kept(results: str, names: list[str]) -> list[Row]:
    """Rows of an earlier run, of members that this one leaves out."""
    return [row for row in measure.read(results)["rows"] if row["name"] not in names]


def attempt(name: str) -> Row:
    """The row of one member; a failure becomes a row, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return examine(name)
        except Exception as error:  # noqa: BLE001  (whatever a member does, the others still run)
            return {"name": name, "error": measure.first_line(error)}


def examine(name: str) -> Row:
    inputs, model = zoo.ZOO[name].inputs(2), zoo.build(name)
    liven(model, inputs)
    slim = depcut.shrink(model, 0.5, inputs, rebuildable=False)
    response = min(map(spread, (measure.outputs(m, inputs) for m in (model, slim))))
    with tempfile.TemporaryDirectory() as folder:
        dense_s, dense = sides(model, depcut.export(model, Path(folder) / "dense.onnx", inputs))
        slim_s, narrow = sides(slim, depcut.export(slim, Path(folder) / "slim.onnx", inputs))
    row = {
        "name": name,
        "opset": dense["opset"],
        "batches": sorted({*dense["batches"], *narrow["batches"]}),
        "response": response,
        "error_largest": max(dense["error"], narrow["error"]),
        "dense_s": dense_s,
        "slim_s": slim_s,
        **{f"dense_{key}": dense[key] for key in COUNTED},
        **{f"slim_{key}": narrow[key] for key in COUNTED},
        **{f"{key}_kept": narrow[key] / dense[key] for key in COUNTED},
    }
    row["off"] = row["file_kept"] - row["tensors_kept"]
    # what is no tensor of the model (the graph itself, tables made of image sizes) stays as it is
    lost = {key: row[f"dense_{key}"] - row[f"slim_{key}"] for key in ("file", "tensors")}
    row["unexplained"] = (lost["file"] - lost["tensors"]) / row["dense_file"]
    row["origin"] = narrow["origin"]
    for text, holds in {
        f"two inputs' outputs differ by {response:.1e} only": response > 1e-3,
        "one file fixes its batch size": len(dense["batches"]) == len(narrow["batches"]) == 2,
        "the operator sets differ": dense["opset"] == narrow["opset"],
        "the slim file does not name its plan": "plan_digest" in narrow["origin"],
        "the slim file is not the smaller one": row["file_kept"] < 1,
        f"the file lost {row['unexplained']:+.3f} of its bytes more than the tensors": abs(
            row["unexplained"]
        )
        <= TOLERANCE,
    }.items():
        if not holds:
            raise AssertionError(text)
    return row


def liven(model: nn.Module, inputs: zoo.Inputs) -> None:
    """Let outputs depend on inputs: no weights of zeros, no batch norm with made-up statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
            elif 0 < parameter.abs().max() < 1e-3:  # scales that shut a branch at first
                parameter.fill_(0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    measure.outputs(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def spread(outputs: list[torch.Tensor]) -> float:
    """How differently the two inputs of a batch come out, as a share of the largest value."""
    pairs = [t for t in outputs if t.dim() > 1 and len(t) == 2]
    return max(float((t[0] - t[1]).abs().max() / t.abs().max().clamp_min(1e-30)) for t in pairs)


# Bytes of the file, of the constants in it, of the model's parameters and buffers; parameters.
COUNTED = ("file", "constants", "tensors", "params")


def sides(model: nn.Module, report: ExportReport) -> tuple[float, Row]:
    """Seconds, and what one file is like."""
    proto = onnx.load(report.path)
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return report.seconds, {
        "opset": report.opset,
        "batches": report.batch_sizes,
        "error": report.max_rel_error,
        "file": report.bytes,
        "constants": sum(len(tensor.raw_data) for tensor in proto.graph.initializer),
        "tensors": sum(tensors.values()),
        "params": measure.params_of(model),
        "origin": {entry.key: entry.value for entry in proto.metadata_props},
    }


def summary(rows: list[Row]) -> Row:
    done = [row for row in rows if "error" not in row]
    if not done:
        return {"exported": f"0/{len(rows)}"}
    furthest = max(done, key=lambda r: abs(r["off"]))
    worst = max(done, key=lambda r: r["error_largest"])
    return {
        "exported": f"{len(done)}/{len(rows)}",
        "opsets": sorted({row["opset"] for row in done}),
        "median_file_less_tensors_kept": median(row["off"] for row in done),
        "largest_file_less_tensors_kept": f"{furthest['off']:+.4f} ({furthest['name']})",
        "files whose share kept is within 0.02 of the tensors'": sum(
            abs(row["off"]) <= TOLERANCE for row in done
        ),
        "largest_unexplained": max(abs(row.get("unexplained", row["off"])) for row in done),
        "tolerance": TOLERANCE,
        "largest_relative_error": f"{worst['error_largest']:.1e} ({worst['name']})",
        "smallest_spread_of_outputs": min(row["response"] for row in done),
        "seconds": sum(row["dense_s"] + row["slim_s"] for row in done),
    }


def megabytes(key: str) -> measure.Callable[[Row], str]:
    return lambda r: f"{r[f'dense_{key}'] / 1e6:.2f} / {r[f'slim_{key}'] / 1e6:.2f}"


COLUMNS = {
    "name": lambda r: r["name"],
    "opset": lambda r: str(r["opset"]),
    "batches": lambda r: ", ".join(map(str, r["batches"])),
    "outputs' spread": lambda r: f"{r['response']:.2f}",
    "largest relative error": lambda r: f"{r['error_largest']:.1e}",
    "dense / slim parameters, M": megabytes("params"),
    "dense / slim file, MB": megabytes("file"),
    "params kept": lambda r: f"{r['params_kept']:.4f}",
    "parameters and buffers kept": lambda r: f"{r['tensors_kept']:.4f}",
    "file's constants kept": lambda r: f"{r['constants_kept']:.4f}",
    "file kept": lambda r: f"{r['file_kept']:.4f}",
    "dense, slim s": lambda r: f"{r['dense_s']:.1f}, {r['slim_s']:.1f}",
}

if __name__ == "__main__":
    sys.exit(main())
