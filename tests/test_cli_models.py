"""Models and weights that the command line names."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from depcut.cli.factories import Named
from depcut.cli.models import build_model
from depcut.cli.weights import fill
from depcut.errors import InputError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a.b:c", Named("a.b:c")),
        ("a:c()", Named("a:c")),
        ('a:c(1, "x", k=-2.5)', Named("a:c", (1, "x"), {"k": -2.5})),
        ("net-tiny.in1k(flags=[True])", Named("net-tiny.in1k", (), {"flags": [True]})),
    ],
)  # fmt: skip
def test_calls_are_read_as_literals(text, named):
    assert Named.read(text) == named


@pytest.mark.parametrize(
    "text",
    [
        "a:c(open('x'))",
        "a:c(x)",
        "a:c(1)(2)",
        "a:c(**{})",
        "a:c(*[1])",
        "a:c(1",
        "a:c(1) + f(2)",
        "a:c(" + "(" * 500,
    ],
)
def test_nothing_else_is_evaluated(text):
    with pytest.raises(InputError, match="cannot read the arguments"):
        Named.read(text)


class Net(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


CONTENTS = {
    "state dict": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": torch.tensor(0.5)},
    "model": lambda state: {"model": state, "model_ema": state, "optimizer": {"state": {}}},
    "one of another name": lambda state: {"weights": state, "step": 7},
    "data parallel": lambda state: prefixed(state, "module."),
    "compiled in a trainer": lambda state: {"state_dict": prefixed(state, "net._orig_mod.")},
    "shared once": lambda state: {n: t for n, t in state.items() if n != "second.weight"},
}


def assert_filled(model, state):
    assert model.second.weight is model.first.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("suffix", ["pth", "bin", ""])
def test_what_torch_saves_is_loaded(kind, suffix, tmp_path):
    state = state_of(Net())
    path = tmp_path / f"weights.{suffix}"
    torch.save(CONTENTS[kind](state), path)
    model = Net()
    fill(model, path)
    assert_filled(model, state)


def test_safetensors_of_any_name_and_several_files_are_loaded(tmp_path):
    state = state_of(Net())
    state["second.weight"] = state["second.weight"].clone()
    save_file(prefixed(state, "module."), tmp_path / "weights.tensors")
    model = Net()
    fill(model, tmp_path / "weights.tensors")
    assert_filled(model, state)
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    places = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part{i}.safetensors")
        places |= dict.fromkeys(half, f"part{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = Net()
    fill(model, index)
    assert_filled(model, state)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.pth", lambda p: p.write_bytes(pickle.dumps(Evil(), 2)), "more than tensors"),
        ("b.pth", lambda p: torch.save({"model": Net()}, p), "more than tensors"),
        ("c.pth", lambda p: torch.save([torch.ones(2)], p), "holds a list"),
        ("d.pth", lambda p: torch.save({"epoch": 3}, p), "holds epoch"),
        ("e.pth", lambda p: torch.save({"a": torch.ones(2)}, p), "it lacks first.weight"),
        ("f.pth", lambda p: torch.save({**state_of(Net()), "x": torch.ones(1)}, p), "no x"),
        ("g.pth", lambda p: torch.save({**state_of(Net()), "norm.bias": torch.ones(1)}, p),
         r"norm.bias has shape \[1\], in the model \[4\]"),
        ("h.pth", lambda p: p.write_bytes(b""), "cannot be loaded"),
        ("i.index.json", lambda p: p.write_text("{}"), "no weight_map"),
        ("j.index.json", lambda p: p.write_text('{"weight_map": {"a": "../k"}}'), "no file of"),
        ("k.index.json", lambda p: p.write_text('{"weight_map": {"a": "k"}}'), "no such file"),
        ("l.safetensors", lambda p: p.write_bytes(b"\0" * 20), "cannot be loaded"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(name, write, says, tmp_path, capsys):
    path = tmp_path / name
    write(path)
    model = Net()
    before = state_of(model)
    with pytest.raises(InputError, match=says):
        fill(model, path)
    assert capsys.readouterr().out == ""
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_folder_is_named_with_its_library(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        build_model(str(tmp_path))
    assert caught.value.remedy == f"write hf:{tmp_path}"


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match="timm cannot be imported") as caught:
        build_model("timm:resnet18")
    assert caught.value.remedy == "pip install timm"
