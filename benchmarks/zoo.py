"""Does depcut halve public architectures that it has never heard of, and are the halves sound?

For every member of the open zoo: groups, what is frozen and why, the seconds of each stage, what
is left of MACs and parameters by depcut's account and by torch's own counter, and whether the
result is the user's class, takes other batch sizes, and trains.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase

import measure
import torch
import zoo
from measure import Row
from oracle import assert_untouched, gradients, snapshot
from rich.progress import track
from torch import nn

import depcut
from depcut import axes
from depcut.analysis import Analysis
from depcut.capture.capture import capture
from depcut.coupling.infer import infer_coupling

TOLERANCE = 0.01


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    names = [n for n in zoo.ZOO if any(fnmatchcase(n, p) for p in options.names)]
    console = measure.console()
    results = measured(names, options.jobs, options.ratio)
    rows = list(track(results, "open zoo", len(names), console=console))
    rows.sort(key=lambda row: names.index(row["name"]))
    totals = summary(rows, options.ratio)
    console.print(measure.table("Open zoo", COLUMNS, rows))
    for row in rows:
        if "error" in row:
            console.print(f"FAIL {row['name']}: {row['error']}", style="red")
        elif row["generated"]:
            console.print(f"{row['name']} generated: {generated(row)}")
    console.print(
        f"shrunk {totals['shrunk']}, within {1 - options.ratio:g}+-{TOLERANCE:g} "
        f"{totals['within']} (by torch's count {totals['within_counted']}), "
        f"own class throughout {totals['own_class']}, "
        f"max analysis {totals['max_analysis_ms']:.1f} ms ({totals['slowest_analysis']})"
    )
    for path in measure.write(options.results, rows, totals):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows) or totals["missed"] > 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="globs over members; default: all")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="run each member in a subprocess of its own, N at a time (times then disturb each "
        "other); default: one after the other in this process",
    )
    parser.add_argument("--results", default="zoo", help="name of the files under results/")
    return parser.parse_args()


def measured(names: list[str], jobs: int, ratio: float) -> Iterator[Row]:
    if not jobs:
        yield from (attempt(name, ratio) for name in names)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(attempt, name, ratio): name for name in names}
        for future in as_completed(futures):
            error = future.exception()
            failed = {"name": futures[future], "error": measure.first_line(error or Exception())}
            yield failed if error else future.result()


def attempt(name: str, ratio: float) -> Row:
    """The row of one member; a failure becomes a row, too."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return examine(name, ratio)
        except Exception as error:  # noqa: BLE001  (whatever a member does, the others still run)
            return {"name": name, "error": measure.first_line(error)}


def examine(name: str, ratio: float) -> Row:
    member, model = zoo.ZOO[name], zoo.build(name)
    measure.outputs(model, member.inputs(2))  # some models install hooks at their first call
    before = snapshot(model)
    capture_s, program = measure.timed(lambda: capture(model, member.inputs(2)))
    analysis_s = measure.median_of(lambda: infer_coupling(program), 5)
    analysis = Analysis(model, infer_coupling(program))
    plan_s, plan = measure.timed(lambda: analysis.plan(ratio, of="macs", align=1))
    apply_s, slim = measure.timed(lambda: plan.apply(model))
    assert_untouched(model, before)
    counted = {b: measure.counted_macs(m, member.inputs(2)) for b, m in both(model, slim)}
    share, reason = frozen(analysis)
    row = {
        "name": name,
        "groups": len(analysis.groups),
        "frozen_share": share,
        "frozen_reason": reason,
        "capture_s": capture_s,
        "analysis_ms": 1e3 * analysis_s,
        "plan_s": plan_s,
        "apply_s": apply_s,
        "macs": analysis.macs,
        "params": analysis.params,
        "macs_kept": plan.macs / analysis.macs,
        "params_kept": measure.params_of(slim) / measure.params_of(model),
        "counted_macs": sum(counted["dense"].values()) / 2,
        "counted_kept": sum(counted["slim"].values()) / sum(counted["dense"].values()),
        "counted_by_operator": {op: round(n / 2) for op, n in counted["dense"].items()},
        "captured_for_training": bool(program.training),
        "generated": dict(depcut.report(slim).generated),
        "other_types": other_types(model, slim),
        "verified_error": depcut.report(slim).error,
    }
    check(slim, model, member)
    return row


