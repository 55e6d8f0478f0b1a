"""How many seconds does each entry point take on residual nets of 25, 50 and 100 blocks?

The nets are those of the tests (an MLP, a convolution net, attention and MLP in turns; width 8), so
that what is timed is depcut's own work. Seconds are those of the processor in this process, which
other jobs on the machine change little. The work itself is counted in tests/test_depth_scaling.py.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import measure
import torch
from deep_nets import ENTRIES, NETS, subject
from measure import Row

from depcut.scores import synaptic

DEPTHS = (25, 50, 100)
CHEAP, REPEAT = 0.3, 3  # seconds up to which a call is repeated, and how often
ROUNDS = 10  # of SynFlow's 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="depth", help="name of the files under results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    synaptic.ROUNDS = ROUNDS
    console = measure.console()
    rows: list[Row] = []
    for net in NETS:
        subjects = {blocks: subject(net, blocks) for blocks in DEPTHS}
        for entry in ENTRIES:
            row: Row = {"name": entry, "net": net}
            try:
                for blocks, it in subjects.items():
                    row[str(blocks)] = round(seconds(ENTRIES[entry](it)), 4)
            except Exception as error:  # noqa: BLE001  (the other entry points still run)
                row["error"] = measure.first_line(error)
            rows.append(row)
            measure.write(options.results, rows, summary(rows))
        console.print(measure.table(net, COLUMNS, [r for r in rows if r["net"] == net]))
    for path in measure.write(options.results, rows, summary(rows)):
        console.print(f"written: {path}")
    return int(any("error" in row for row in rows))


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the median of several where they are cheap."""
    start = time.process_time()
    call()
    first = time.process_time() - start
    if first > CHEAP:
        return first
    samples = [first]
    while len(samples) < REPEAT:
        start = time.process_time()
        call()
        samples.append(time.process_time() - start)
    return median(samples)


def growth(row: Row) -> float:
    """Of the seconds when the depth doubles from 50 to 100 blocks."""
    return float(row["100"] / row["50"])


def summary(rows: list[Row]) -> Row:
    done = [r for r in rows if "error" not in r]
    if not done:
        return {}
    return {
        "SynFlow": f"{ROUNDS} of its rounds",
        "seconds at 100 / 50 blocks, median": round(median(map(growth, done)), 2),
        "largest": ", ".join(
            f"{r['name']} ({r['net']}) {growth(r):.2f}"
            for r in sorted(done, key=growth, reverse=True)[:3]
        ),
    }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "entry point": lambda r: r["name"],
    **{f"{n} blocks, s": lambda r, n=n: f"{r[str(n)]:.3f}" for n in DEPTHS},
    "100 / 50": lambda r: f"{growth(r):.2f}",
}


if __name__ == "__main__":
    raise SystemExit(main())
