"""What `depcut.save` writes, `depcut.load` reads: the same model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_nets import Heads, drawn, seeded
from selection import sampled
from stored_models import X, assert_same_model, heads, slim_of
from stored_nets import Attention, Keeping, Sized, Stateful, sized
from torch import Tensor, nn

import depcut

pytestmark = pytest.mark.usefixtures("one_thread")


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a patched class": (Heads, X),
    "arguments that the class needs": (sized, X),
    "state of all kinds": (Stateful, drawn(4, 6)),
    "slim attention": (Attention, drawn(2, 5, 16)),
}


@pytest.mark.parametrize("case", sampled(CASES, ["state of all kinds"]))
def test_a_loaded_model_is_the_saved_one(
    case: tuple[Callable[[], nn.Module], Tensor], tmp_path: Path
) -> None:
    make, x = case
    slim = copy.deepcopy(slim_of(make, x))
    next(slim.parameters()).requires_grad_(False)
    depcut.save(slim, tmp_path / "model")
    loaded = depcut.load(tmp_path / "model", make)
    assert_same_model(loaded, slim, x)
    depcut.save(loaded, tmp_path / "again")
    first, second = (
        json.loads((tmp_path / n / "model.json").read_text()) for n in ("model", "again")
    )
    assert first == second


def test_values_of_every_kind(tmp_path: Path) -> None:
    slim: Any = slim_of(Keeping, drawn(4, 6))
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model", Keeping)
    assert_same_model(loaded, slim, drawn(4, 6))
    for name in ("numbers", "tuples", "mappings", "words", "kinds", "table"):
        assert type(getattr(loaded, name)) is type(getattr(slim, name))
        assert repr(getattr(loaded, name)) == repr(getattr(slim, name))
    assert loaded.last() is loaded.down
    assert loaded.scale.__self__ is loaded
    assert (loaded.clamp.func, loaded.clamp.keywords) == (torch.clamp, {"min": -4.0})


def test_a_program_is_what_the_model_computes(saved: Path, tmp_path: Path) -> None:
    slim = heads()
    depcut.save(slim, tmp_path / "model", standalone="program")
    program = torch.export.load(tmp_path / "model" / "program.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(X), slim(X))
        assert torch.equal(program(X[:2]), slim(X[:2]))
    with pytest.raises(depcut.InputError, match="standalone"):
        depcut.save(slim, tmp_path / "other", standalone="engine")


def test_it_is_a_model_like_any_other(saved: Path) -> None:
    loaded = depcut.load(saved)
    loaded.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    loaded.eval()
    twin = pickle.loads(pickle.dumps(loaded))  # noqa: S301
    assert torch.equal(twin(X), loaded(X))
    assert torch.equal(loaded.double()(drawn(2, 9, 8).double()), loaded(drawn(2, 9, 8).double()))
    torch.export.export(loaded.float(), (X,))
    smaller = depcut.shrink(loaded.float(), 0.3, X, align=1)
    assert depcut.report(smaller).params[0] == depcut.report(heads()).params[1]


@pytest.mark.sweep
def test_a_model_that_was_made_smaller_twice(tmp_path: Path) -> None:
    twice = depcut.shrink(heads(), 0.3, X, align=1)
    depcut.save(twice, tmp_path / "model")
    assert {"plan.1.json", "plan.2.json"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert_same_model(depcut.load(tmp_path / "model"), twice, X)
    first = depcut.Plan.load(tmp_path / "model" / "plan.1.json").apply(seeded(Heads).eval(), X)
    again = depcut.Plan.load(tmp_path / "model" / "plan.2.json").apply(first, X)
    assert torch.equal(again(X), twice(X))


@pytest.mark.usefixtures("only_generated")
def test_a_generated_module(tmp_path: Path) -> None:
    slim = depcut.shrink(seeded(sized).eval(), 0.4, X, align=1)
    assert depcut.report(slim).generated
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model", sized)
    assert_same_model(loaded, slim, X)
    assert loaded.code == slim.code
    with pytest.raises(depcut.InputError, match="was captured with"):
        loaded(drawn(3, 7, 8))
    assert_same_model(depcut.load(tmp_path / "model", loaded_from := seeded(sized)), slim, X)
    assert type(loaded_from) is Sized
    # Its report is another one then, which is no setting of the module.
    assert depcut.shrink(loaded, 0.3, X, align=1)(X).shape == X.shape


@pytest.mark.sweep
def test_what_compact_returns(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        dense[0].weight[2:5] = 0
    slim = depcut.compact(dense, drawn(4, 6))
    depcut.save(slim, tmp_path / "model")
    with pytest.raises(depcut.PlanError, match="there is no"):
        depcut.load(tmp_path / "model")
    assert_same_model(depcut.load(tmp_path / "model", dense), slim, drawn(4, 6))


def test_other_layouts_and_shared_memory(tmp_path: Path) -> None:
    slim: Any = heads()
    slim.register_buffer("image", drawn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    slim.register_buffer("view", slim.image[:1], persistent=False)
    slim.twin = nn.Parameter(slim.proj.weight.data)
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model")
    assert_same_model(loaded, slim, X)
    assert loaded.twin is not loaded.proj.weight
    assert loaded.twin.data_ptr() == loaded.proj.weight.data_ptr()


@pytest.mark.parametrize("odd", [1, 3, 8, 9])
def test_values_that_lie_anywhere_in_a_file(odd: int, tmp_path: Path) -> None:
    """Complex numbers are stored as bytes behind others; where they lie, no unit of theirs may."""

    def build() -> nn.Module:
        net = Heads()
        net.register_buffer("before", torch.arange(odd, dtype=torch.uint8))
        net.register_buffer(
            "turn", torch.polar(torch.ones(37), torch.rand(37)).to(torch.complex128)
        )
        net.register_buffer("other", torch.polar(torch.ones(5), torch.rand(5)))
        return net

    slim = slim_of(build, X)
    depcut.save(slim, tmp_path / "model")
    assert_same_model(depcut.load(tmp_path / "model", build), slim, X)


def test_nothing_of_the_callers_changes(saved: Path) -> None:
    dense, before = seeded(Heads), torch.get_rng_state()
    values = {n: t.clone() for n, t in dense.state_dict().items()}
    kinds = [type(m) for m in dense.modules()]
    loaded = depcut.load(saved, dense)
    assert torch.equal(before, torch.get_rng_state())
    assert [type(m) for m in dense.modules()] == kinds
    assert all(torch.equal(t, values[n]) for n, t in dense.state_dict().items())
    assert not {t.data_ptr() for t in loaded.parameters()} & {
        t.data_ptr() for t in dense.parameters()
    }


def test_the_weights_are_those_of_the_state(saved: Path) -> None:
    from safetensors.torch import load_file

    slim = heads()
    state = load_file(saved / "weights.safetensors")
    assert list(state) == sorted(slim.state_dict())
    fresh = depcut.Plan.load(saved / "plan.json").apply(seeded(Heads).eval(), X)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), slim(X))


def test_the_card_says_what_it_is(saved: Path) -> None:
    card, report = (saved / "README.md").read_text(), depcut.report(heads())
    module = Heads.__module__
    for text in (
        "# Heads, made smaller", f"`{module}`", f"{report.params[0]:,}", f"{report.params[1]:,}",
        report.digest, "| ratio | 0.4 |", "no data", "depcut.load(folder, Heads)",
    ):  # fmt: skip
        assert text in card
    named = {line.split("`")[1] for line in card.partition("## Files")[2].splitlines()[4:] if line}
    assert named == {p.name for p in saved.iterdir()}


@pytest.mark.sweep
def test_the_card_has_measured_speed(tmp_path: Path) -> None:
    slim = heads()
    measured = depcut.compare(seeded(Heads).eval(), slim, X, runtime="torch", rounds=6)
    depcut.save(slim, tmp_path / "model", comparison=measured)
    card = (tmp_path / "model" / "README.md").read_text()
    assert str(measured.speedup) in card
    assert "eager" in card


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_its_config_cannot_rebuild(tmp_path: Path, zoo_libraries: None) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    slim: Any = depcut.shrink(dense, 0.4, {"input_ids": ids}, align=1, rebuildable=False)
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, slim(ids).logits)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **options), slim.generate(ids, **options))
    with pytest.raises(depcut.DepcutError, match="could not rebuild"):
        loaded.save_pretrained(tmp_path / "stock")
    assert loaded.config.to_dict() == slim.config.to_dict()
    assert "depcut.load(folder)" in (tmp_path / "model" / "README.md").read_text()
