"""Gradual masks: zeros that compute what the smaller model will, on every net of `nets.py`."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS, normal
from oracle import all_tensors, assert_close, by_row, outputs, random_keep
from selection import analysis_of, sampled
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.apply.plan import planned
from depcut.errors import BudgetError, InputError, PlanError
from depcut.masking.masks import Masks
from depcut.masking.places import find_places
from depcut.masking.probe import probed
from depcut.plan.keep import Keep
from depcut.training.gradual import cubic


def mlp(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def batch(seed: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 12, generator=generator)
    return x, x[:, :9].reshape(rows, 3, 3).sum(2).argmax(1)


def train(model: nn.Module, optimizer: Any, gradual: Any, steps: int, first: int = 0) -> None:
    model.train()
    for number in range(first, first + steps):
        x, y = batch(number)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradual.step()


def gradual_of(model: nn.Module, ratio: float = 0.5, **options: Any) -> depcut.training.Gradual:
    return depcut.training.Gradual(model, ratio, batch(0)[0][:2], 5, 45, 10, **options)


# Zeros and slices agree ---------------------------------------------------------------------------


def masked_pair(name: str, seed: int) -> tuple[nn.Module, depcut.Analysis, Keep, Masks]:
    """A net, with random units of all groups that can be masked, others in every row."""
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    places = probed(analysis.coupling, model, find_places(analysis.coupling))
    chosen = by_row(analysis, np.random.default_rng(seed))
    units = {
        g.index: np.array(chosen[g.name])
        for g in analysis.groups
        if g.index in places.zeros and g.name in chosen
    }
    return (
        model,
        analysis,
        Keep(analysis.coupling, units),
        Masks(model, places.zeros, analysis.program.aliases),
    )


@pytest.mark.parametrize("name", sampled([*NETS]))
def test_the_masked_model_is_the_smaller_one(name: str) -> None:
    net = NETS[name]
    model, analysis, keep, masks = masked_pair(name, 1)
    masked = {g.index for g in analysis.groups} - under_a_statistic(analysis)
    assert set(masks.places) == masked
    before = {n: t.clone() for n, t in all_tensors(model).items()}
    masks.set(keep)
    names = {analysis.groups[n].name: units for n, units in keep.units.items()}
    slim = planned(analysis.coupling, model, names, {}).apply(model)
    assert_close(outputs(slim, net.inputs(3)), outputs(model, net.inputs(3)), 1e-5, names)
    masks.clear()
    after = all_tensors(model)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    if keep.units:
        assert any(not torch.equal(after[n][m], before[n][m] * 0) for n, m in zeroed(masks, keep))


def zeroed(masks: Masks, keep: Keep) -> list[tuple[str, Tensor]]:
    masks.set(keep)
    found = [(n, e.mask) for n, e in masks._masked.items()]
    masks.clear()
    return found


def under_a_statistic(analysis: depcut.Analysis) -> set[int]:
    """Groups that a norm, mean or maximum runs over, and those tied to one."""
    coupling = analysis.coupling
    reduced = {
        coupling.group_of[leaf].index
        for effects in coupling.effects.values()
        for term in effects.statistics
        for leaf in depcut.axes.leaves(depcut.axes.resolve(term))
        if leaf in coupling.group_of
    }
    tied = {g.tied for g in analysis.groups if g.index in reduced} - {None}
    return reduced | {g.index for g in analysis.groups if g.tied in tied}


class Sigmoids(nn.Module):
    """Queries and keys behind a sigmoid: a masked pair still contributes 1/4 to every product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)
        self.v, self.out = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x).sigmoid() @ self.k(x).sigmoid().transpose(1, 2)
        return self.out(scores @ self.v(x))


def test_a_trial_finds_what_zeros_do_not_express() -> None:
    model, x = Sigmoids(), normal(2, 5, 6)
    gradual = depcut.training.Gradual(model, 0.2, x, 0, 10, 5, align=1)
    assert list(gradual.excluded) == ["q"]
    assert "zeros in its weights" in gradual.excluded["q"]
    for _ in range(10):
        gradual.step()
    assert set(gradual.masked) == {"v"}
    want = model(x)
    torch.testing.assert_close(gradual.commit()(x), want, rtol=0, atol=1e-5)


def test_a_residual_stream_under_layer_norm_is_named() -> None:
    net = NETS["vision_transformer"]
    gradual = depcut.training.Gradual(net.build(), 0.2, net.inputs(2), 0, 10, 5, align=1)
    assert any("statistics" in why and "norm1" in why for why in gradual.excluded.values())


