"""How closely are budgets met, unaligned, whatever ranks the units?

    python benchmarks/budgets.py [--members 'hf/*'] [--ratios 0.3 0.5 0.7] [--data hf/bert ...]

Every architecture of `tests/zoo.py`, every criterion that reads weights alone, both allocations and
the default one, MACs and parameters: the share by which more or less is left than was asked for.
Those that read data or a loss, with noise and the outputs' squares for it, on the members of
`--data`. Classes that are built from a config are held to its widths, and then left free
(`rebuildable=False`) as a member of their own. Met is what misses by 0.5 % at most. Printed and
written, member by member: how many are met, the largest miss, and each plan that misses. Units are
scored once a criterion; SynFlow, which computes its flow anew in each of its hundred rounds, in
ten. `--resume` leaves out the members that the results have.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import measure
import torch
import zoo
from torch import Tensor
from torch.utils._pytree import tree_leaves

import depcut
from depcut.analysis import Analysis
from depcut.frontiers.scored import Scored
from depcut.plan.budget import NEAR
from depcut.scores import CRITERIA, is_additive, score, synaptic

ALLOCATIONS = (None, "uniform", "global")
QUANTITIES = ("macs", "params")
SMALL = ("tv/squeezenet1_1", "tv/mobilenet_v3_small", "timm/levit_128s", "hf/bert", "hf/llama")


def wanted(data: bool) -> list[str]:
    """Criteria that need nothing; those that read data or a loss only where there is some."""
    return [n for n, c in CRITERIA.items() if c.needs == "" or data]


def squares(output: Any, _: Tensor) -> Tensor:
    """A loss that any output has."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.stack([leaf.square().mean() for leaf in leaves if leaf.is_floating_point()]).sum()


def plans(
    analysis: Analysis, name: str, ratios: list[float], data: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is missed by each plan of a member, with the name of the member or its free double."""
    calibration = None
    if data:
        batch = (zoo.ZOO[name].inputs(2), torch.zeros(2))
        calibration = analysis.calibrate([batch], loss=squares, progress=False)
    doubles: dict[str, bool | str] = {name: "auto"}
    if analysis.rebuilding[0] is not None:
        doubles[f"{name}, free"] = False
    for criterion in wanted(data):
        own = calibration if CRITERIA[criterion].needs else None
        values = score(criterion, analysis.coupling, analysis.model, 0, own)
        scored = Scored(values, criterion, additive=is_additive(criterion))
        for double, allocation, of, ratio in product(doubles, ALLOCATIONS, QUANTITIES, ratios):
            row = {"score": criterion, "allocation": allocation or "default"}
            row |= {"of": of, "ratio": ratio}
            try:
                plan = analysis.plan(
                    ratio, data=own, of=of, score=scored, allocation=allocation, align=1,
                    rebuildable=doubles[double], progress=False,
                )  # fmt: skip
            except depcut.BudgetError as error:
                yield double, {**row, "error": measure.first_line(error)}
            else:
                yield double, {**row, "missed": round(float(plan.missed or 0.0), 6)}


def summary(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results: how the plans of a member do, and those that miss."""
    reached = [abs(r["missed"]) for r in found if "error" not in r]
    return {
        "name": name,
        "plans": len(found),
        "met": sum(missed <= NEAR for missed in reached),
        "refused": len(found) - len(reached),
        "worst": max(reached, default=0.0),
        "misses": [r for r in found if "error" in r or abs(r["missed"]) > NEAR],
    }


def facts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """All members together."""
    count = {key: sum(row[key] for row in rows) for key in ("plans", "met", "refused")}
    reached = count["plans"] - count["refused"]
    return {
        "met": f"{count['met']} of {reached} plans within {NEAR:.1%} of their budget",
        "refused": f"{count['refused']} of {count['plans']}: not to be reached",
        "members": str(len(rows)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--data", nargs="*", default=list(SMALL), metavar="GLOB")
    parser.add_argument("--resume", action="store_true", help="add to results/budgets.json")
    options = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    synaptic.ROUNDS = 10
    rows: list[dict[str, Any]] = measure.read("budgets")["rows"] if options.resume else []
    done = {row["name"] for row in rows}
    for name in zoo.ZOO:
        if name in done or not any(fnmatch.fnmatch(name, glob) for glob in options.members):
            continue
        data = any(fnmatch.fnmatch(name, glob) for glob in options.data)
        found: dict[str, list[dict[str, Any]]] = {}
        analysis = depcut.analyze(zoo.build(name), zoo.ZOO[name].inputs(2))
        for double, plan in plans(analysis, name, options.ratios, data):
            found.setdefault(double, []).append(plan)
        for row in (summary(double, its) for double, its in found.items()):
            print(
                f"{row['name']:28} {row['met']} of {row['plans']} met, {row['refused']} refused, "
                f"worst {row['worst']:.3%}",
                flush=True,
            )
            for miss in row["misses"]:
                print(f"    {miss}", flush=True)
            rows.append(row)
        measure.write("budgets", rows, facts(rows))
    print(facts(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
