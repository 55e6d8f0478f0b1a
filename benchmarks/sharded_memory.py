"""Memory that shrinking a model takes in each of two processes that share it by fully_shard.

    python benchmarks/sharded_memory.py [--blocks 8] [--data]

Blocks of two linear layers, made on the meta device and sharded block by block. Printed for each
process, in MiB: the dense model, its part of it, and what shrinking by 40 % of the MACs takes on
top at its peak: memory of its own, and pages of mapped files, which the system drops or writes
back where it needs the room. `--data` ranks and repairs on data.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import torch
from processes import launched
from torch import distributed, nn

import depcut

WIDTH = 1024
NAMES = {"RssAnon": "of its own", "RssFile": "mapped files"}


def resident() -> dict[str, float]:
    """MiB of this process that are in memory, by kind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) / 1024 for name in NAMES}


class Peak:
    """The most that is resident while the block runs, over what was before."""

    def __enter__(self) -> Peak:
        self.before = resident()
        self.most = dict(self.before)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Look every 10 ms."""
        while not self.ended.wait(0.01):
            self.most = {name: max(n, self.most[name]) for name, n in resident().items()}

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def grown(self) -> dict[str, float]:
        """By how many MiB."""
        return {name: self.most[name] - self.before[name] for name in NAMES}


def dense(blocks: int) -> nn.Module:
    """The sharded model; no process ever holds more than one block of it."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        layers = [
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(blocks)
        ]
        model = nn.Sequential(*layers).eval()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(int(os.environ["RANK"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02)
    return model


def mebibytes(model: nn.Module, local: bool) -> float:
    """The size of a model, or of this process's part."""
    tensors = [p.to_local() if local else p for p in model.parameters()]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def worker(blocks: int, with_data: bool) -> None:
    """Measure in this process, with the other."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    data = [torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    depcut.shrink(small, 0.4, data[0][:, :8], progress=False)  # what is imported is in memory
    model = dense(blocks)
    sizes = f"dense {mebibytes(model, False):.0f}, its part {mebibytes(model, True):.0f}"
    began = time.perf_counter()
    with Peak() as peak:
        chosen = {"data": data, "score": "flap"} if with_data else {}
        slim = depcut.shrink(model, 0.4, data[0], progress=False, **chosen)
    sizes += f", slim part {mebibytes(slim, True):.0f}"
    took = ", ".join(f"{NAMES[name]} {most:.0f}" for name, most in peak.grown.items())
    seconds = time.perf_counter() - began
    line = f"process {os.environ['RANK']}: {sizes}; at the peak {took} more; {seconds:.0f} s"
    print(line, file=sys.stderr)
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8, help="of 2 x 4 x 1024 x 1024 weights")
    parser.add_argument("--data", action="store_true", help="rank and repair on data")
    given = parser.parse_args()
    if "RANK" in os.environ:
        worker(given.blocks, given.data)
        return
    # glibc keeps what is freed for itself unless told not to, which is no need of ours.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")
    for code, error in launched(2, [sys.executable, *sys.argv], timeout=1800):
        if code:
            raise SystemExit(error)
        print(error.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
