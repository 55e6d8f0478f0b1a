"""Whole layers go, and the class is built anew from a config that says how many there are."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from families import FAMILIES, Family, generated, outputs
from torch import Tensor, nn

import depcut
from depcut.errors import BudgetError, InputError, PlanError
from depcut.integrations.transformers_config import recipe
from depcut.plan.stacks import name_now, stacks_of
from depcut.rebuild.builder import Builder
from depcut.rebuild.layers import fits, stacks_in

pytestmark = [
    pytest.mark.usefixtures("zoo_libraries"),
    pytest.mark.filterwarnings("ignore"),  # what these libraries warn of is theirs
]

TESTS = Path(__file__).resolve().parent.parent
LLAMA = FAMILIES["Llama (GQA)"]
WHOLE = {"encoder-decoder": ("logits",)}
STAY = (0, 2)  # of three layers, of which the second does next to nothing; (0, 2, 3) of four
# Options of its config, share to remove, number of its config.
CASES: dict[str, tuple[dict[str, Any], float, str]] = {
    "Llama (GQA)": ({"num_hidden_layers": 3}, 0.5, "num_hidden_layers"),
    "Qwen2": ({"num_hidden_layers": 3}, 0.5, "num_hidden_layers"),
    "GPT-2": ({"n_layer": 3}, 0.5, "n_layer"),
    "Gemma 2": ({"num_hidden_layers": 4}, 0.35, "num_hidden_layers"),
    "T5": ({"num_layers": 3, "num_decoder_layers": 2}, 0.4, "num_layers"),
    "ViT": ({"num_hidden_layers": 3}, 0.5, "num_hidden_layers"),
}


@torch.no_grad()
def without_effect(model: nn.Module, number: int) -> nn.Module:
    """The model whose layers of a number add next to nothing to their stream."""
    for name, parameter in model.named_parameters():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        if layer == str(number) and any(end in name for end in _ENDS):
            parameter.mul_(1e-3)
    return model


_ENDS = ("o_proj", "down_proj", "c_proj", ".o.", ".wo.", "mlp.fc2", "layernorm.weight")
_ENDS += ("attention_output", "output.dense", "post_feedforward", "post_attention_layernorm")


class Cut:
    """A family with a layer that adds next to nothing, and what became of it."""

    def __init__(self, name: str, idle: int = 1) -> None:
        changes, ratio, self.number = CASES[name]
        self.family: Family = FAMILIES[name]
        self.dense: Any = without_effect(self.family.build(**changes), idle)
        self.config = copy.deepcopy(self.dense.config.to_dict())
        given = self.family.inputs(2)
        self.analysis = depcut.analyze(self.dense, given, WHOLE.get(self.family.kind))
        self.plan = self.analysis.plan(ratio, depth=True)
        self.slim: Any = self.plan.apply(self.dense)

    def back(self, folder: Path) -> Any:
        """What is loaded of what is saved."""
        self.slim.save_pretrained(folder)
        auto = getattr(zoo.libraries()["transformers"], self.family.auto_class)
        return auto.from_pretrained(folder).eval()


@functools.cache
def cut_of(name: str) -> Cut:
    """Made once, for several tests."""
    return Cut(name)


@pytest.fixture(scope="module")
def llama() -> Cut:
    return cut_of("Llama (GQA)")


def assert_equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def only_layers(plan: depcut.Plan) -> depcut.Plan:
    """The plan that drops the same layers and narrows nothing."""
    settings = copy.deepcopy(dict(plan.settings))
    settings["rebuild"]["fields"] = []
    return replace(plan, kept={}, settings=settings)


def zeroed(model: nn.Module, plan: depcut.Plan) -> nn.Module:
    """The dense model whose dropped layers add nothing."""
    dense = copy.deepcopy(model)
    gone = tuple(
        f"{holder}.{i}." for s in stacks_of(plan.settings) for holder in s.holders for i in s.gone
    )
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.startswith(gone) and any(end in name for end in _ENDS):
                parameter.zero_()
    return dense


# One family, all that is said of it ---------------------------------------------------------------


def test_a_layer_in_the_middle_goes(llama: Cut, tmp_path: Path) -> None:
    (stack,) = stacks_of(llama.plan.settings)
    assert stack.kept == STAY
    assert llama.plan.kept, "widths meet the rest"
    assert llama.plan.macs / llama.analysis.macs == pytest.approx(0.5, abs=0.05)
    assert type(llama.slim) is type(llama.dense)
    assert type(llama.slim.model.layers) is nn.ModuleList
    assert [layer.self_attn.layer_idx for layer in llama.slim.model.layers] == [0, 1]
    assert llama.slim.config.num_hidden_layers == 2
    assert llama.dense.config.to_dict() == llama.config
    back = llama.back(tmp_path)
    assert_equal(outputs(LLAMA, llama.slim), outputs(LLAMA, back))
    assert_equal(generated(LLAMA, llama.slim, "greedy"), generated(LLAMA, back, "greedy"))
    cached, uncached = (generated(LLAMA, back, way)["tokens"] for way in ("greedy", "no cache"))
    assert torch.equal(cached, uncached)


@pytest.mark.sweep
def test_what_is_left_computes_as_the_dense_model_without_its_layers(llama: Cut) -> None:
    plan = only_layers(llama.plan)
    slim = plan.apply(llama.dense)
    mine, theirs = outputs(LLAMA, slim), outputs(LLAMA, zeroed(llama.dense, plan))
    torch.testing.assert_close(mine["logits"], theirs["logits"], rtol=1e-5, atol=1e-5)
    weights = dict(llama.dense.named_parameters())
    for name, tensor in weights.items():
        now = name_now(name, stacks_of(plan.settings))
        if now is None:
            assert name.startswith("model.layers.1.")
        else:
            assert torch.equal(slim.get_parameter(now), tensor)
    assert len(list(slim.parameters())) == len(weights) - 9


@pytest.mark.sweep
def test_it_is_said(llama: Cut) -> None:
    said = "num_hidden_layers 3 -> 2 (0, 2 stay)"
    assert said in repr(llama.plan)
    assert said in str(llama.plan)
    assert said in str(depcut.report(llama.slim))
    assert said in str(llama.plan.summary())


@pytest.mark.sweep
def test_a_plan_in_a_file(llama: Cut, tmp_path: Path) -> None:
    llama.plan.save(tmp_path / "plan.json")
    again = depcut.Plan.load(tmp_path / "plan.json").apply(llama.dense)
    assert_equal(outputs(LLAMA, again), outputs(LLAMA, llama.slim))
    depcut.save(llama.slim, tmp_path / "slim")
    for net in (None, llama.dense):
        assert_equal(outputs(LLAMA, depcut.load(tmp_path / "slim", net)), outputs(LLAMA, again))
    data = json.loads((tmp_path / "plan.json").read_text())
    data["settings"]["rebuild"]["layers"][0]["kept"] = [0, 7]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"of 3 layers, \[0, 7\] stay"):
        depcut.Plan.load(tmp_path / "plan.json")


@pytest.mark.sweep
def test_it_is_a_model_as_any_other(llama: Cut) -> None:
    """Nothing is generated: it trains, at other lengths and batches, in other precisions."""
    slim: Any = copy.deepcopy(pickle.loads(pickle.dumps(llama.slim)))  # noqa: S301
    assert_equal(outputs(LLAMA, slim), outputs(LLAMA, llama.slim))
    slim.config.attention_dropout = 0.5
    for layer in slim.train().model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.randint(3, 99, (3, 17))
    losses = [slim(input_ids=ids, labels=ids).loss for _ in range(2)]
    assert not torch.equal(*losses)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slim.parameters())
    assert slim.eval().double()(input_ids=ids).logits.dtype is torch.float64


@pytest.mark.sweep
def test_state_of_an_optimizer_goes_with_its_layer(llama: Cut) -> None:
    dense = copy.deepcopy(llama.dense)
    optimizer = torch.optim.Adam(dense.parameters(), 1e-3)
    dense(**LLAMA.inputs(2), labels=LLAMA.inputs(2)["input_ids"]).loss.backward()
    optimizer.step()
    weight = dense.model.layers[2].mlp.gate_proj.weight
    before = optimizer.state[weight]["exp_avg"].clone()
    slim: Any = only_layers(llama.plan).apply(dense, optimizer=optimizer)
    now = slim.model.layers[1].mlp.gate_proj.weight
    assert torch.equal(optimizer.state[now]["exp_avg"], before)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in slim.parameters()}


@pytest.mark.sweep
def test_data_re_solves_the_layers_that_stay(llama: Cut, tmp_path: Path) -> None:
    rows = [LLAMA.inputs(2)["input_ids"].roll(i, 1) for i in range(2)]
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    slim: Any = llama.plan.apply(llama.dense, data=data)
    done = depcut.report(slim).compensation
    assert done is not None
    assert any(r.layer.startswith("model.layers.2.") for r in done.repairs)
    slim.save_pretrained(tmp_path)
    assert_equal(outputs(LLAMA, slim), outputs(LLAMA, type(slim).from_pretrained(tmp_path).eval()))


@pytest.mark.sweep
def test_layers_of_the_teacher_are_those_of_the_same_number(llama: Cut) -> None:
    plan = only_layers(llama.plan)
    dense: Any = llama.dense
    slim: Any = plan.apply(dense)
    training = depcut.training
    batch = LLAMA.inputs(2)
    with training.Distillation(dense, slim, plan, hidden=("model.layers.*.mlp",)) as distill:
        names = set(distill._places)
        assert names == {f"model.layers.{i}.mlp" for i in (0, 2)}
        out = slim(**batch)
        assert torch.isfinite(distill(out, **batch))


@pytest.mark.sweep
def test_layers_are_drawn_anew_as_those_of_the_same_number(
    llama: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = []
    monkeypatch.setattr(
        sys.modules["depcut.training.fresh"],
        "_reset",
        lambda module, other: resets.append((module, other)),
    )
    plan = only_layers(llama.plan)
    depcut.training.fresh(llama.dense, plan, init=llama.dense._init_weights)
    pairs = [(m.layer_idx, o.layer_idx) for m, o in resets if hasattr(m, "layer_idx")]
    assert sorted(pairs) == [(0, 0), (1, 2)]


@pytest.mark.sweep
def test_what_a_request_names_stays(llama: Cut) -> None:
    plan = llama.analysis.plan(0.5, depth=True, ignore=("model.layers.1.input_layernorm*",))
    assert all(1 in stack.kept for stack in stacks_of(plan.settings))


# What cannot be said of layers --------------------------------------------------------------------


@pytest.mark.sweep
def test_layers_that_are_no_branches() -> None:
    bert = FAMILIES["BERT"].build(num_hidden_layers=2)
    slim: Any = depcut.shrink(bert, 0.35, depth=True, rebuildable=True)
    assert slim.config.num_hidden_layers == 2
    text = str(depcut.report(slim))
    assert "no whole layer goes: the layers of bert.encoder.layer are no residual branches" in text
    assert slim.config.hidden_size < 48


@pytest.mark.sweep
def test_a_class_that_cannot_be_built_anew() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(InputError, match="cannot be rebuilt from a config"):
        depcut.shrink(net, 0.3, torch.randn(2, 8), depth=True, rebuildable=True)


@pytest.mark.sweep
def test_branches_alone_go_freely(llama: Cut) -> None:
    plan = llama.analysis.plan(0.5, depth=True, rebuildable=False)
    assert "rebuild" not in plan.settings
    assert not stacks_of(plan.settings)


@pytest.mark.sweep
def test_layers_that_a_class_builds_by_their_places() -> None:
    """Every second layer of this one is of another kind, whatever the others do."""
    moe = FAMILIES["Qwen3-MoE"].build(num_hidden_layers=4, decoder_sparse_step=2)
    analysis = depcut.analyze(moe, FAMILIES["Qwen3-MoE"].inputs(2))
    assert analysis.droppable.ordered == {0}
    assert [*analysis.droppable.blocks[0]] == [1, 2, 3]
    plan = analysis.plan(0.6, depth=True)
    kept = [stack.kept for stack in stacks_of(plan.settings)]
    assert all(each == tuple(range(len(each))) for each in kept)


@pytest.mark.sweep
def test_the_only_layer_of_a_kind_stays() -> None:
    family = FAMILIES["Gemma 3"]
    model = without_effect(family.build(num_hidden_layers=6), 5)  # the one of full attention
    analysis = depcut.analyze(model, family.inputs(2))
    plan = analysis.plan(0.6, depth=True)
    (stack,) = stacks_of(plan.settings)
    assert 5 in stack.kept
    assert stack.lists == (("layer_types",),)


@pytest.mark.sweep
def test_lists_that_have_one_entry_a_layer() -> None:
    """By chance, other lists of the config are as long."""
    family = FAMILIES["Gemma 2"]
    model: Any = family.build(num_hidden_layers=4)
    model.config.keep_me = [4, 3, 2, 1]
    builder = Builder(recipe(model))
    (stack,) = stacks_in(builder)
    assert stack.lists == (("layer_types",),)
    assert fits(builder, (replace(stack, kept=(0, 3)),))
    assert not fits(builder, (replace(stack, lists=(), kept=(0, 3)),))


@pytest.mark.sweep
@pytest.mark.parametrize("of", ["macs", "params"])
def test_budgets_are_met_as_by_widths_alone(llama: Cut, of: str) -> None:
    whole = getattr(llama.analysis, of)
    for ratio in (0.35, 0.6, 0.8):
        plans = [llama.analysis.plan(ratio, of=of, depth=depth) for depth in (True, False)]
        off, widths = (abs(1 - ratio - getattr(plan, of) / whole) for plan in plans)
        assert off <= max(0.03, widths)


@pytest.mark.sweep
def test_a_ratio_out_of_reach(llama: Cut) -> None:
    with pytest.raises(BudgetError, match="rebuildable=False"):
        llama.analysis.plan(0.999, depth=True)


# Families, in a fresh process ---------------------------------------------------------------------

STOCK = """
import sys
sys.path.insert(0, sys.argv[1])
from families import FAMILIES, generated, outputs
import torch, zoo
libraries = zoo.libraries()
for given in sys.argv[2:]:
    folder, name = given.split("=")
    family = FAMILIES[name]
    auto = getattr(libraries["transformers"], family.auto_class)
    model = auto.from_pretrained(folder).eval()
    found = {"": outputs(family, model)}
    for way in ("greedy", "no cache") if family.generates else ():
        found[way] = generated(family, model, way)
    torch.save(found, folder + "/found.pt")
