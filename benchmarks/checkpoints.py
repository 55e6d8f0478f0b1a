"""How much memory and time does a checkpoint take that never fits, and does a killed run go on?

    python benchmarks/checkpoints.py --size 50M             one row: seconds, peak resident size
    python benchmarks/checkpoints.py --size 50M --kill 20   kill -9 at random moments, 20 times

A Llama of random weights in bfloat16 is written shard by shard, tensor by tensor; a fresh process
shrinks it and tells its peak resident size (VmHWM, mapped pages included) and what Python, torch
and transformers take of that before any work; another one loads the result with `from_pretrained`
and computes with it. Rows go to results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
# Hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary.
SIZES = {
    "5M": (192, 512, 4, 6, 3, 8000),
    "50M": (512, 1408, 8, 8, 4, 32000),
    "50M-wide": (640, 1760, 2, 8, 4, 32000),  # most of it are the words
    "80M": (1024, 2816, 6, 16, 8, 1000),  # no tensor is large
    "300M": (1024, 2816, 20, 16, 8, 32000),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
    "3B": (3200, 8640, 26, 32, 32, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}
_SHARD = {
    "5M": 4 * 2**20,
    "50M": 40 * 2**20,
    "50M-wide": 40 * 2**20,
    "80M": 40 * 2**20,
    "300M": 200 * 2**20,
}  # bytes of a shard, at most
_LARGE_SHARD = 2 * 2**30

# A torch for the CPU alone does not take every torchvision, which no language model needs.
WITHOUT = """
import sys
sys.modules["torchvision"] = None
"""
# Real text, and the peak resident size.
MEASURE = r"""
import os, re, zlib
from pathlib import Path
def tokens(count, words):
    # Words and signs of the standard library's source, numbered by a checksum.
    found = []
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        text = re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf-8"))
        found += [zlib.crc32(word.encode()) % words for word in text]
        if len(found) >= count:
            return torch.tensor(found[:count])
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""
SHRINK = f"""{WITHOUT}
import json, time
import torch, transformers, depcut
{MEASURE}
given = json.loads(sys.argv[1])
if given.get("data"):
    batches, length, words = given["data"]
    given["data"] = list(tokens(batches * length, words).reshape(batches, 1, length))
before, start = peak(), time.perf_counter()
report = depcut.shrink_checkpoint(**given, progress=False)
print(json.dumps({{
    "seconds": time.perf_counter() - start, "peak": peak(), "imports": before,
    "macs": report.macs, "params": report.params, "error": report.error,
}}))
"""
LOAD = f"""{WITHOUT}
import json
import torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype="auto", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(torch.arange(8)[None]).logits
assert bool(torch.isfinite(logits).all())
params = sum(p.numel() for p in model.parameters())
print(json.dumps({{"dtype": str(model.dtype), "params": params}}))
"""


