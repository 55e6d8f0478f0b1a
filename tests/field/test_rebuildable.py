"""Smaller models that their class builds from a config, saved and loaded as any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from families import FAMILIES, Family, outputs
from selection import swept
from torch import Tensor, nn

import depcut
from depcut.allocate.space import StepTie, marginals, space
from depcut.errors import BudgetError, InputError
from depcut.rebuild.choose import checked
from depcut.rebuild.rebuilding import Rebuilding, rebuilding

pytestmark = [
    pytest.mark.usefixtures("zoo_libraries"),
    pytest.mark.filterwarnings("ignore"),  # what these libraries warn of is theirs
]

LLAMA, BERT = FAMILIES["Llama (GQA)"], FAMILIES["BERT"]
QUICK = {"num_hidden_layers": 2}


class Cut:
    """A family with what became of it."""

    def __init__(self, family: Family, ratio: float, **changes: Any) -> None:
        self.family, self.dense = family, family.build(**changes)
        self.config = copy.deepcopy(self.dense.config)
        self.analysis = depcut.analyze(self.dense, family.inputs(2), _counting(family))
        self.plan = self.analysis.plan(ratio)
        self.slim: Any = self.plan.apply(self.dense)

    def back(self, folder: Path) -> Any:
        """What is loaded of what is saved."""
        self.slim.save_pretrained(folder)
        auto = getattr(zoo.libraries()["transformers"], self.family.auto_class)
        return auto.from_pretrained(folder).eval()


def _counting(family: Family) -> tuple[str, ...] | None:
    return ("logits",) if family.kind == "encoder-decoder" else None


@pytest.fixture(scope="module")
def llama() -> Cut:
    return Cut(LLAMA, 0.6, **QUICK)


@pytest.fixture(scope="module")
def bert() -> Cut:
    return Cut(BERT, 0.35, **QUICK)


def assert_comes_back(cut: Cut, folder: Path) -> None:
    back = cut.back(folder)
    assert type(cut.slim) is type(cut.dense) is type(back)
    mine, theirs = outputs(cut.family, cut.slim), outputs(cut.family, back)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert cut.dense.config.to_dict() == cut.config.to_dict()
    assert depcut.report(cut.slim).macs[1] <= 0.75 * depcut.report(cut.slim).macs[0]


def test_a_decoder_comes_back(llama: Cut, tmp_path: Path) -> None:
    assert_comes_back(llama, tmp_path)
    now, before = llama.slim.config, llama.config
    assert now.hidden_size < before.hidden_size
    assert now.intermediate_size < before.intermediate_size
    assert now.num_attention_heads < before.num_attention_heads
    assert now.head_dim == before.head_dim
    assert all(m.config is now for m in llama.slim.modules() if hasattr(m, "config"))


def test_an_encoder_of_which_heads_times_head_dim_is_the_hidden_size(
    bert: Cut, tmp_path: Path
) -> None:
    assert_comes_back(bert, tmp_path)
    now = bert.slim.config
    assert (now.hidden_size, now.num_attention_heads) == (36, 3)


def test_layers_keep_their_own_units(llama: Cut) -> None:
    kept = [llama.plan.kept[f"model.layers.{i}.mlp.gate_proj"] for i in range(2)]
    assert len(kept[0]) == len(kept[1])
    assert not np.array_equal(*kept)


def test_a_loaded_plan_writes_the_config(bert: Cut, tmp_path: Path) -> None:
    bert.plan.save(tmp_path / "plan.json")
    again: Any = depcut.Plan.load(tmp_path / "plan.json").apply(bert.dense)
    said = ("hidden_size", "num_attention_heads", "intermediate_size")
    assert all(getattr(again.config, n) == getattr(bert.slim.config, n) for n in said)
    assert "hidden_size 48 -> 36" in str(depcut.report(again))
    assert "cut freely" in str(depcut.report(again))


def test_what_is_out_of_reach(llama: Cut) -> None:
    with pytest.raises(BudgetError, match=r"ratio of at most 0\.9.*rebuildable=False"):
        llama.analysis.plan(0.995)


def test_free_widths_are_no_class_of_the_library(llama: Cut) -> None:
    feeds = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    one = {feeds[0]: 0.75}
    free = llama.analysis.plan(0.6, rebuildable=False, ratios=one, align=1)
    assert "rebuild" not in free.settings
    assert len({free.kept[name].size for name in feeds}) == 2
    assert len({llama.plan.kept[name].size for name in feeds}) == 1


def test_a_plan_for_a_time_is_checked(llama: Cut) -> None:
    limit, _ = llama.analysis.rebuilding
    assert limit is not None
    assert checked(limit, llama.plan).settings["rebuild"]["fields"]
    with pytest.raises(BudgetError, match="takes none of the configs"):
        checked(limit, llama.analysis.plan(0.6, rebuildable=False, align=1))


def test_counts_that_the_class_refuses(llama: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    builds, seen = Rebuilding.twin, set[tuple[int, ...]]()

    def picky(self: Rebuilding, counts: Any) -> Any:
        if len(seen) < 3:
            seen.add(tuple(counts))
        return None if tuple(counts) in seen else builds(self, counts)

    monkeypatch.setattr(Rebuilding, "twin", picky)
    plan = llama.analysis.plan(0.5)
    assert tuple(plan.keep().counts) not in seen
    assert plan.macs / llama.analysis.macs == pytest.approx(0.5, abs=0.1)
    monkeypatch.setattr(Rebuilding, "twin", lambda self, counts: None)
    with pytest.raises(BudgetError, match="takes none of the configs"):
        llama.analysis.plan(0.5)


def test_ratios_move_all_that_is_tied(llama: Cut) -> None:
    plan = llama.analysis.plan(0.3, ratios={"model.layers.0.mlp.gate_proj": 0.5})
    assert {plan.kept[f"model.layers.{i}.mlp.gate_proj"].size for i in range(2)} == {44}
    config: Any = plan.apply(llama.dense).config
    assert config.intermediate_size == 44


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_attention_is_the_dense_one_in_any_precision(dtype: torch.dtype) -> None:
    """GPT-2 makes it of the width of a head; in bfloat16 its outputs hide that it is off."""
    transformers = zoo.libraries()["transformers"]
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_inner": 96, "n_positions": 64}
    config = transformers.GPT2Config(vocab_size=100, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in dense.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    slim: Any = depcut.shrink(dense, 0.3, score="random", progress=False)
    assert slim.config.n_embd < 32
    assert slim.transformer.h[0].attn.scaling == dense.transformer.h[0].attn.scaling


def test_a_model_without_a_config() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    depcut.shrink(net, 0.3, torch.randn(2, 8))
    with pytest.raises(InputError, match="cannot be rebuilt from a config"):
        depcut.shrink(net, 0.3, torch.randn(2, 8), rebuildable=True)


def test_a_model_that_is_not_what_its_config_says(llama: Cut) -> None:
    other: Any = copy.deepcopy(llama.dense)
    other.config.intermediate_size = 96
    assert "has shape" in rebuilding(llama.analysis.coupling, other)[1]


def test_a_model_whose_buffers_were_rounded_is_cut_freely(llama: Cut) -> None:
    """Frequencies of the rotary embedding, cast to half precision and back, are in no file."""
    other = copy.deepcopy(llama.dense).to(torch.bfloat16).float()
    assert "inv_freq, which no file" in rebuilding(llama.analysis.coupling, other)[1]
    report = depcut.report(depcut.shrink(other, 0.3, LLAMA.inputs(2), data=None))
    assert report.macs[1] < 0.75 * report.macs[0]
    assert "inv_freq" in str(report)


class Halves(nn.Module):
    """Two layers of 8 and 24 units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_steps_of_groups_of_several_sizes() -> None:
    coupling = depcut.analyze(Halves(), torch.randn(2, 5)).coupling
    where = space(coupling, 1, set(), (), (StepTie((0, 1), 4),))
    assert where.kept(np.array([1])).tolist() == [6, 18]
    assert where.taken(np.array([2, 6])).tolist() == [3]
    scores = [np.arange(8.0), np.arange(24.0)]
    lost = marginals(where, scores, additive=True)
    assert lost[0].tolist() == [1 + 15, 5 + 51, 9 + 87]


