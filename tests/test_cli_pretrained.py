"""`hf:folder` on the command line, and stock `from_pretrained` of what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import libraries

from depcut.cli.main import main
from depcut.cli.models import build_model

STOCK = """
import sys
sys.path.insert(0, sys.argv[1])
from zoo import libraries
import torch
model = libraries()["transformers"].AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = torch.arange(5, 15)[None]
with torch.no_grad():
    generated = model.generate(ids, do_sample=False, max_new_tokens=5)
    torch.save([model(ids).logits, generated], sys.argv[3])
assert "depcut" not in sys.modules
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """What save_pretrained wrote, with a tokenizer's file and a card of the dense model."""
    transformers = libraries()["transformers"]
    folder = tmp_path_factory.mktemp("hub") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("of the dense model")
    (folder / "model.onnx").write_bytes(b"dense")
    return folder


@pytest.mark.sweep
def test_a_shrunk_llama_comes_back_in_a_process_without_depcut(llama, tmp_path, capsys):
    out = tmp_path / "slim"
    for ratio in ("0.4", "0.3"):  # the second replaces what the first wrote
        assert main(["shrink", f"hf:{llama}", "--ratio", ratio, "--out", str(out)]) == 0
    assert f"LlamaForCausalLM.from_pretrained({str(out)!r})" in capsys.readouterr().out
    names = {file.name for file in out.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"),
        *("plan.json", "report.json", "depcut.json", "README.md"),
    }
    card = (out / "README.md").read_text()
    assert "transformers.LlamaForCausalLM.from_pretrained(folder)" in card
    assert "of the dense model" not in card
    assert all(f"`{name}`" in card for name in names)
    macs = json.loads((out / "report.json").read_text())["macs"]
    assert 0.6 < macs[1] / macs[0] <= 0.71
    found = tmp_path / "found.pt"
    given = (str(Path(__file__).parent), str(out), str(found))
    subprocess.run([sys.executable, "-c", STOCK, *given], check=True, capture_output=True)
    slim = build_model(f"hf:{out}")
    assert type(slim).__name__ == "LlamaForCausalLM"
    ids = torch.arange(5, 15)[None]
    logits, generated = torch.load(found, weights_only=True)
    with torch.no_grad():
        assert torch.equal(slim(ids).logits, logits)
        assert torch.equal(slim.generate(ids, do_sample=False, max_new_tokens=5), generated)


@pytest.mark.sweep
def test_a_freely_cut_llama_is_a_folder_of_depcut(llama, tmp_path, capsys):
    out = tmp_path / "free"
    given = ("--ratio", "0.3", "--rebuildable", "false", "--out", str(out))
    assert main(["shrink", f"hf:{llama}", *given]) == 0
    assert f"load it with depcut.load({str(out)!r})" in capsys.readouterr().out
    assert build_model(str(out)).config.architectures == ["LlamaForCausalLM"]


@pytest.mark.sweep
def test_weights_that_a_folder_lacks_are_named(llama, tmp_path):
    transformers = libraries()["transformers"]
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    state = model.state_dict()
    del state["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.warns(UserWarning, match=r"no weights for lm_head.weight: they are drawn"):
        build_model(f"hf:{tmp_path}")


@pytest.mark.sweep
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_of_catalogues_take_arguments(library):
    libraries()
    model = build_model(f"{library}:resnet18(num_classes=3)")
    assert model.fc.out_features == 3
