"""Plans: integers in a file, the same tensors from every instance, and honest predictions."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, randomise
from oracle import all_tensors, assert_untouched, outputs, random_keep, sliced, snapshot
from torch import nn

import depcut
from depcut.errors import DepcutError, PlanError
from depcut.plan.cost import count_macs, count_params

REPLAYED = ["residual", "attention_gqa_expand", "dict_inputs", "causal_decoder", "siamese", "lstm"]


def planned(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    return model, analysis.plan_keeping(random_keep(analysis, np.random.default_rng(seed)))


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLAYED)
def test_a_plan_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    model, plan = planned(name)
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert {n: k.tolist() for n, k in loaded.kept.items()} == {
        n: k.tolist() for n, k in plan.kept.items()
    }
    assert (loaded.sizes, loaded.fingerprint) == (plan.sizes, plan.fingerprint)
    assert (loaded.settings, loaded.digest) == (plan.settings, plan.digest)
    assert_same_tensors(loaded.apply(model), plan.apply(model))


def test_a_file_holds_integers_only(tmp_path: Path) -> None:
    _, plan = planned("residual")
    plan.save(str(tmp_path / "plan.json"))

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no integer")

    data = json.loads((tmp_path / "plan.json").read_text(), parse_float=refuse)
    assert data["kept"] == {n: k.tolist() for n, k in plan.kept.items()}
    assert all(type(i) is int for kept in data["kept"].values() for i in kept)
    assert all(type(size) is int for size in data["sizes"].values())


def test_a_file_says_how_the_plan_was_made(tmp_path: Path) -> None:
    net = NETS["residual"]
    plan = depcut.analyze(net.build(), net.inputs(2)).plan(
        0.4, of="params", align=1, score="random", allocation="global", seed=3
    )
    plan.save(tmp_path / "plan.json")
    found = depcut.Plan.load(tmp_path / "plan.json")
    chosen = {"of": "params", "align": 1, "score": "random", "allocation": "global", "seed": 3}
    assert found.settings == {"ratio": 0.4, **chosen, "options": chosen}
    assert found.options == depcut.Options(**chosen)


def test_a_failing_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = planned("residual")
    target = tmp_path / "plan.json"
    plan.save(target)
    before = target.read_bytes()

    def full(self: Path, text: str, **options: Any) -> None:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DepcutError, match=r"no space(.|\n)*free some space"):
        plan.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert target.read_bytes() == before


def test_saving_replaces_an_old_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        _, plan = planned("residual", seed)
        plan.save(tmp_path / "plan.json")
    assert depcut.Plan.load(tmp_path / "plan.json").digest == plan.digest
    assert len(list(tmp_path.iterdir())) == 1


REPLAY = """
import sys
import torch
torch.set_num_threads(1)
import depcut
from nets import NETS
slim = depcut.Plan.load(sys.argv[1]).apply(NETS[sys.argv[2]].build())
torch.save(slim.state_dict(), sys.argv[3])
"""


def test_a_fresh_process_replays_a_plan(tmp_path: Path) -> None:
    model, plan = planned("attention_gqa_expand")
    plan.save(tmp_path / "plan.json")
    arguments = [tmp_path / "plan.json", "attention_gqa_expand", tmp_path / "slim.pt"]
    subprocess.run(
        [sys.executable, "-c", REPLAY, *map(str, arguments)], check=True, cwd=Path(__file__).parent
    )
    state = torch.load(tmp_path / "slim.pt", weights_only=True)
    expected = plan.apply(model).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@functools.cache
def residual_plan() -> Any:
    """One plan for all that is only written to files."""
    return planned("residual")[1]


def written(tmp_path: Path, change: Any) -> Path:
    """A plan's file after `change` of its data, of its text, or of its bytes."""
    plan = residual_plan()
    path = tmp_path / "plan.json"
    plan.save(path)
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data)))
    return path


