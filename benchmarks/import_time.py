"""How long does `import depcut` take, beyond `import torch`?

Fresh processes import torch and then depcut; the medians tell what each costs, on the clock and of
the processor, which a busy machine changes less.

    python benchmarks/import_time.py [--runs 5] [--limit 0.3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

SCRIPT = """
import time
times = []
def tick():
    times.extend((time.perf_counter(), time.process_time()))
tick()
import torch
tick()
import depcut
tick()
print(*(after - before for before, after in zip(times, times[2:])))
"""


def seconds() -> list[float]:
    """Seconds in a fresh process: torch by the clock and of the processor, depcut likewise."""
    # compiled once, as after an installation
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, env=env
    )
    return [float(number) for number in found.stdout.split()]


def main() -> int:
    """Print the medians; the exit status tells whether depcut stays within the limit, if any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="fresh processes")
    parser.add_argument("--limit", type=float, help="seconds of the clock that depcut may take")
    options = parser.parse_args()
    seconds()  # compiles
    runs = [seconds() for _ in range(options.runs)]
    torch, torch_cpu, depcut, depcut_cpu = map(statistics.median, zip(*runs, strict=True))
    print(f"import torch   {torch:.3f} s, {torch_cpu:.3f} s of the processor")
    print(f"import depcut  {depcut:.3f} s more, {depcut_cpu:.3f} s of the processor")
    return int(options.limit is not None and depcut > options.limit)


if __name__ == "__main__":
    sys.exit(main())