def write_llama(folder: Path, size: str, seed: int = 0) -> int:
    """Write a Llama of random weights, one tensor in memory at a time; its bytes.

    Args:
        folder: Where; it is made.
        size: A key of `SIZES`.
        seed: Of the weights.
    """
    import torch
    import transformers

    from depcut.support.weights import Stored, write_part_by_part

    hidden, inner, layers, heads, pairs, words = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, vocab_size=words,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {
            n: tuple(p.shape) for n, p in transformers.LlamaForCausalLM(config).named_parameters()
        }
    shards: list[dict[str, Stored]] = [{}]
    for name, shape in shapes.items():
        tensor = Stored("BF16", 2, shape)
        held = sum(t.bytes for t in shards[-1].values())
        if held and held + tensor.bytes > _SHARD.get(size, _LARGE_SHARD):
            shards.append({})
        shards[-1][name] = tensor
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str) -> Any:
        rows, *rest = shapes[name]
        step = max(1, 2**22 // max(1, sum(rest)))
        for start in range(0, rows, step):
            part = torch.randn(min(step, rows - start), *rest, generator=generator)
            scaled = 1 + 0.1 * part if not rest else part * rest[0] ** -0.5
            yield scaled.to(torch.bfloat16)

    where = {}
    for number, layout in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_part_by_part(layout, drawn, folder / file)
        where.update(dict.fromkeys(layout, file))
    total = sum(t.bytes for layout in shards for t in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def shrunk(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process says of one call.

    Args:
        request: Arguments of `depcut.shrink_checkpoint`.
    """
    command = [sys.executable, "-c", SHRINK, json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file of a folder.

    Args:
        folder: The folder.
    """
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def killed(request: dict[str, Any], times: int, seconds: float, seed: int = 0) -> list[float]:
    """Kill a run at random moments, start it again until it ends; the moments.

    Args:
        request: Arguments of `depcut.shrink_checkpoint`.
        times: How often.
        seconds: What an undisturbed run takes, with its imports.
        seed: Of the moments.
    """
    draw, moments = random.Random(seed), []
    command = [sys.executable, "-c", SHRINK, json.dumps(request)]
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        moments.append(draw.uniform(0.2, 1.0) * seconds)
        try:
            process.wait(moments[-1])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    shrunk(request)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, action="append", required=True)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--score", default="random")
    parser.add_argument("--memory")
    parser.add_argument(
        "--data", type=int, nargs=2, metavar=("TEXTS", "TOKENS"), help="calibrate on text"
    )
    parser.add_argument("--kill", type=int, default=0, metavar="TIMES")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; kept, if given")
    options = parser.parse_args()
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # as in the other processes
    work = options.work or Path(tempfile.mkdtemp(prefix="checkpoints-"))
    try:
        for size in options.size:
            _one(size, work, options)
    finally:
        if options.work is None:
            shutil.rmtree(work)
    print(table(json.loads(RESULTS.read_text())))


def _one(size: str, work: Path, options: argparse.Namespace) -> None:
    src, dst = work / size, work / f"{size}-slim"
    if not src.exists():
        write_llama(src, size)
    total = sum(file.stat().st_size for file in src.glob("*.safetensors"))
    shutil.rmtree(dst, ignore_errors=True)
    request = {
        "src": str(src), "dst": str(dst), "ratio": options.ratio, "score": options.score,
        "memory": options.memory,
        "data": [*options.data, SIZES[size][-1]] if options.data else None,
    }  # fmt: skip
    start = time.perf_counter()
    said = shrunk(request)
    whole = time.perf_counter() - start
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(dst)], check=True, capture_output=True, text=True
    )
    row = {"size": size, "score": options.score, "ratio": options.ratio, "bytes": total, **said}
    row["data"], row["memory"] = options.data, options.memory
    row["loaded"] = json.loads(loaded.stdout.splitlines()[-1])
    if options.kill:
        expected = contents(dst)
        shutil.rmtree(dst)
        row["killed"] = killed(request, options.kill, whole)
        row["same_bytes"] = contents(dst) == expected
        assert row["same_bytes"], "a run that was killed ended with other files"
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = ("size", "score", "ratio", "data")
    rows = [r for r in rows if any(r.get(n) != row[n] for n in same)]
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown.

    Args:
        rows: Of results/checkpoints.json.
    """
    lines = [
        "| parameters | score | data | file bytes | seconds | peak | imports | MACs | killed |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        left = row["macs"][1] / row["macs"][0]
        data = "x".join(map(str, row.get("data") or ())) or "-"
        cells = [row["size"], row["score"], data, f"{row['bytes'] / 2**30:.2f} GiB"]
        cells += [f"{row['seconds']:.0f}", f"{row['peak'] / 2**30:.2f} GiB"]
        cells += [f"{row['imports'] / 2**30:.2f} GiB", f"{left:.1%}"]
        cells.append(str(len(row.get("killed", []))) if row.get("same_bytes") else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
