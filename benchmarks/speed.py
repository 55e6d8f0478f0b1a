"""How long does depcut take, whole and after capture, beside Torch-Pruning's build + step?

Both run in this process on one thread and take turns. depcut's side is one call of `shrink` without
data, from the capture to the verified model, with the seconds of each of its stages; and once more
what comes after the capture, all from one captured program. Torch-Pruning's side is its dependency
graph and one step of a uniform magnitude pruner, with no verification; the layers that must not be
narrowed are given to it. Each member is tried with it in a subprocess first, since on some it never
returns. Widths are cut freely (rebuildable=False). `--cpu` counts the seconds of the process in
place of those of the clock: for a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import multiprocessing
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import measure
import torch
import torch_pruning
import zoo
from measure import Row
from rich.progress import Progress
from torch import Tensor, nn

import depcut
import depcut.analysis
import depcut.apply.plan
from depcut.analysis import Analysis
from depcut.capture.capture import capture
from depcut.capture.program import Program
from depcut.coupling.groups import layer_of
from depcut.coupling.infer import infer_coupling

COMPLETES = ("works", "prunes nothing", "forward fails", "wrong outputs")
STAGES = {
    "capture": (depcut.analysis, "capture"),
    "infer": (depcut.analysis, "infer_coupling"),
    "plan": (Analysis, "plan"),
    "rewrite": (depcut.apply.plan, "rewrite"),
    "verify": (depcut.apply.plan, "verify_calls"),
}


def main() -> int:
    options = parsed()
    if options.cpu:
        measure.CLOCK = time.process_time
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    zoo.libraries()
    names = [n for n in zoo.ZOO if any(fnmatchcase(n, p) for p in options.names)]
    names += [added(name) for name in options.timm]
    console, rows = measure.console(), []
    # no refreshing thread: a process that forks should have one thread
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("depcut beside Torch-Pruning", total=len(names))
        for name in names:
            rows.append(attempt(name, options))
            progress.console.print(line(rows[-1]))
            progress.advance(task)
            progress.refresh()
    totals = summary(rows)
    console.print(measure.table("From capture to the model, and Torch-Pruning", COLUMNS, rows))
    for key, value in totals.items():
        console.print(f"{key}: {value}")
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="globs over members; all if nothing is named")
    parser.add_argument("--timm", nargs="+", default=[], help="models of timm outside of the zoo")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, both sides once in each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds until the peer hangs")
    parser.add_argument(
        "--peer-ratio", type=float, default=0.3, help="its share of channels: MACs about halve"
    )
    parser.add_argument("--cpu", action="store_true", help="seconds of the process, not the clock")
    parser.add_argument("--profile", action="store_true", help="name depcut's dearest functions")
    parser.add_argument("--results", default="speed", help="name of the files under results/")
    options = parser.parse_args()
    options.names = options.names or ([] if options.timm else ["*"])
    return options


def added(name: str) -> str:
    """The name in the zoo of a model of timm, which is put there."""
    timm = zoo.libraries()["timm"]

    def build() -> nn.Module:
        return timm.create_model(name, pretrained=False).eval()

    def inputs(batch: int) -> tuple[Tensor]:
        size = timm.models.get_pretrained_cfg(name).input_size
        return (torch.randn(batch, *size, generator=zoo.generator()),)

    zoo.ZOO[f"timm/{name}"] = zoo.Member(build, inputs)
    return f"timm/{name}"


def attempt(name: str, options: argparse.Namespace) -> Row:
    """The row of one member; a failure becomes a row, too."""
    try:
        return compare(name, options)
    except Exception as error:  # noqa: BLE001  (whatever a member does, the others still run)
        return {"name": name, "error": measure.first_line(error)}


def compare(name: str, options: argparse.Namespace) -> Row:
    member, model = zoo.ZOO[name], zoo.build(name)
    with counted_exports() as exports:
        shrunk(model, member)
    program = capture(model, member.inputs(2))
    fixed = output_layers(Analysis(model, infer_coupling(program)))
    stages = [itemised(lambda: shrunk(model, member)) for _ in range(options.repeat)]
    row = {
        "name": name,
        "exports": len(exports),
        **{f"{stage}_s": median(s[stage] for s in stages) for stage in stages[0]},
        "ignored_layers": fixed,
        **verdict(name, fixed, options),
    }
    if options.profile:
        row["profile"] = dearest(lambda: after_capture(model, program))
    if row["peer"] not in COMPLETES:
        row["after_capture_s"] = measure.median_of(
            lambda: after_capture(model, program), options.repeat
        )
        return row

    def whole() -> float:
        return measure.timed(lambda: shrunk(model, member))[0]

    def ours() -> float:
        return measure.timed(lambda: after_capture(model, program))[0]

    def theirs() -> float:
        copy = deepcopy(model)
        return measure.timed(lambda: peer(copy, member.inputs(1), fixed, options.peer_ratio))[0]

    ours(), theirs()
    samples = measure.interleaved([whole, ours, theirs], options.repeat)
    row["shrink_s"], row["after_capture_s"], row["peer_s"] = map(median, samples)
    row["peer_copy_s"] = measure.median_of(lambda: deepcopy(model), options.repeat)
    row["whole_ratio"] = median(a / b for a, _, b in zip(*samples, strict=True))
    row["ratio"] = median(a / b for _, a, b in zip(*samples, strict=True))
    row["whole_samples"], row["samples"], row["peer_samples"] = samples
    return row


def shrunk(model: nn.Module, member: Any) -> nn.Module:
    inputs = member.inputs(2)
    return depcut.shrink(model, 0.5, inputs, data=None, align=1, rebuildable=False)


def after_capture(model: nn.Module, program: Program) -> nn.Module:
    analysis = Analysis(model, infer_coupling(program))
    return analysis.plan(0.5, align=1, rebuildable=False).apply(model)


def itemised(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a run, of each stage in it, and of what is left."""
    seconds = dict.fromkeys(STAGES, 0.0)
    plain = {stage: getattr(owner, name) for stage, (owner, name) in STAGES.items()}

    def noted(stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = measure.CLOCK()
            try:
                return plain[stage](*args, **kwargs)
            finally:
                seconds[stage] += measure.CLOCK() - start

        return call

    try:
        for stage, (owner, name) in STAGES.items():
            setattr(owner, name, noted(stage))
        whole = measure.timed(run)[0]
    finally:
        for stage, (owner, name) in STAGES.items():
            setattr(owner, name, plain[stage])
    return {"shrink": whole, **seconds, "rest": whole - sum(seconds.values())}


@contextmanager
def counted_exports() -> Iterator[list[str]]:
    """The calls of torch.export.export, noted in the list."""
    export, calls = torch.export.export, []

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return export(module, *args, **kwargs)

    torch.export.export = noted
    try:
        yield calls
    finally:
        torch.export.export = export


def dearest(function: Callable[[], Any], count: int = 6) -> list[str]:
    """The functions that most of the time is spent under, those of depcut only."""
    with cProfile.Profile() as profile:
        function()
    found = []
    for (file, _, name), (_, _, own, below, _) in pstats.Stats(profile).stats.items():
        if "/depcut/" in file:
            found.append(
                (below, f"{file.rpartition('/depcut/')[2]}:{name} {below:.3f}/{own:.3f} s")
            )
    return [text for _, text in sorted(found, reverse=True)[:count]]


# The peer -----------------------------------------------------------------------------------------


def output_layers(analysis: Analysis) -> list[str]:
    """Layers whose narrowing would narrow an output of the model, heads tied to embeddings too."""
    fixed = ("output", "vocabulary")
    aliases = analysis.program.aliases
    found = [f.tensor for f in analysis.frozen if f.dim == 0 and any(w in f.reason for w in fixed)]
    layers = {layer_of(name) for tensor in found for name in aliases.get(tensor, (tensor,))}
    # an embedding's rows are not its outputs: to leave it out would hold the hidden size, too
    embeddings = {n for n, m in analysis.model.named_modules() if isinstance(m, nn.Embedding)}
    return sorted(layers - embeddings)


def peer(model: nn.Module, inputs: Any, fixed: list[str], ratio: float) -> nn.Module:
    """Torch-Pruning's build and step, in place, as its documentation shows them."""
    modules = dict(model.named_modules())
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[modules[name] for name in fixed if name in modules],
        in_channel_groups={},  # its defaults are shared between pruners
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    return model


def verdict(name: str, fixed: list[str], options: argparse.Namespace) -> Row:
    """What the peer does with a member, tried in a process that can be killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, name, fixed, options.peer_ratio)
    process = context.Process(target=try_peer, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(options.limit):
            return {"peer": "hangs", "peer_detail": f"no result after {options.limit:g} s"}
        found = receiver.recv()
    except EOFError:
        process.join()
        return {"peer": "dies", "peer_detail": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def try_peer(sender: Connection, name: str, fixed: list[str], ratio: float) -> None:
    try:
        sender.send(tried(name, fixed, ratio))
    except Exception as error:  # noqa: BLE001  (not the peer's: the parent says FAIL)
        sender.send(error)


def tried(name: str, fixed: list[str], ratio: float) -> Row:
    member, model = zoo.ZOO[name], zoo.build(name)
    inputs = member.inputs(1)
    expected = measure.shapes(model, inputs)
    dense = sum(measure.counted_macs(model, inputs).values())
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    try:
        slim = peer(model, inputs, fixed, ratio)
    except Exception as error:  # noqa: BLE001  (the error is the finding)
        return {"peer": "raises", "peer_detail": measure.first_line(error)}
    try:
        right = measure.shapes(slim, inputs) == expected
    except Exception as error:  # noqa: BLE001
        return {"peer": "forward fails", "peer_detail": measure.first_line(error)}
    kept = sum(measure.counted_macs(slim, inputs).values()) / dense
    same = {n: tuple(p.shape) for n, p in slim.named_parameters()} == sizes
    kind = "prunes nothing" if same else "works" if right else "wrong outputs"
    return {"peer": kind, "peer_detail": "", "peer_macs_kept": kept}


# Results ------------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> Row:
    done = [r for r in rows if "error" not in r]
    paired = [r for r in done if "ratio" in r and r["peer"] != "prunes nothing"]
    working = [r for r in paired if r["peer"] == "works"]
    kinds: dict[str, list[str]] = {}
    for row in done:
        kinds.setdefault(row["peer"], []).append(row["name"])
    return {
        "members that depcut shrinks": f"{len(done)}/{len(rows)}",
        "exactly one export": f"{sum(r['exports'] == 1 for r in done)}/{len(done)}",
        "more than one export": [r["name"] for r in done if r["exports"] != 1],
        "whole, peer returns": mean([{"ratio": r["whole_ratio"]} for r in paired]),
        "whole, peer's result works": mean([{"ratio": r["whole_ratio"]} for r in working]),
        "ratio, peer returns": mean(paired),
        "ratio, peer's result works": mean(working),
        "over ten seconds": [r["name"] for r in done if r["shrink_s"] > 10],
        "ratio, peer returns, its copy counted": mean(
            [
                {"ratio": r["after_capture_s"] / (r["peer_s"] + r["peer_copy_s"])}
                for r in paired
                if "peer_copy_s" in r
            ]
        ),
        "slowest beside the peer": [
            f"{r['name']} {r['ratio']:.2f}" for r in sorted(paired, key=lambda r: -r["ratio"])[:8]
        ],
        **{f"peer {kind}": names for kind, names in sorted(kinds.items())},
    }


def mean(rows: list[Row]) -> str:
    value = measure.geometric_mean(r["ratio"] for r in rows)
    return "none" if math.isnan(value) else f"{value:.3f} (geometric mean of {len(rows)})"


def line(row: Row) -> str:
    if "error" in row:
        return f"FAIL {row['name']}: {row['error']}"
    ratio = ""
    if "ratio" in row:
        ratio = f"{row['whole_ratio']:.2f} and {row['ratio']:.2f} of {row['peer_s']:.2f} s,"
    seconds = f"{row['shrink_s']:.2f} s, {row['after_capture_s']:.2f} s after capture"
    return f"{row['name']}: {seconds}, {ratio} peer {row['peer']}"


def seconds(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.3f}" if key in row else ""


COLUMNS = {
    "name": lambda r: r["name"],
    "exports": lambda r: str(r["exports"]),
    "shrink s": lambda r: f"{r['shrink_s']:.2f}",
    "capture s": seconds("capture_s"),
    "infer s": seconds("infer_s"),
    "plan s": seconds("plan_s"),
    "rewrite s": seconds("rewrite_s"),
    "verify s": seconds("verify_s"),
    "rest s": seconds("rest_s"),
    "after capture s": seconds("after_capture_s"),
    "peer s": seconds("peer_s"),
    "whole ratio": lambda r: f"{r['whole_ratio']:.2f}" if "whole_ratio" in r else "",
    "ratio": lambda r: f"{r['ratio']:.2f}" if "ratio" in r else "",
    "peer": lambda r: r["peer"],
    "peer MACs kept": lambda r: f"{r['peer_macs_kept']:.2f}" if "peer_macs_kept" in r else "",
    "detail": lambda r: r["peer_detail"][:60],
}

if __name__ == "__main__":
    sys.exit(main())