# The loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_grow_along_the_schedule_and_commit_is_exact(kind: Any) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
    gradual = gradual_of(model, 0.5)
    seen = []
    for number in range(60):
        train(model, optimizer, gradual, 1, number)
        seen.append(gradual.removed)
        wanted = cubic(max(5, 5 + (number - 4) // 10 * 10), 5, 45, 0, 0.5)
        assert gradual.target == pytest.approx(wanted)
        assert gradual.removed == pytest.approx(wanted, abs=0.05)
    assert [a for a, _ in itertools.groupby(seen)] == sorted(set(seen))
    assert len(set(seen)) == 5
    assert gradual.done
    keys, want = list(model.state_dict()), outputs(model, batch(99)[0])
    slim = gradual.commit(optimizer=optimizer)
    assert list(slim.state_dict()) == keys
    assert_close(outputs(slim, batch(99)[0]), want, 1e-5, {})
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    # the optimizer goes on with the smaller model, and nothing masks it any more
    before = [p.detach().clone() for p in slim.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(slim(batch(1)[0]), batch(1)[1]).backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, slim.parameters(), strict=True))


def test_masked_units_get_no_gradient_and_stay_zero() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
    gradual = gradual_of(model)
    train(model, optimizer, gradual, 50)
    assert gradual.analysis.groups
    for number in range(3):
        x, y = batch(number)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for group in gradual.analysis.groups:
            gone = torch.from_numpy(gradual.masked[group.name])
            for member in group.members:
                slices = model.get_parameter(member.tensor).grad.index_select(member.dim, gone)
                assert len(gone)
                assert not slices.any(), f"{member} gets a gradient"
        optimizer.step()
        gradual.step()
        for group in gradual.analysis.groups:
            gone = torch.from_numpy(gradual.masked[group.name])
            for member in group.members:
                if member.role == "consumer":
                    weight = model.get_parameter(member.tensor)
                    assert not weight.index_select(member.dim, gone).any()


def test_a_unit_comes_back_with_its_values_when_its_rank_rises() -> None:
    model = mlp()
    best = {"0": np.arange(32.0), "2": np.arange(32.0)}

    def ranks(coupling: Any, _model: nn.Module, _seed: int) -> list[Any]:
        return [best[g.name] for g in coupling.groups]

    gradual = gradual_of(model, score=ranks, align=1)
    dense = deepcopy(model)
    for _ in range(15):
        gradual.step()
    assert gradual.masked["0"].tolist() == list(range(len(gradual.masked["0"])))
    best["0"] = best["0"][::-1].copy()
    for _ in range(10):
        gradual.step()
    gone = gradual.masked["0"]
    assert 0 not in gone
    assert 31 in gone
    kept = np.setdiff1d(np.arange(32), gone)
    rows = np.setdiff1d(np.arange(32), gradual.masked["2"])
    now, then = model[2].weight, dense[2].weight
    assert torch.equal(now[rows][:, kept], then[rows][:, kept])
    gradual.cancel()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["attention_fused", "grouped", "causal_decoder"])
def test_units_of_each_row_are_masked_and_come_back_from_a_state(name: str) -> None:
    """Features within a head, channels within a group: every row loses others, equally many."""
    model = NETS[name].build()
    example = NETS[name].inputs(2)
    gradual = depcut.training.Gradual(model, 0.5, example, start=0, end=2, every=1, align=1)
    gradual.step()
    gradual.step()
    plan = gradual.plan
    by_row = {n: units for n, units in gradual.masked.items() if units.ndim == 2}
    assert by_row
    for group, gone in gradual.masked.items():
        for out, kept in zip(np.atleast_2d(gone), np.atleast_2d(plan.kept[group]), strict=True):
            assert sorted([*out, *kept]) == list(range(plan.sizes[group]))
    other = NETS[name].build()
    other.load_state_dict(model.state_dict())
    resumed = depcut.training.Gradual(other, 0.5, example, start=0, end=2, every=1, align=1)
    resumed.load_state_dict(gradual.state_dict())
    assert resumed.plan.digest == plan.digest
    expected = outputs(model.eval(), example)
    for masks in (resumed, gradual):
        assert_close(outputs(masks.commit().eval(), example), expected, 1e-5, name)


