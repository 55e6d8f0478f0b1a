"""What would it take to shrink a checkpoint that is too large to try here?

    python benchmarks/estimate.py --size 300M --size 70B --data 8 512 --memory 4GiB

Seconds, bytes on the disk and memory of `depcut.shrink_checkpoint` with obs and compensation, stage
by stage. What each stage does is counted on the model's own structure, which depcut builds on the
meta device: operators, multiply-accumulates before and after, bytes that are read and written, what
waits between two stretches. What a unit of each costs is measured in this process: reading shards
into single precision, writing them, products of the sizes of the model, an operator's overhead.
Structure and plan do not depend on widths and are timed as they are. Scoring and solving are
factorisations and products of matrices, and grow with the third power when widths and tokens grow
alike: depcut's own steps are timed on one and two layers whose widths and tokens are all divided by
one number, at two of these. Rows go to results/estimate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import torch
from estimate_units import HALF, SIZES, Shape, Units, extrapolated, units

from depcut import axes
from depcut.calibration.cuts import alive_before
from depcut.calibration.data import Calibration, calibrate
from depcut.calibration.sensitivity import Sensitivity
from depcut.calibration.visits import STRETCHES
from depcut.options import Options
from depcut.plan import cost
from depcut.scores import reconstruction
from depcut.streaming.criteria import streamed
from depcut.streaming.structure import structure
from depcut.streaming.weights import Single
from depcut.support.memory import check_memory

RESULTS = Path(__file__).parent / "results"
_SINGLE, _DOUBLE = 4, 8
_ROUNDS = 64  # in which the units of a group are eliminated


@dataclass(frozen=True)
class Counts:
    """What the stages of a run do.

    Attributes:
        structure: Seconds to find the structure, and a plan for it.
        held: Bytes of this process with it.
        stored: Bytes of the checkpoint, dense and smaller.
        macs: Of one text, dense and smaller.
        nodes: Operators of the graph.
        cuts: Bytes that are alive at the cuts of the walk back, of all texts.
        waiting: Bytes of what reads groups that all layers read.
        largest: Bytes of the largest such reader.
        pause: Bytes that are alive at the widest pause of the repair, of all texts.
    """

    structure: float
    held: int
    stored: tuple[float, float]
    macs: tuple[float, float]
    nodes: int
    cuts: float
    waiting: float
    largest: float
    pause: float


def counted(shape: Shape, memory: int) -> Counts:
    """Count on the structure of a decoder.

    Args:
        shape: The decoder.
        memory: Bytes that passes over the data may hold.
    """
    start = time.perf_counter()
    items, model = shape.data(), shape.model()
    analysis = structure(model, items[0])
    coupling = analysis.coupling
    criterion = streamed("random", None, None)  # type: ignore[arg-type]  # it reads none
    plan = analysis.plan(0.3, options=Options(score=criterion, rebuildable=True))
    seconds, held = time.perf_counter() - start, _resident()
    calibration = calibrate(coupling.program, model, items, memory=memory, progress=False)
    calibration = replace(calibration, device=torch.device("cpu"))
    work = _elimination(analysis.coupling, calibration)
    tokens = shape.batches * shape.length
    readers = [_reader_bytes(work, part, tokens) for part in range(len(work.parts))]
    spread = [bool(r) and len(work.of_group[work.parts[i][0]]) > 2 for i, r in enumerate(readers)]
    nodes = list(coupling.program.graph.graph.nodes)
    alive = dict(zip(nodes, alive_before(coupling.program)[0], strict=False))
    cuts = Sensitivity(coupling, Single({}), calibration, work.features).cuts(work.shown)
    return Counts(
        seconds,
        held,
        (HALF * cost.params(coupling).total, HALF * plan.params),
        (cost.macs(coupling).total, plan.macs),
        sum(node.op == "call_function" for node in nodes),
        shape.batches * sum(alive[node] for node in cuts),
        sum(r for r, s in zip(readers, spread, strict=True) if s),
        max(readers),
        shape.batches * max(alive[site] for site in work.at) * 2,
    )


def stages(shape: Shape, counts: Counts, unit: Units, memory: int) -> list[dict[str, Any]]:
    """Seconds, bytes read and written, and bytes of memory of each stage.

    Args:
        shape: The decoder.
        counts: What is done.
        unit: What it costs.
        memory: Bytes that passes over the data may hold.
    """
    (dense, slim), (macs, fewer) = counts.stored, counts.macs
    scoring, repairing = extrapolated(shape)
    passes = shape.batches * macs / unit.products
    smaller = shape.batches * fewer / unit.products
    nodes = shape.batches * counts.nodes * unit.node
    waits = counts.waiting if counts.waiting > memory // STRETCHES else 0.0
    back_and_forth = waits * _ROUNDS / 2  # all of it in the first round, nothing in the last
    tensor = 2 * _SINGLE * shape.hidden * max(shape.inner, shape.words)
    tokens = shape.batches * shape.length
    vectors = _DOUBLE * tokens * (3 * shape.inner + shape.hidden)
    activations = min(memory, max(counts.cuts, counts.pause))
    rows = [
        ("structure and plan", counts.structure, 0.0, 0.0, 0.0),
        ("walk forward", passes + nodes, dense, counts.cuts, min(memory, counts.cuts) + tensor),
        (
            "walk back", 2 * passes + 3 * nodes, dense + counts.cuts, counts.cuts / 8,
            activations + memory / STRETCHES + tensor,
        ),
        (
            "scores", scoring, back_and_forth, waits + back_and_forth,
            activations + 3 * counts.largest + min(counts.waiting, memory / STRETCHES),
        ),
        ("walk to repair", passes + smaller + 2 * nodes, 2 * dense, slim, activations + tensor),
        ("weights re-solved", repairing, 0.0, 0.0, activations + vectors + 2 * tensor),
        ("shards written", 0.0, dense + slim, slim, tensor),
        (
            "check", (macs + fewer) / unit.products + 2 * counts.nodes * unit.node,
            dense + slim, 0.0, 2 * tensor,
        ),
    ]  # fmt: skip
    return [
        {
            "stage": name,
            "seconds": seconds + read / unit.read + written / unit.write,
            "read": read,
            "written": written,
            "memory": counts.held + held,
        }
        for name, seconds, read, written, held in rows
    ]


def _elimination(coupling: Any, calibration: Calibration) -> Any:
    """The scoring of units, of which nothing is run."""
    given: Any = SimpleNamespace(coupling=coupling, data=calibration)
    return reconstruction._Elimination(given)


def _reader_bytes(work: Any, part: int, tokens: int) -> float:
    """Bytes of the two matrices of a reader: each thin where it is wider than it is long."""
    _, leader, items = work.parts[part]
    size = axes.resolve(leader.term).size
    outputs = sum(axes.resolve(i.rows).size for i in items if hasattr(i, "rows"))
    if not outputs:
        return 0.0
    return float(_DOUBLE * size * (min(tokens, size) + min(outputs, size)))


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def table(row: Mapping[str, Any]) -> str:
    """An estimate as Markdown.

    Args:
        row: Of results/estimate.json.
    """
    lines = ["| stage | time | read | written | memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for stage in row["stages"]:
        cells = [stage["stage"], _time(stage["seconds"])]
        cells += [_bytes(stage[name]) for name in ("read", "written", "memory")]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = sum(stage["seconds"] for stage in row["stages"])
    peak = max(stage["memory"] for stage in row["stages"])
    total = [sum(stage[name] for stage in row["stages"]) for name in ("read", "written")]
    lines.append(
        f"| all | {_time(seconds)} | {_bytes(total[0])} | {_bytes(total[1])} | {_bytes(peak)} |"
    )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.0f} h"


def _bytes(count: float) -> str:
    return "-" if not count else f"{count / 2**30:.2f} GiB"


def measured(size: str, data: list[int]) -> float | None:
    """Seconds that benchmarks/checkpoints.py found, if it did."""
    rows = json.loads(checkpoints.RESULTS.read_text())
    same = {"size": size, "score": "obs", "data": data}
    found = [row["seconds"] for row in rows if all(row.get(k) == v for k, v in same.items())]
    return found[-1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, action="append", required=True)
    parser.add_argument("--data", type=int, nargs=2, default=[8, 512], metavar=("TEXTS", "TOKENS"))
    parser.add_argument("--memory", default="4GiB")
    options = parser.parse_args()
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # no language model needs it
    memory = check_memory(options.memory)
    assert memory is not None
    path = RESULTS / "estimate.json"
    for size in options.size:
        shape = Shape.of(size, *options.data)
        unit, counts = units(shape), counted(shape, memory)
        row: dict[str, Any] = {
            "size": size, "data": options.data, "memory": options.memory,
            "threads": torch.get_num_threads(), "units": asdict(unit), "counts": asdict(counts),
            "stages": stages(shape, counts, unit, memory), "measured": measured(size, options.data),
        }  # fmt: skip
        rows = json.loads(path.read_text()) if path.exists() else []
        rows = [r for r in rows if (r["size"], r["data"]) != (size, options.data)]
        path.write_text(json.dumps([*rows, row], indent=1) + "\n")
        texts, tokens = options.data
        print(f"\n{size}, {texts} x {tokens} tokens, {options.memory}\n")
        print(table(row))
        if row["measured"]:
            total = sum(stage["seconds"] for stage in row["stages"])
            share = total / row["measured"]
            print(f"\nmeasured: {_time(row['measured'])}; estimated: {share:.2f} of it")


if __name__ == "__main__":
    main()