def both(model: nn.Module, slim: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return (("dense", model), ("slim", slim))


def frozen(analysis: Analysis) -> tuple[float, str]:
    """Share of the parameters of which nothing can go, and the reason that holds most of them."""
    weight: Counter[str] = Counter()
    dims = analysis.coupling.dims
    for entry in analysis.frozen:
        terms = dims[entry.tensor]
        if all(map(axes.is_frozen, terms)):
            weight[entry.reason] += torch.Size(t.size for t in terms).numel()
    top = weight.most_common(1)
    return analysis.frozen_share, top[0][0] if top else ""


def other_types(model: nn.Module, slim: nn.Module) -> list[str]:
    """Submodules of the dense model that have another type, or are gone, in the slim one."""
    kept = {name: type(m) for name, m in slim.named_modules()}
    return [name for name, m in model.named_modules() if kept.get(name) is not type(m)]


def check(slim: nn.Module, model: nn.Module, member: zoo.Member) -> None:
    """Demand what a user relies on: the keys, other batch sizes, gradients, train mode."""
    demand(list(slim.state_dict()) == list(model.state_dict()), "the state_dict keys differ")
    for batch in (2, 3):
        narrow = measure.outputs(slim, member.inputs(batch))
        dense = measure.shapes(model, member.inputs(batch))
        demand([tuple(t.shape) for t in narrow] == dense, f"output shapes differ at batch {batch}")
        demand(all(bool(t.isfinite().all()) for t in narrow), "an output is not finite")
    wanted = set(gradients(model, member.inputs(2)))
    for mode in (False, True):
        slim.train(mode)
        found = gradients(slim, member.inputs(2))
        text = "train()" if mode else "eval()"
        # in train mode, heads and paths that the other mode skips may take part
        demand(wanted <= set(found), f"a parameter gets no gradient in {text}")
        finite = all(bool(g.isfinite().all()) for g in found.values())
        demand(finite, f"a gradient is not finite in {text}")
    slim.eval()


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def summary(rows: list[Row], ratio: float) -> Row:
    done = [row for row in rows if "error" not in row]
    count = f"{{}}/{len(rows)}"
    within = [r for r in done if abs(r["macs_kept"] - 1 + ratio) <= TOLERANCE]
    counted = [r for r in done if abs(r["counted_kept"] - 1 + ratio) <= TOLERANCE]
    slowest = max(done, key=lambda r: r["analysis_ms"], default={"name": "", "analysis_ms": 0})
    return {
        "shrunk": count.format(len(done)),
        "within": count.format(len(within)),
        "within_counted": count.format(len(counted)),
        "own_class": count.format(sum(not r["other_types"] for r in done)),
        "max_analysis_ms": slowest["analysis_ms"],
        "slowest_analysis": slowest["name"],
        "missed": len(done) - len(within),
    }


def generated(row: Row) -> str:
    first, *others = row["generated"].items()
    return f"{first[0]} ({first[1]})" + (f" and {len(others)} more" if others else "")


COLUMNS = {
    "name": lambda r: r["name"],
    "groups": lambda r: str(r["groups"]),
    "frozen": lambda r: f"{r['frozen_share']:.1%} {r['frozen_reason']}",
    "capture s": lambda r: f"{r['capture_s']:.2f}",
    "analysis ms": lambda r: f"{r['analysis_ms']:.1f}",
    "plan s": lambda r: f"{r['plan_s']:.3f}",
    "rewrite, verify s": lambda r: f"{r['apply_s']:.2f}",
    "MACs kept": lambda r: f"{r['macs_kept']:.4f}",
    "by torch": lambda r: f"{r['counted_kept']:.4f}",
    "dense MACs, torch's / ours": lambda r: f"{r['counted_macs'] / r['macs']:.4f}",
    "params kept": lambda r: f"{r['params_kept']:.3f}",
    "class": lambda r: (
        "own" if not r["other_types"] else f"{len(r['generated'])} submodules generated"
    ),
}

if __name__ == "__main__":
    sys.exit(main())
