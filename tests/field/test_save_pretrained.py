"""Models that their config cannot rebuild refuse to be saved for `from_pretrained`."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import depcut
from depcut.errors import DepcutError
from depcut.integrations.reload import reload_problem
from depcut.integrations.transformers_config import recipe

pytestmark = [
    pytest.mark.usefixtures("zoo_libraries"),
    pytest.mark.filterwarnings("ignore"),  # what these libraries warn of is theirs
]

LLAMA = FAMILIES["Llama (GQA)"]
IDS = {"input_ids": LLAMA.inputs(2)["input_ids"]}


def dense() -> Any:
    return LLAMA.build(num_hidden_layers=1, use_cache=False)


@pytest.fixture(scope="module")
def whole() -> Any:
    return dense()


@pytest.fixture(scope="module")
def freely_cut(whole: Any) -> Any:
    return depcut.shrink(whole, 0.2, IDS, rebuildable=False)


def assert_refused(model: Any, folder: Path, method: str = "save_pretrained") -> None:
    with pytest.raises(DepcutError) as refused:
        getattr(model, method)(folder)
    text = str(refused.value)
    assert "from_pretrained could not rebuild this model" in text
    assert f"{type(model).__name__}.{method}" in text
    assert "depcut.save(slim, folder)" in text
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_what_the_config_cannot_express(freely_cut: Any, method: str, tmp_path: Path) -> None:
    assert_refused(freely_cut, tmp_path / "slim", method)
    assert_refused(freely_cut.model, tmp_path / "slim", method)  # the part that holds the layers
    assert type(freely_cut) is type(dense())


def test_copies_and_pickles_refuse_too(freely_cut: Any, tmp_path: Path) -> None:
    for model in (copy.deepcopy(freely_cut), pickle.loads(pickle.dumps(freely_cut))):  # noqa: S301
        assert_refused(model, tmp_path / "slim")
        with torch.no_grad():
            assert torch.equal(model(**IDS).logits, freely_cut(**IDS).logits)


def test_what_is_stored_and_loaded_refuses_too(freely_cut: Any, tmp_path: Path) -> None:
    depcut.save(freely_cut, tmp_path / "stored")
    loaded = depcut.load(tmp_path / "stored")
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, freely_cut(**IDS).logits)
    for model in (loaded, loaded.model):
        with pytest.raises(DepcutError, match=r"depcut\.save\(slim, folder\)"):
            model.save_pretrained(tmp_path / "slim")


def test_the_report_says_why(freely_cut: Any) -> None:
    (note,) = (n for n in depcut.report(freely_cut).notes if "save_pretrained" in n)
    assert "its config builds" in note


@pytest.mark.usefixtures("freely_cut")
def test_the_dense_model_is_saved_as_ever(whole: Any, tmp_path: Path) -> None:
    whole.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**IDS).logits, whole(**IDS).logits)


def test_what_hangs_from_the_model_comes_along() -> None:
    model = dense()
    model.generation_config.temperature, model.config.id2label = 0.7, {0: "no", 1: "yes"}
    model.processor = {"kind": "any object that someone hung there"}
    said = model.config.to_dict(), model.generation_config.to_dict()
    slim = depcut.shrink(model, 0.2, IDS)
    assert slim.generation_config.to_dict() == said[1]
    assert slim.config.id2label == model.config.id2label
    assert slim.processor == model.processor
    assert slim.config is not model.config
    assert slim.model.config is slim.config
    assert slim.generation_config is not model.generation_config
    assert (model.config.to_dict(), model.generation_config.to_dict()) == said


class WithHead(nn.Module):
    """A model of the library inside of someone's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = dense().model
        self.head = nn.Linear(48, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(input_ids).last_hidden_state[:, -1])
        return out


def test_a_model_inside_of_another(tmp_path: Path) -> None:
    slim = depcut.shrink(WithHead().eval(), 0.2, IDS["input_ids"])
    assert_refused(slim.body, tmp_path / "slim")
    (note,) = (n for n in depcut.report(slim).notes if "save_pretrained" in n)
    assert note.startswith("body refuses")


def test_other_libraries_with_these_methods(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Sequential, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 16) -> None:
            super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    assert_refused(depcut.shrink(Net().eval(), 0.5, torch.randn(2, 4)), tmp_path / "slim")


# What from_pretrained would make -----------------------------------------------------------------


def problem(model: Any) -> str | None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = reload_problem(model, recipe(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    return found


@pytest.mark.parametrize("name", ["Llama (GQA)", "Qwen3-MoE", "RoBERTa", "Wav2Vec2", "Swin"])
def test_what_its_config_rebuilds(name: str) -> None:
    assert problem(FAMILIES[name].build()) is None


def test_sizes_that_differ() -> None:
    model = dense()
    model.config.intermediate_size = 80
    found = problem(model)
    assert (
        found
        == "model.layers.0.mlp.gate_proj.weight is 88 x 48, its config builds 80 x 48 (and 2 more)"
    )


def test_layers_that_are_gone() -> None:
    model = LLAMA.build(num_hidden_layers=2)
    del model.model.layers[1]
    assert "its config builds model.layers.1." in str(problem(model))


def test_values_that_no_file_holds() -> None:
    model = dense()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
    assert "model.rotary_emb.inv_freq: the class builds a buffer" in str(problem(model))
