"""Checkpoints with biases: what removed units contribute as constants goes into these."""

import pytest
import torch
from test_checkpoints import tensors
from zoo import libraries

import depcut
from depcut.streaming import job as jobs

GONE = (5, 17)  # units whose rows are zero: what is left of them is their bias
HELD = {"gpt2": "*wte*", "bert": "*embeddings*"}


def build(name):
    """One layer, whose biases and norms are not as initialised."""
    transformers = libraries()["transformers"]
    same = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    same |= {"vocab_size": 100, "max_position_embeddings": 64}
    if name == "gpt2":
        given = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_inner": 96, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, **given))
    return transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=96, **same))


@pytest.fixture(params=HELD)
def checkpoint(request, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(request.param).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for name, layer in model.named_modules():
            if name.endswith(("c_fc", "intermediate.dense")):
                turned = isinstance(layer, torch.nn.Linear)  # GPT-2 has (in, out)
                (layer.weight.data if turned else layer.weight.data.T)[list(GONE)] = 0
                layer.bias.data[list(GONE)] = 0.5
    model.save_pretrained(tmp_path / "dense")
    return request.param, tmp_path / "dense", type(model)


@pytest.mark.sweep
def test_constants_are_folded_as_in_the_loaded_model(checkpoint, tmp_path, monkeypatch):
    name, src, kind = checkpoint
    made = []

    def seen(*given, real=jobs.folded):
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(jobs, "folded", seen)
    asked = {"score": "magnitude", "ignore": [HELD[name]], "progress": False}
    depcut.shrink_checkpoint(src, tmp_path / "slim", 0.3, **asked)
    slim = depcut.shrink(kind.from_pretrained(src), 0.3, rebuildable=True, **asked)
    slim.save_pretrained(tmp_path / "same")
    written, expected = tensors(tmp_path / "slim"), tensors(tmp_path / "same")
    assert written.keys() == expected.keys()
    for tensor in expected:
        torch.testing.assert_close(written[tensor], expected[tensor], rtol=1e-6, atol=1e-7)
    assert made
    assert made[0] is not None
    dense = tensors(src)
    (bias,) = made[0].tensors
    assert not torch.equal(written[bias], dense[bias])
    card = (tmp_path / "slim" / "README.md").read_text()
    assert f"transformers.{kind.__name__}.from_pretrained(folder)" in card
    assert "| `report.json` | what `depcut.report` prints |" in card
