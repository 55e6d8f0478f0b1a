"""Which modules come out as generated graphs, and which with a patched class?

Every member of the open zoo, a UNet, torch's own transformers and ModernBERT are shrunk; a
generated module takes only calls like the example's, a patched one takes what the dense one takes.
Widths are cut freely (rebuildable=False).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

import measure
import torch
from measure import HERE, Row
from rich.progress import track

import depcut

sys.path.insert(0, str(HERE.parent / "tests" / "field"))

import places
import zoo


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    names = [n for n in members() if any(fnmatchcase(n, p) for p in options.only)]
    console = measure.console()
    rows = []
    for name in track(names, console=console):
        row = attempt(name, options.ratio)
        rows.append(row)
        for module, why in row["generated"].items():
            console.print(f"{name} {module}: {why}", style="red")
        if "error" in row:
            console.print(f"FAIL {name}: {row['error']}", style="red")
    console.print(measure.table("Generated modules", COLUMNS, rows))
    totals = {
        "members": len(rows),
        "generated": sum(len(row["generated"]) for row in rows),
        "failed": sum("error" in row for row in rows),
    }
    console.print(" ".join(f"{name} {number}" for name, number in totals.items()))
    if options.only == ["*"]:
        for path in measure.write(options.results, rows, totals):
            console.print(f"written: {path}")
    return int(totals["generated"] > 0 or totals["failed"] > 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="globs over members; without, results are written"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument("--results", default="generated_modules", help="name of the file")
    return parser.parse_args()


def members() -> Iterable[str]:
    return (*places.PLACES, *zoo.ZOO)


def attempt(name: str, ratio: float) -> Row:
    """The row of one member; a failure becomes a row, too."""
    row: Row = {"name": name, "generated": {}, "patched": 0, "seconds": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, inputs = places.build(name), places.inputs(name, 2)
            seconds, slim = measure.timed(
                lambda: depcut.shrink(model, ratio, inputs, rebuildable=False)
            )
        except Exception as error:  # noqa: BLE001  (whatever a member does, the others still run)
            return {**row, "error": measure.first_line(error)}
    report = depcut.report(slim)
    return {
        **row,
        "generated": dict(report.generated),
        "patched": len(report.patched),
        "largest_difference": report.error,
        "seconds": seconds,
    }


COLUMNS = {
    "model": lambda r: r["name"],
    "generated": lambda r: str(len(r["generated"])),
    "patched": lambda r: str(r["patched"]),
    "largest difference": lambda r: f"{r.get('largest_difference', float('nan')):.1e}",
    "s": lambda r: f"{r['seconds']:.1f}",
}

if __name__ == "__main__":
    sys.exit(main())
