"""How closely are budgets met, unaligned, whatever ranks the units?

    python benchmarks/budgets.py [--members 'hf/*'] [--ratios 0.3 0.5 0.7] [--data hf/bert ...]

Every architecture of `tests/zoo.py`, every criterion that reads weights alone, both allocations and
the default one, MACs and parameters: the share by which more or less is left than was asked for.
Those that read data, with noise for it, on the members of `--data`. Met is what misses by 0.5 % at
most. Printed: for each member how many are met and the largest miss, and each plan that misses.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import measure
import torch
import zoo

import depcut
from depcut.plan.budget import NEAR
from depcut.scores import CRITERIA

ALLOCATIONS = (None, "uniform", "global")
QUANTITIES = ("macs", "params")
SMALL = ("tv/squeezenet1_1", "tv/mobilenet_v3_small", "timm/levit_128s", "hf/bert", "hf/llama")


def wanted(data: bool) -> list[str]:
    """Criteria that need no loss; those that read data only where there is some."""
    return [n for n, c in CRITERIA.items() if c.needs == "" or (data and c.needs == "data")]


def plans(name: str, ratios: list[float], data: bool) -> Iterator[dict[str, Any]]:
    """What is missed by each plan of a member."""
    member = zoo.ZOO[name]
    analysis = depcut.analyze(zoo.build(name), member.inputs(2))
    calibration = analysis.calibrate([member.inputs(2)], progress=False) if data else None
    for score in wanted(data):
        for allocation in ALLOCATIONS:
            for of in QUANTITIES:
                for ratio in ratios:
                    row = {"name": name, "score": score, "allocation": allocation or "default"}
                    row |= {"of": of, "ratio": ratio}
                    try:
                        plan = analysis.plan(
                            ratio,
                            data=calibration if CRITERIA[score].needs else None,
                            of=of, score=score, allocation=allocation, align=1, progress=False,
                        )  # fmt: skip
                    except depcut.BudgetError as error:
                        yield {**row, "error": measure.first_line(error)}
                    else:
                        yield {**row, "missed": round(float(plan.missed or 0.0), 6)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--data", nargs="*", default=list(SMALL), metavar="MEMBER")
    options = parser.parse_args()
    zoo.libraries()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in zoo.ZOO:
        if not any(fnmatch.fnmatch(name, glob) for glob in options.members):
            continue
        found = list(plans(name, options.ratios, name in options.data))
        missed = [r for r in found if "error" not in r and abs(r["missed"]) > NEAR]
        refused = [r for r in found if "error" in r]
        worst = max((abs(r["missed"]) for r in found if "error" not in r), default=0.0)
        met = len(found) - len(missed) - len(refused)
        print(
            f"{name:28} {met} of {len(found)} met, {len(refused)} refused, worst {worst:.3%}",
            flush=True,
        )
        for row in (*missed, *refused):
            print(f"    {row}", flush=True)
        rows += found
    reached = [r for r in rows if "error" not in r]
    met = sum(abs(r["missed"]) <= NEAR for r in reached)
    facts = {
        "met": f"{met} of {len(reached)} plans within {NEAR:.1%} of their budget",
        "refused": f"{len(rows) - len(reached)} of {len(rows)}: not to be reached",
    }
    print(facts)
    misses = [r for r in rows if "error" in r or abs(r["missed"]) > NEAR]
    measure.write("budgets", misses, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