assert "depcut" not in sys.modules
"""


@pytest.mark.sweep
def test_families_come_back_without_depcut(tmp_path: Path) -> None:
    cuts = {name: cut_of(name) for name in CASES}
    for name, cut in cuts.items():
        (stack,) = (s for s in stacks_of(cut.plan.settings) if s.number == (cut.number,))
        stay = (*STAY, *range(3, stack.count))
        assert stack.kept == stay, name
        assert cut.plan.kept, name
        cut.slim.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config[cut.number] == len(stay)
        lists = [config[key] for (key,) in stack.lists]
        assert lists == [[cut.config[key][i] for i in stay] for (key,) in stack.lists]
    given = [f"{tmp_path / name}={name}" for name in cuts]
    subprocess.run([sys.executable, "-c", STOCK, str(TESTS), *given], check=True)
    for name, cut in cuts.items():
        found = torch.load(tmp_path / name / "found.pt", weights_only=True)
        assert_equal(found.pop(""), outputs(cut.family, cut.slim))
        for way, theirs in found.items():
            assert_equal(theirs, generated(cut.family, cut.slim, way))


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in CASES if n != "Llama (GQA)"])
def test_other_families_without_their_layers(name: str) -> None:
    cut = cut_of(name)
    plan = only_layers(cut.plan)
    mine = outputs(cut.family, plan.apply(cut.dense))
    theirs = outputs(cut.family, zeroed(cut.dense, plan))
    key = "logits"
    torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-4)