@pytest.mark.parametrize(
    "name", swept(["OPT", "SegFormer", "Swin", "Gemma 2", "DeBERTa-v2", "BART"], 2)
)
def test_other_families(name: str, tmp_path: Path) -> None:
    assert_comes_back(Cut(FAMILIES[name], 0.27), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())


def test_a_config_that_was_changed_after_the_model_was_built(tmp_path: Path) -> None:
    """The decoder has a config of its own, and goes on to return its cache."""
    import transformers

    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4
    )
    torch.manual_seed(0)
    model = transformers.T5Model(config).eval()
    model.config.use_cache = False
    tokens = torch.randint(2, 40, (2, 6))
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    with pytest.warns(UserWarning, match="returns past_key_values, and when it is built from its"):
        slim = depcut.shrink(model, 0.4, inputs, progress=False)
    slim.save_pretrained(tmp_path)
    loaded = transformers.T5Model.from_pretrained(tmp_path)
    assert loaded(**inputs).past_key_values is None
    torch.testing.assert_close(loaded(**inputs)[0], slim(**inputs)[0])


def test_experts_keep_widths_that_their_kernel_takes() -> None:
    """Torch's grouped product takes rows of multiples of 16 bytes, whatever the alignment."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, moe_intermediate_size=40, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeModel(config).eval()
    tokens = torch.randint(0, 40, (2, 6))
    slim = depcut.shrink(model, 0.4, tokens, align=1, progress=False)
    assert slim.config.moe_intermediate_size in (8, 16, 24, 32)
    assert type(slim.layers[0].mlp.experts) is type(model.layers[0].mlp.experts)
    assert slim(tokens)[0].shape == (2, 6, 16)
