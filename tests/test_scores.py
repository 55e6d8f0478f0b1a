"""Criteria: magnitudes against loops over what every unit owns, draws, and users' own functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, normal
from torch import Tensor, nn

import depcut
from depcut.errors import InputError
from depcut.scores import CRITERIA, score

BRUTE = [
    "plain", "mlp", "inverted_residual", "concat_itself", "dense_block", "halves_swapped",
    "grouped_bottleneck", "module_called_twice", "flatten_linear", "attention_gqa_expand",
    "window_attention", "tied_embedding", "layer_scale", "lstm",
]  # fmt: skip


def analysis_of(name: str) -> Any:
    net = NETS[name]
    return depcut.analyze(net.build(), net.inputs(2))


def scores(analysis: Any, criterion: Any, seed: int = 0) -> list[np.ndarray]:
    return score(criterion, analysis.coupling, analysis.model, seed)


def owned(analysis: Any, group: Any, unit: int) -> list[Tensor]:
    """What goes with one unit: a slice of each dimension of each parameter that it occurs in."""
    others = [u for u in range(group.size) if u != unit]
    indices = analysis.plan_keeping({group.name: others}).tensor_indices()
    slices, seen = [], set()
    for name, parameter in analysis.model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen or name not in indices:
            continue
        seen.add(id(parameter))
        for dim, kept in enumerate(indices[name]):
            if kept is not None:
                gone = np.setdiff1d(np.arange(parameter.shape[dim]), kept)
                slices.append(parameter.detach().double().index_select(dim, torch.tensor(gone)))
    assert slices
    return slices


@pytest.mark.parametrize("name", BRUTE)
def test_magnitudes_are_norms_of_all_that_a_unit_owns(name: str) -> None:
    analysis = analysis_of(name)
    l1, l2 = scores(analysis, "l1"), scores(analysis, "l2")
    for group in analysis.groups:
        slices = [owned(analysis, group, unit) for unit in range(group.size)]
        absolute = np.array([sum(float(s.abs().sum()) for s in unit) for unit in slices])
        squares = np.array([sum(float(s.square().sum()) for s in unit) for unit in slices])
        # What a unit owns in all rows together; test_rows.py looks at each row by itself.
        together = np.atleast_2d(l1[group.index]).sum(axis=0)
        euclidean = (np.atleast_2d(l2[group.index]) ** 2).sum(axis=0)
        for sums, expected in ((together, absolute), (euclidean, squares)):
            np.testing.assert_allclose(sums / sums.mean(), expected / expected.mean(), rtol=1e-5)
        assert l1[group.index].mean() == pytest.approx(1)
        assert l2[group.index].mean() == pytest.approx(1)


def test_magnitude_is_the_euclidean_norm() -> None:
    analysis = analysis_of("residual")
    for a, b in zip(scores(analysis, "magnitude"), scores(analysis, "l2"), strict=True):
        assert a.tolist() == b.tolist()


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 12), nn.Linear(12, 5)).eval()


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_every_group_has_a_mean_of_one_at_any_scale(criterion: str) -> None:
    model = chain()
    before = scores(depcut.analyze(model, normal(2, 6)), criterion)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(250)
    after = scores(depcut.analyze(model, normal(2, 6)), criterion)
    assert after
    for a, b in zip(before, after, strict=True):
        assert a.mean() == pytest.approx(1)
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_zero_weights_score_alike(criterion: str) -> None:
    model = chain()
    for p in model.parameters():
        nn.init.zeros_(p)
    found = scores(depcut.analyze(model, normal(2, 6)), criterion)
    assert found
    for values in found:
        assert set(values.tolist()) == {1.0}


def test_half_precision_weights_do_not_overflow() -> None:
    model = chain().half()
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[0].weight[3] = 100.0
    [first, _] = scores(depcut.analyze(model, normal(2, 6).half()), "l2")
    assert first.argmin() == 3
    assert np.isfinite(first).all()


def test_scores_only_read_the_model() -> None:
    model = chain()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for criterion in (name for name, method in CRITERIA.items() if not method.needs):
        scores(depcut.analyze(model, normal(2, 6)), criterion)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


# Chance and users' functions ----------------------------------------------------------------------


def test_draws_depend_on_the_seed_alone() -> None:
    analysis = analysis_of("residual")
    first, again, other = (scores(analysis, "random", seed) for seed in (1, 1, 2))
    state = torch.random.get_rng_state()
    np.random.default_rng(9).random(3)
    for a, b, c, group in zip(first, again, other, analysis.groups, strict=True):
        assert a.tolist() == b.tolist() != c.tolist()
        assert (a > 0).all()
        assert len(set(a.tolist())) == group.size
    assert torch.equal(state, torch.random.get_rng_state())


def last_first(coupling: Any, model: nn.Module, seed: int) -> list[Any]:
    """Lists, arrays and tensors are all vectors."""
    kinds = [list, np.array, torch.tensor]
    return [kinds[g.index % 3](range(g.size)) for g in coupling.groups]


def test_a_function_decides_what_stays() -> None:
    analysis = analysis_of("residual")
    plan = analysis.plan(0.5, of="channels", align=1, score=last_first)
    for group in analysis.groups:
        kept = plan.kept[group.name].tolist()
        assert kept == list(range(group.size))[-len(kept) :]
    assert plan.settings["score"] == "last_first"


def test_a_function_is_given_coupling_model_and_seed() -> None:
    analysis = analysis_of("residual")
    seen: list[Any] = []

    def spy(coupling: Any, model: nn.Module, seed: int) -> list[Any]:
        seen.extend([coupling, model, seed])
        return [np.ones(g.size) for g in coupling.groups]

    analysis.plan(0.3, score=spy, seed=11)
    assert seen == [analysis.coupling, analysis.model, 11]


def test_of_equal_scores_the_first_units_stay() -> None:
    analysis = analysis_of("residual")
    plan = analysis.plan(
        0.5, of="channels", align=1, score=lambda c, m, s: [np.ones(g.size) for g in c.groups]
    )
    assert all(kept.tolist() == list(range(len(kept))) for kept in plan.kept.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: [np.ones(g.size) for g in groups[1:]],
        lambda groups: [np.ones(g.size + 1) for g in groups],
        lambda groups: [np.ones((g.size, 1)) for g in groups],
        lambda groups: [1.0 for _ in groups],
        lambda groups: [],
    ],
)
def test_vectors_of_wrong_shapes_are_refused(make: Any) -> None:
    analysis = analysis_of("residual")

    def crooked(coupling: Any, model: nn.Module, seed: int) -> list[Any]:
        return list(make(coupling.groups))

    with pytest.raises(InputError, match=r"(?s)do not match.*'crooked'.*group\.size"):
        analysis.plan(0.5, score=crooked)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_their_group(value: float) -> None:
    analysis = analysis_of("residual")
    group = analysis.groups[1]

    def broken(coupling: Any, model: nn.Module, seed: int) -> list[Any]:
        made = [np.ones(g.size) for g in coupling.groups]
        made[1][[0, 2]] = value
        return made

    with pytest.raises(InputError) as caught:
        analysis.plan(0.5, score=broken)
    message = str(caught.value)
    assert f"2 of {group.size} scores are not finite" in message
    assert repr(group.name) in message
    assert caught.value.remedy


@pytest.mark.parametrize("answer", [None, 3, "ones"])
def test_what_is_no_list_of_vectors_is_refused(answer: Any) -> None:
    analysis = analysis_of("residual")
    with pytest.raises(InputError, match="score="):
        analysis.plan(0.5, score=lambda *_: answer)


def test_an_unknown_name_lists_the_known_ones() -> None:
    analysis = analysis_of("residual")
    with pytest.raises(InputError) as caught:
        analysis.plan(0.5, score="tailor")
    assert all(word in str(caught.value) for word in ("'tailor'", *CRITERIA, "function"))


# Models without weights --------------------------------------------------------------------------


def on_meta() -> Any:
    with torch.device("meta"):
        model = chain()
    return depcut.analyze(model, normal(2, 6))


@pytest.mark.parametrize("criterion", ["magnitude", "l1", "l2"])
def test_magnitudes_need_weights(criterion: str) -> None:
    with pytest.raises(InputError) as caught:
        on_meta().plan(0.5, score=criterion)
    assert "meta device" in str(caught.value)
    assert "0.weight" in str(caught.value)
    assert "random" in str(caught.value)


def test_draws_need_no_weights() -> None:
    analysis = on_meta()
    plan = analysis.plan(0.5, align=1, score="random")
    assert plan.macs / analysis.macs == pytest.approx(0.5, abs=0.1)
    assert all(p.is_meta for p in plan.apply(analysis.model).parameters())
