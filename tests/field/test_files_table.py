"""The README's table of files: what each needs, tried in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_nets import Heads, drawn, seeded
from torch import nn

import depcut

FIELD = Path(__file__).parent
ROOT = FIELD.parent.parent
X = drawn(3, 6, 8)

# What reads each file, and with what the model is called; `f` is its folder.
READ = {
    "slim.save_pretrained(f)": (
        "import zoo; zoo.libraries(); import transformers\n"
        "    return transformers.AutoModelForCausalLM.from_pretrained(f)"
    ),
    "depcut.save(slim, f)": "import depcut; return depcut.load(f)",
    "depcut.save(slim, f), arguments": (
        "import depcut, patch_nets; return depcut.load(f, lambda: patch_nets.Heads(0.0))"
    ),
    "torch.save(slim, f)": "return torch.load(f + '/model.pt', weights_only=False)",
    "plan.save(f), state_dict": (
        "import depcut, patch_nets, safetensors.torch as s\n"
        "    slim = depcut.Plan.load(f + '/plan.json').apply(patch_nets.Heads())\n"
        "    slim.load_state_dict(s.load_file(f + '/weights.safetensors')); return slim"
    ),
    'depcut.save(..., standalone="program")': (
        "return torch.export.load(f + '/program.pt2').module()"
    ),
    "depcut.export(slim, f)": (
        "import onnxruntime, numpy\n"
        "    run = onnxruntime.InferenceSession(f + '/slim.onnx').run\n"
        "    return lambda x: torch.from_numpy(run(None, {'x': x.numpy()})[0])"
    ),
}
DEFAULT = ("depcut.save(slim, f)",)

SCRIPT = """
import json, sys, warnings
import torch

warnings.simplefilter("ignore")
folder = sys.argv[1]
x, longer, fewer, wanted = torch.load(folder + "/calls.pt", weights_only=True)

def read(f):
    {read}

def first(out):
    return out if torch.is_tensor(out) else out[0] if isinstance(out, tuple) else out["logits"]

def attempt(hidden):
    for name in hidden:
        sys.modules[name] = None
    try:
        return read(folder)
    except Exception as error:
        print(type(error).__name__, str(error)[:500], file=sys.stderr)
        return None
    finally:
        for name in hidden:
            del sys.modules[name]
        for name in [n for n in sys.modules if n.split(".")[0] in hidden]:
            del sys.modules[name]

def runs(x):
    try:
        first(model(x))
        return True
    except Exception:
        return False

found = {{}}
own = {own!r}
model = attempt(["depcut", own])
if model is not None:
    found["depcut"] = found["class"] = False
else:
    model = attempt(["depcut"])
    found["depcut"], found["class"] = model is None, True
    if model is None:
        model = attempt([own])
        found["class"] = model is None
        if model is None:
            model = attempt([])
assert model is not None
with torch.no_grad():
    found["difference"] = float((first(model(x)) - wanted).abs().max())
found["lengths"], found["batches"] = runs(longer), runs(fewer)
try:
    model.train()
    first(model(x)).square().sum().backward()
    found["trainable"] = all(p.grad is not None for p in model.parameters())
except Exception:
    found["trainable"] = False
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a row, in this process."""
    slim = depcut.shrink(seeded(Heads).eval(), 0.4, X, align=1)

    def made(row: str) -> Path:
        folder = tmp_path_factory.mktemp("row")
        if row == "depcut.export(slim, f)":
            depcut.export(slim, folder / "slim.onnx", X)
        elif row == "torch.save(slim, f)":
            torch.save(slim, folder / "model.pt")
        elif row == "slim.save_pretrained(f)":
            return pretrained(folder)
        else:
            standalone = "program" if "standalone" in row else ()
            depcut.save(slim, folder, standalone=standalone)
        write_calls(folder, slim, X, drawn(3, 9, 8), drawn(5, 6, 8))
        return folder

    return made


def write_calls(folder: Path, slim: nn.Module, *calls: Any) -> None:
    with torch.no_grad():
        out = slim(calls[0])
    torch.save((*calls, out if torch.is_tensor(out) else out[0]), folder / "calls.pt")


def pretrained(folder: Path) -> Path:
    """A slim Llama as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    slim = depcut.shrink(dense, 0.4, {"input_ids": ids}, align=1)
    slim.save_pretrained(folder)
    write_calls(folder, slim, ids, torch.arange(40).reshape(2, 20), ids[:1].repeat(5, 1))
    return folder


def table() -> dict[str, list[str]]:
    """The cells of each row, by what is in its first cell between backquotes."""
    text = (ROOT / "README.md").read_text().partition("### Files")[2].partition("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].replace("`", ""): row[1:] for row in rows}


def test_the_table_has_these_rows() -> None:
    assert list(table()) == list(READ)


def said(found: dict[str, Any]) -> list[str]:
    """What the cells of a row must be, of what was found."""
    sizes = [name for name in ("lengths", "batches") if found[name]]
    return [
        "yes" if found["depcut"] else "no",
        "yes" if found["class"] else "no",
        "both" if len(sizes) == 2 else sizes[0] if sizes else "neither",
        "yes" if found["trainable"] else "no",
    ]


@pytest.mark.parametrize(
    "row", [r if r in DEFAULT else pytest.param(r, marks=pytest.mark.sweep) for r in READ]
)
@pytest.mark.filterwarnings("ignore")
def test_a_fresh_process_needs_what_the_table_says(
    row: str, files: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    if row.startswith("slim."):
        request.getfixturevalue("zoo_libraries")
    folder = files(row)
    own = "transformers" if row.startswith("slim.") else "patch_nets"
    script = SCRIPT.format(read=READ[row], own=own)
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{FIELD}:{FIELD.parent}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    line = next(line for line in ran.stdout.splitlines() if line.startswith("found "))
    found = json.loads(line.removeprefix("found "))
    exact = not row.startswith(("depcut.export", 'depcut.save(..., standalone="program")'))
    assert found["difference"] <= (0.0 if exact else 1e-5)
    assert said(found) == table()[row][:4]
