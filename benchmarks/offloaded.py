"""A model that accelerate has spread over memory and the disk: shrunk as the plain one is.

    python benchmarks/offloaded.py [--size 50M] [--texts 8] [--tokens 64]

A Llama of random weights is loaded by `from_pretrained`, once as it is and once with a `device_map`
that leaves its first half in memory and the rest on the disk, each in a process of its own; both
are ranked (obs), shrunk by 30 % of the MACs and re-solved on the same text. Printed: seconds, and
the peak resident size, mapped pages included; then whether plans and weights are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints

RUN = f"""{checkpoints.WITHOUT}
import json, time
import torch, transformers, depcut
from safetensors.torch import save_file
{checkpoints.MEASURE}
given = json.loads(sys.argv[1])
torch.set_num_threads(1)
chosen = {{}}
if given["offloaded"]:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(given["src"])
        made = transformers.AutoModelForCausalLM.from_config(config)
    half = len(made.model.layers) // 2
    places = {{f"model.layers.{{i}}": "cpu" if i < half else "disk" for i in range(2 * half)}}
    places |= {{"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "disk"}}
    places["model.rotary_emb"] = "cpu"
    chosen = {{"device_map": places, "offload_folder": given["out"] + "-offload"}}
model = transformers.AutoModelForCausalLM.from_pretrained(given["src"], dtype="auto", **chosen)
loaded, start = peak(), time.perf_counter()
data = list(tokens(given["texts"] * given["tokens"], model.config.vocab_size)
            .reshape(given["texts"], 1, given["tokens"]))
slim = depcut.shrink(model, 0.3, data=data, memory="256MiB", progress=False)
save_file({{n: t.contiguous() for n, t in slim.state_dict().items()}}, given["out"])
print(json.dumps({{
    "seconds": time.perf_counter() - start, "loaded": loaded, "peak": peak(),
    "plan": depcut.report(slim).digest, "on the disk": sum(p.is_meta for p in model.parameters()),
}}))
"""


def run(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process says of one of the two.

    Args:
        request: src, out, offloaded, texts, tokens.
    """
    command = [sys.executable, "-c", RUN, json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=checkpoints.SIZES, default="50M")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # no language model needs it
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "dense"
        stored = checkpoints.write_llama(src, options.size)
        print(
            f"{options.size}, {stored / 2**20:.0f} MiB, {options.texts} x {options.tokens} tokens"
        )
        found, files = [], []
        for offloaded in (False, True):
            files.append(Path(folder) / f"slim-{offloaded}.safetensors")
            request = {"src": str(src), "out": str(files[-1]), "offloaded": offloaded}
            found.append(run({**request, "texts": options.texts, "tokens": options.tokens}))
            row = found[-1]
            name, mib = "offloaded" if offloaded else "plain", row["peak"] / 2**20
            print(
                f"{name:>9}: {row['on the disk']:3d} parameters on the disk, "
                f"{row['seconds']:.0f} s, peak {mib:.0f} MiB, {row['loaded'] / 2**20:.0f} loaded"
            )
        plain, spread = (load_file(file) for file in files)
        off = max(float((plain[n].double() - spread[n].double()).abs().max()) for n in plain)
        print(f"same plan: {found[0]['plan'] == found[1]['plan']}; weights differ by {off:.1e}")
        assert plain.keys() == spread.keys()
        assert found[0]["plan"] == found[1]["plan"]


if __name__ == "__main__":
    main()