def test_scores_see_the_values_of_masked_units() -> None:
    model = mlp()
    dense, seen = deepcopy(model), []

    def look(coupling: Any, scored: nn.Module, _seed: int) -> list[Any]:
        pairs = zip(scored.parameters(), dense.parameters(), strict=True)
        seen.append(all(torch.equal(a, b) for a, b in pairs))
        return [np.arange(float(g.size)) for g in coupling.groups]

    gradual = gradual_of(model, score=look, align=1)
    for _ in range(45):
        gradual.step()
    assert seen == [True] * 5  # one to see that the ratio can be reached, four mask steps
    assert not torch.equal(model[2].weight, dense[2].weight)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_masks_can_be_undone(seeds: list[int]) -> None:
    analysis = analysis_of("attention_separate")
    model = deepcopy(analysis.model)  # which is only read
    masks = Masks(model, find_places(analysis.coupling).zeros, analysis.program.aliases)
    before = {n: t.clone() for n, t in all_tensors(model).items()}
    for seed in seeds:
        chosen = random_keep(analysis, np.random.default_rng(seed))
        units = {g.index: np.array(chosen[g.name]) for g in analysis.groups if g.name in chosen}
        keep = Keep(analysis.coupling, {n: u for n, u in units.items() if n in masks.places})
        masks.set(keep)
        with masks.revealed():
            assert all(torch.equal(t, before[n]) for n, t in all_tensors(model).items())
    masks.clear()
    assert all(torch.equal(t, before[n]) for n, t in all_tensors(model).items())


