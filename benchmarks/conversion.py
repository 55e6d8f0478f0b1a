"""How long does a conversion to ONNX take, with and without what is the same for every model?

Members of the open zoo are exported in turns, as `depcut.export` does and with torch.onnx as it is
(`depcut.deploy.translations`): medians of processor seconds of one process, after one of each.

    python benchmarks/conversion.py [--rounds 5] [tv/resnet18 hf/bert]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import measure
import torch
import zoo
from torch import nn

from depcut.deploy.convert import draft

PLAIN = mock.patch("depcut.deploy.convert.translating", contextlib.nullcontext)
WAYS: dict[str, Any] = {"depcut": contextlib.nullcontext(), "torch's own": PLAIN}


def seconds(model: nn.Module, inputs: Any, path: Path) -> float:
    """Processor seconds of one conversion."""
    start = time.process_time()
    draft(model, inputs, path)
    return time.process_time() - start


def main() -> int:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="conversions of each kind")
    parser.add_argument("names", nargs="*", default=["tv/resnet18", "hf/bert"], help="of the zoo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = measure.console()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            model, inputs = zoo.build(name).eval(), zoo.ZOO[name].inputs(2)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(options.rounds + 1):
                for way, state in WAYS.items():
                    with state:
                        took = seconds(model, inputs, Path(folder) / "net.onnx")
                    if number:
                        times[way].append(took)
            found = [f"{way} {median(each):.2f} s" for way, each in times.items()]
            console.print(name, *found, sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
