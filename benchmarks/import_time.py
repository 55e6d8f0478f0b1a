"""How long does `import depcut` take, beyond `import torch`?

Fresh processes import torch and then depcut; the median of the second import is what depcut costs.

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
start = time.perf_counter()
import torch
middle = time.perf_counter()
import depcut
print(middle - start, time.perf_counter() - middle)
"""


def seconds() -> tuple[float, float]:
    """What importing torch and then depcut took in a fresh process."""
    # compiled once, as after an installation
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, env=env
    )
    torch, depcut = map(float, found.stdout.split())
    return torch, depcut


def main() -> int:
    """Print the medians; the exit status tells whether depcut stays within the limit, if any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="fresh processes")
    parser.add_argument("--limit", type=float, help="seconds that depcut may take")
    options = parser.parse_args()
    seconds()  # compiles
    torch, depcut = zip(*(seconds() for _ in range(options.runs)), strict=True)
    print(f"import torch   {statistics.median(torch):.3f} s")
    print(f"import depcut  {statistics.median(depcut):.3f} s more")
    return int(options.limit is not None and statistics.median(depcut) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
