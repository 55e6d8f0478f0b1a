"""One, two and four processes: the same plan and weights, from shares of the same batches.

    python benchmarks/processes.py            # prints a table, writes results/processes.json
    torchrun --nproc-per-node 2 benchmarks/processes.py --worker out.json

Every run is a launch of this very script in that many processes that talk over gloo.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import depcut

RESULTS = Path(__file__).parent / "results" / "processes.json"
BATCHES = 6


def llama() -> tuple[nn.Module, list[Any]]:
    """A Llama of two layers with grouped queries, and batches of tokens."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import zoo

    zoo.libraries()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes, **heads)
    torch.manual_seed(0)
    model = perturbed(LlamaForCausalLM(config).eval())
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 64, (2, 16), generator=generator) for _ in range(BATCHES)]
    return model, [{"input_ids": t} for t in tokens]


def convnet() -> tuple[nn.Module, list[Any]]:
    """A convnet with batch norms, and batches of images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(BATCHES)]
    return perturbed(model.eval()), images


def perturbed(model: nn.Module) -> nn.Module:
    """The model with biases, norms and statistics away from their initial values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def squared(output: Any, _: Any) -> torch.Tensor:
    """A loss for criteria that need one."""
    value: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return value.square().mean()


NETS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {"llama": llama, "convnet": convnet}
# Name of the row: network, options, batches that are read.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama, obs and compensation": ("llama", {}, BATCHES),
    "Llama, flap, of the parameters": ("llama", {"score": "flap", "of": "params"}, BATCHES),
    "Llama, taylor": ("llama", {"score": "taylor", "loss": squared}, BATCHES),
    "Llama, branches and widths": ("llama", {"depth": True}, BATCHES),
    "convnet, obs and compensation": ("convnet", {}, BATCHES),
    "convnet, apoz": ("convnet", {"score": "apoz"}, BATCHES),
    "convnet, fewer batches than processes": ("convnet", {}, 1),
}


def shrunk(row: str) -> tuple[nn.Module, str]:
    """The smaller model of a row, and a digest of its plan."""
    net, options, count = ROWS[row]
    model, data = NETS[net]()
    chosen = {"align": 1, "rebuildable": False, "progress": False, **options}
    slim = depcut.shrink(model, 0.4, data=data, batches=count, **chosen)
    return slim, depcut.report(slim).digest


def worker(path: Path, rows: list[str]) -> None:
    """Shrink in this process, with the others of its launch; each writes what it got."""
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    if size > 1:
        torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for row in rows:
        began = time.perf_counter()
        slim, digest = shrunk(row)
        state = {n: t.double().flatten().tolist() for n, t in slim.state_dict().items()}
        text = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        seconds = time.perf_counter() - began
        found[row] = {"plan": digest, "weights": state, "bytes": text, "seconds": seconds}
    path.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))
    if size > 1:
        torch.distributed.destroy_process_group()


def launched(size: int, command: list[str], timeout: float = 600) -> list[tuple[int, str]]:
    """Run a command in several processes; exit code and standard error of each.

    Args:
        size: How many processes.
        command: What each of them runs.
        timeout: In seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, error) for p, error in zip(started, errors, strict=True)]


def results(size: int, rows: list[str]) -> list[dict[str, Any]]:
    """What each of several processes got for some rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", str(path), "--rows", *rows]
        for code, error in launched(size, command):
            if code:
                raise SystemExit(error)
        return [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(size)]


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """The largest difference of weights, relative to the largest weight of each tensor."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, values in one.items():
        scale = max(map(abs, values), default=0.0) or 1.0
        pairs = zip(values, other[name], strict=True)
        worst = max(worst, *(abs(a - b) / scale for a, b in pairs))
    return worst


def table(sizes: list[int], rows: list[str]) -> list[dict[str, Any]]:
    """Each row in each number of processes, compared with one."""
    found = {size: results(size, rows) for size in sizes}
    out = []
    for row in rows:
        alone = found[sizes[0]][0][row]
        for size in sizes:
            each = [process[row] for process in found[size]]
            same = len({e["bytes"] for e in each}) == 1
            worst = 0.0
            if each[0]["plan"] == alone["plan"]:
                worst = difference(alone["weights"], each[0]["weights"])
            out.append(
                {
                    "run": row,
                    "processes": size,
                    "plan": each[0]["plan"],
                    "same plan as one": each[0]["plan"] == alone["plan"],
                    "largest difference of weights": worst,
                    "bytes equal in all processes": same,
                    "seconds": round(max(e["seconds"] for e in each), 2),
                }
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help="of a launch: where to write what was got")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="which runs")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 2, 4], help="processes")
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.rows)
        return
    found = table(given.sizes, given.rows)
    print("| run | processes | plan | weights differ by | equal in all | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        plan = f"{row['plan'][:12]}{'' if row['same plan as one'] else ' (another)'}"
        print(
            f"| {row['run']} | {row['processes']} | {plan} | "
            f"{row['largest difference of weights']:.1e} | "
            f"{'yes' if row['bytes equal in all processes'] else 'no'} | {row['seconds']} |"
        )
    if given.rows == list(ROWS):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