def with_entry(key: str, value: Any) -> Any:
    return lambda data: {**data, key: value}


def without(key: str) -> Any:
    return lambda data: {k: v for k, v in data.items() if k != key}


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"{",
        b"\xff\xfe\x00\x01",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"format": 1}',
        with_entry("format", 2),
        with_entry("format", None),
        *map(without, ["format", "fingerprint", "settings", "inputs", "sizes", "shapes", "kept"]),
        with_entry("kept", [1, 2]),
        with_entry("kept", {"nowhere": [0]}),
        with_entry("kept", {"stem.0": []}),
        with_entry("kept", {"stem.0": [8]}),
        with_entry("kept", {"stem.0": [-1]}),
        with_entry("kept", {"stem.0": [0, 0]}),
        with_entry("kept", {"stem.0": [0.5]}),
        with_entry("kept", {"stem.0": ["0"]}),
        with_entry("kept", {"stem.0": [[[0]], [[1]]]}),
        with_entry("kept", {"stem.0": [[0], 1]}),
        with_entry("kept", {"stem.0": 10**30}),
        with_entry("kept", {"stem.0": None}),
        with_entry("sizes", None),
        with_entry("sizes", {"stem.0": "many"}),
        with_entry("shapes", {"stem.0.weight": 3}),
    ],
)
def test_a_corrupt_file_is_refused(change: Any, tmp_path: Path) -> None:
    path = written(tmp_path, change)
    with pytest.raises(PlanError):
        depcut.Plan.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("inputs", None), ("inputs", {}), ("fingerprint", 3), ("kept", {"stem.0": [[0], [1]]})],
)
def test_a_file_with_a_wrong_entry_ends_in_an_error_that_explains(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = written(tmp_path, with_entry(key, value))
    model = NETS["residual"].build()
    before = snapshot(model)
    with pytest.raises(DepcutError):
        depcut.Plan.load(path).apply(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["nowhere.json", ".", "missing/plan.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        depcut.Plan.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.remedy


# Other instances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLAYED)
def test_another_instance_with_the_same_weights_gives_the_same_tensors(name: str) -> None:
    model, plan = planned(name)
    assert_same_tensors(plan.apply(NETS[name].build()), plan.apply(model))


@pytest.mark.parametrize("name", REPLAYED)
def test_another_checkpoint_is_cut_at_the_same_places(name: str, tmp_path: Path) -> None:
    _, plan = planned(name)
    plan.save(tmp_path / "plan.json")
    torch.manual_seed(5)
    other = type(NETS[name].build()) if name not in ("attention_gqa_expand", "lstm") else None
    model = randomise(other()).eval() if other else randomise(NETS[name].build())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)
    slim = depcut.Plan.load(tmp_path / "plan.json").apply(model, compensate=False)
    indices, narrow = plan.tensor_indices(), all_tensors(slim)
    assert indices
    for tensor_name, kept in indices.items():
        assert torch.equal(narrow[tensor_name], sliced(all_tensors(model)[tensor_name], kept))


def test_applying_twice_gives_two_models() -> None:
    model, plan = planned("residual")
    first, second = plan.apply(model), plan.apply(model)
    assert_same_tensors(first, second)
    storages = [{p.data_ptr() for p in slim.parameters()} for slim in (first, second)]
    assert not storages[0] & storages[1]


def test_other_inputs_may_be_given() -> None:
    model, plan = planned("residual")
    slim = plan.apply(model, torch.randn(3, 3, 12, 12))
    assert_same_tensors(slim, plan.apply(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["residual", "dict_inputs", "lstm"])
def test_a_plan_fits_the_same_architecture_in_another_precision(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, plan = planned(name)
    other = copy.deepcopy(model).to(dtype)
    plan.save(tmp_path / "plan.json")
    slims = [p.apply(other) for p in (plan, depcut.Plan.load(tmp_path / "plan.json"))]
    expected = plan.apply(model, compensate=False).to(dtype)
    for slim in slims:
        shapes = {n: (t.shape, t.dtype) for n, t in slim.state_dict().items()}
        assert shapes == {n: (t.shape, t.dtype) for n, t in expected.state_dict().items()}
    with plan.masked(other) as masked:
        assert masked is other


class Casts(nn.Module):
    """Takes single precision alone, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise TypeError("single precision, please")
        return self.layers(x.to(self.layers[0].weight.dtype))


def test_inputs_keep_their_precision_where_a_model_takes_it() -> None:
    model = randomise(Casts()).eval()
    plan = depcut.analyze(model, torch.randn(2, 6)).plan(0.5)
    slim = plan.apply(copy.deepcopy(model).to(torch.float64))
    assert slim(torch.randn(3, 6)).dtype == torch.float64


# What a plan says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "vision_transformer", "chunk_and_chain"])
def test_predictions_equal_reality(name: str) -> None:
    net = NETS[name]
    model = net.build()
    plan = depcut.analyze(model, net.inputs(2)).plan(0.4, align=1)
    slim = plan.apply(model)
    assert plan.macs == count_macs(slim, net.inputs(2))
    assert plan.params == count_params(slim)


def test_a_loaded_plan_predicts_once_it_is_bound(tmp_path: Path) -> None:
    model, plan = planned("residual")
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    for ask in (lambda: loaded.macs, lambda: loaded.params, loaded.tensor_indices):
        with pytest.raises(PlanError, match="bind"):
            ask()
    bound = loaded.bind(NETS["residual"].build())
    assert (bound.macs, bound.params) == (plan.macs, plan.params)
    with pytest.raises(PlanError):
        loaded.bind(NETS["plain"].build())
    assert_same_tensors(bound.apply(model), plan.apply(model))


def test_the_digest_tells_plans_apart() -> None:
    _, plan = planned("residual")
    _, same = planned("residual")
    _, other = planned("residual", 1)
    assert plan.digest == same.digest
    assert plan.digest != other.digest
    net = NETS["residual"]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    orders = [analysis.plan_keeping({"stem.0": units}).digest for units in ([3, 1], [1, 3])]
    assert orders[0] == orders[1]


def test_the_text_lists_what_is_kept() -> None:
    net = NETS["residual"]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    plan = analysis.plan_keeping({"stem.0": [3, 1, 5]})
    lines = str(plan).splitlines()
    assert plan.digest in lines[0]
    assert "1 of 2 groups" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["stem.0: 3 of 8"]


def test_analysing_and_planning_again_gives_the_same_plan() -> None:
    net = NETS["vision_transformer"]
    digests = {
        depcut.analyze(net.build(), net.inputs(batch)).plan(0.5, align=1).digest
        for batch in (2, 2, 3)
    }
    assert len(digests) == 1


def test_two_applications_compute_the_same() -> None:
    net = NETS["attention_typed_heads"]
    model, plan = planned("attention_typed_heads")
    made = [outputs(plan.apply(model), net.inputs(3))[0] for _ in range(2)]
    assert torch.equal(*made)


def test_keeping_all_units_is_no_plan_for_a_group() -> None:
    net = NETS["residual"]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    assert not analysis.plan_keeping({"stem.0": range(8)}).kept
    kept = analysis.plan_keeping({"stem.0": np.array([2, 0])}).kept
    assert kept["stem.0"].tolist() == [0, 2]


def test_unequal_counts_of_ties_are_refused() -> None:
    net = NETS["chunk_and_chain"]
    analysis = depcut.analyze(net.build(), net.inputs(2))
    tied = [g for g in analysis.groups if g.tied is not None]
    with pytest.raises(PlanError, match="evenly") as caught:
        analysis.plan_keeping({tied[0].name: [0], tied[1].name: [0, 1]})
    assert repr(tied[0].name) in str(caught.value)
    assert repr(tied[1].name) in str(caught.value)