@given(st.integers(0, 100), st.integers(1, 100), st.floats(0, 0.4), st.floats(0.5, 0.99), st.data())
def test_the_schedule_rises_from_one_end_to_the_other(
    start: int, length: int, low: float, high: float, data: st.DataObject
) -> None:
    end = start + length
    assert cubic(start, start, end, low, high) == pytest.approx(low)
    assert cubic(end, start, end, low, high) == pytest.approx(high)
    a, b = sorted(data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300))))
    assert low - 1e-9 <= cubic(a, start, end, low, high) <= cubic(b, start, end, low, high) + 1e-12
    assert cubic(start + length // 2, start, end, 0, 1) == pytest.approx(
        1 - (1 - (length // 2) / length) ** 3
    )


def test_shared_weights_are_masked_once() -> None:
    net = NETS["tied_embedding"]
    model = net.build()
    gradual = depcut.training.Gradual(model, 0.2, net.inputs(2), 0, 10, 5, of="params", align=1)
    for _ in range(10):
        gradual.step()
    want = outputs(model, net.inputs(3))
    slim = gradual.commit()
    assert_close(outputs(slim, net.inputs(3)), want, 1e-5, {})
    assert slim.head.weight is slim.embedding.weight


def test_a_loss_based_criterion_works_inside_the_loop() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    gradual = gradual_of(
        model, score="taylor", data=[batch(0)], loss=functional.cross_entropy, progress=False
    )
    train(model, optimizer, gradual, 50)
    assert gradual.removed == pytest.approx(0.5, abs=0.03)
    assert all(p.grad is not None for p in model.parameters())


# State --------------------------------------------------------------------------------------------


def test_a_run_resumes_where_its_state_was_taken(tmp_path: Any) -> None:
    def setup() -> tuple[nn.Module, Any, depcut.training.Gradual]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, gradual_of(model, align=1)

    model, optimizer, gradual = setup()
    train(model, optimizer, gradual, 28)
    state = gradual.state_dict()
    assert all(isinstance(v, Tensor) for v in state.values())
    torch.save([model.state_dict(), optimizer.state_dict(), state], tmp_path / "state.pt")
    train(model, optimizer, gradual, 30, 28)

    other, second, resumed = setup()
    weights, moments, masks = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    second.load_state_dict(moments)
    resumed.load_state_dict(masks)
    assert resumed.steps == 28
    train(other, second, resumed, 30, 28)
    assert {n: u.tolist() for n, u in gradual.masked.items()} == {
        n: u.tolist() for n, u in resumed.masked.items()
    }
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert gradual.plan.digest == resumed.plan.digest


def test_a_run_can_be_rolled_back() -> None:
    """Units that were masked after the state was taken have the weights of the checkpoint."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradual = gradual_of(model, align=1)
    train(model, optimizer, gradual, 18)
    weights, state = deepcopy(model.state_dict()), gradual.state_dict()
    train(model, optimizer, gradual, 30, 18)
    expected, digest = deepcopy(model.state_dict()), gradual.plan.digest
    for weights_first in (True, False):
        if weights_first:
            model.load_state_dict(weights)
        gradual.load_state_dict(state)
        if not weights_first:
            model.load_state_dict(weights)
        train(model, optimizer, gradual, 30, 18)
        assert gradual.plan.digest == digest
        assert all(torch.equal(model.state_dict()[n], t) for n, t in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), batch(0)[0].to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradual = depcut.training.Gradual(model, 0.5, x[:2], 0, 4, 2)
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        gradual.step()
    want = outputs(model, x)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert_close(outputs(gradual.commit(), x), want, tolerance, {})


@pytest.mark.parametrize("damage", ["step", "width", "unit", "value"])
def test_a_state_of_another_run_is_refused(damage: str) -> None:
    model = mlp()
    gradual = gradual_of(model, align=1)
    for _ in range(20):
        gradual.step()
    state = gradual.state_dict()
    if damage == "step":
        del state["step"]
    elif damage == "width":
        state = gradual_of(mlp(16), align=1).state_dict() | {"kept.0": torch.arange(40)}
    elif damage == "unit":
        state["kept.0"] = torch.tensor([3, 3])
    else:
        state["value.2.weight"] = state["value.2.weight"][1:]
    with pytest.raises(PlanError, match=r"state is of another run(.|\n)*state_dict\(\)"):
        gradual_of(mlp(), align=1).load_state_dict(state)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 2, "half", None, True])
def test_a_ratio_out_of_range(ratio: Any) -> None:
    with pytest.raises(InputError, match="between 0 and 1 exclusive"):
        gradual_of(mlp(), ratio)


@pytest.mark.parametrize(
    ("start", "end", "every", "words"),
    [
        (-1, 10, 1, "start is -1"),
        (1.5, 10, 1, "start is 1.5"),
        (0, 0, 1, "end is 0"),
        (0, True, 1, "end is True"),
        (0, 10, 0, "every is 0"),
        (10, 10, 1, "no mask step from 10 to 10"),
        (10, 5, 1, "no mask step from 10 to 5"),
        (0, 10, 11, "one every 11 steps"),
    ],
)
def test_steps_out_of_range(start: Any, end: Any, every: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        depcut.training.Gradual(mlp(), 0.5, batch(0)[0], start, end, every)
    assert caught.value.remedy


@pytest.mark.parametrize("initial", [-0.1, 0.5, 0.9, "0", True])
def test_an_initial_ratio_out_of_range(initial: Any) -> None:
    with pytest.raises(InputError, match=r"initial is(.|\n)*below ratio"):
        gradual_of(mlp(), initial=initial)


def test_a_quantity_that_masks_do_not_have() -> None:
    with pytest.raises(InputError, match=r"masks have no 'latency'(.|\n)*macs, params, channels"):
        gradual_of(mlp(), of="latency")


def test_a_ratio_that_cannot_be_reached_says_what_is_not_masked() -> None:
    net = NETS["vision_transformer"]
    with pytest.raises(BudgetError, match=r"cannot be reduced(.|\n)*not masked(.|\n)*iterate"):
        depcut.training.Gradual(net.build(), 0.99, net.inputs(2), 0, 10, 5)


def test_nothing_to_mask() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(BudgetError, match=r"nothing can be masked(.|\n)*statistics(.|\n)*iterate"):
        depcut.training.Gradual(model, 0.5, normal(2, 6), 0, 10, 5)


def test_nothing_happens_after_commit() -> None:
    gradual = gradual_of(mlp())
    with pytest.raises(PlanError, match="nothing is masked after 0 steps"):
        gradual.commit()
    for _ in range(30):
        gradual.step()
    gradual.commit()
    state = gradual.state_dict()
    for call in (gradual.commit, gradual.step, gradual.cancel):
        with pytest.raises(PlanError, match=rf"{call.__name__}\(\) after commit\(\)"):
            call()
    with pytest.raises(PlanError, match="after commit"):
        gradual.load_state_dict(state)


def test_training_may_stop_before_the_end() -> None:
    model = mlp()
    gradual = gradual_of(model)
    for _ in range(25):
        gradual.step()
    assert not gradual.done
    assert gradual.plan.settings["ratio"] == pytest.approx(gradual.target)
    x = batch(3)[0]
    want = outputs(model, x)
    assert_close(outputs(gradual.commit(), x), want, 1e-5, {})
