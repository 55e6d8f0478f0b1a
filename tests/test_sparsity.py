"""Penalties on whole units: their values, by brute force, and what training with them does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, normal
from oracle import all_tensors, by_row, outputs
from torch import Tensor, nn

import depcut
from depcut.errors import InputError, PlanError

STRUCTURES = (
    "plain residual concat grouped_bottleneck attention_separate attention_gqa_sdpa lstm "
    "tied_embedding channel_shuffle inverted_residual weight_norm"
).split()


def owned(analysis: depcut.Analysis, group: Any, unit: int) -> list[Tensor]:
    """All elements of a unit: of each member, what disappears when this unit alone goes."""
    kept = [u for u in range(group.size) if u != unit]
    indices = analysis.plan_keeping({group.name: kept}).tensor_indices()
    held, found = dict(analysis.model.named_parameters(remove_duplicate=False)), {}
    for member in group.members:
        parameter = held.get(member.tensor)
        if parameter is not None:
            gone = np.setdiff1d(
                np.arange(parameter.shape[member.dim]), indices[member.tensor][member.dim]
            )
            slices = parameter.index_select(member.dim, torch.from_numpy(gone))
            found[id(parameter), member.dim] = slices
    return list(found.values())


def test_every_structure_is_there() -> None:
    assert [name for name in STRUCTURES if name not in NETS] == []


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_penalty_is_the_sum_over_what_each_unit_owns(name: str) -> None:
    analysis = depcut.analyze(NETS[name].build(), NETS[name].inputs(2))
    penalty = depcut.training.GroupLasso(analysis, 0.3)
    expected, norms = 0.0, penalty.norms()
    for group in analysis.groups:
        for unit in range(group.size):
            slices = owned(analysis, group, unit)
            norm = math.sqrt(sum(float(s.detach().double().square().sum()) for s in slices))
            expected += math.sqrt(sum(s.numel() for s in slices)) * norm
            assert float(norms[group.name][unit]) == pytest.approx(norm, rel=1e-4)
    assert float(penalty().detach()) == pytest.approx(0.3 * expected, rel=1e-4)


def test_the_gradient_is_finite_where_a_unit_is_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    penalty = depcut.training.GroupLasso(depcut.analyze(model, normal(2, 4)), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    penalty().backward()
    assert all(p.grad is not None and not p.grad.any() for p in list(model.parameters())[:3])


def test_units_that_keep_names_are_spared() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    analysis = depcut.analyze(model, normal(2, 4))
    assert list(depcut.training.GroupLasso(analysis, 1.0, ignore="2").norms()) == ["0"]
    with pytest.raises(InputError, match=r"no units to penalise(.|\n)*ignore="):
        depcut.training.GroupLasso(analysis, 1.0, ignore=("0", "2"))
    with pytest.raises(InputError, match="matches no module"):
        depcut.training.GroupLasso(analysis, 1.0, ignore=("nothing*",))


# Training -----------------------------------------------------------------------------------------

X = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0].relu() - X[:, 1].relu(), (X[:, 2] + X[:, 3]).relu()], 1)


def student() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


def fit(model: nn.Module, penalty: Any, steps: int, lr: float = 0.02) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
    for _ in range(steps):
        loss = (model(X) - Y).square().mean()
        optimizer.zero_grad()
        (loss + penalty()).backward()
        optimizer.step()
        schedule.step()
        getattr(penalty, "step", int)()
    return float(loss.detach())


def change(slim: nn.Module, model: nn.Module) -> float:
    [made], [wanted] = outputs(slim, X), outputs(model, X)
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.sweep
def test_units_that_nothing_needs_become_removable() -> None:
    model = student()
    analysis = depcut.analyze(model, X[:2])
    untrained = change(depcut.shrink(model, 0.6, X[:2], align=1), model)
    penalty = depcut.training.GroupLasso(analysis, 2e-3)
    loss = fit(model, penalty, 2500)
    norms = np.sort(penalty.norms()["0"].numpy())
    assert loss < 0.05
    assert norms[:19].max() < 1e-3 * norms[-1]
    slim = depcut.shrink(model, 0.6, X[:2], align=1)
    assert slim[0].out_features <= 13
    assert untrained > 0.1
    assert change(slim, model) < 1e-3


@pytest.mark.sweep
def test_growing_regularisation_empties_the_units_of_a_plan() -> None:
    model = student()
    fit(model, lambda: torch.zeros(()), 500)
    analysis = depcut.analyze(model, X[:2])
    plan = analysis.plan(0.5, align=1)
    before = change(plan.apply(model), model)
    penalty = depcut.training.GrowingRegularization(
        analysis, plan, increment=0.02, every=10, ceiling=2.0
    )
    assert float(penalty().detach()) == 0.0
    loss = fit(model, penalty, 3000, lr=0.01)
    assert penalty.strength == 2.0
    assert loss < 0.05
    assert change(plan.apply(model), model) < 1e-3 < before


def test_the_growing_factor() -> None:
    model = student()
    analysis = depcut.analyze(model, X[:2])
    plan = analysis.plan_keeping({"0": list(range(30))})
    penalty = depcut.training.GrowingRegularization(
        analysis, plan, increment=0.1, every=3, ceiling=0.25
    )
    seen = []
    for _ in range(12):
        seen.append(round(penalty.strength, 6))
        penalty.step()
    assert seen == [0.0] * 3 + [0.1] * 3 + [0.2] * 3 + [0.25] * 3
    owned_squares = sum(
        float(s.detach().square().sum())
        for unit in (30, 31)
        for s in owned(analysis, analysis.groups[0], unit)
    )
    assert float(penalty().detach()) == pytest.approx(0.5 * 0.25 * owned_squares, rel=1e-5)


@pytest.mark.parametrize("name", ["grouped", "attention_fused"])
def test_growing_regularisation_of_other_units_in_every_row(name: str) -> None:
    """Pulled at alone, what a plan removes goes to zero and what stays does not move."""
    model = NETS[name].build()
    analysis = depcut.analyze(model, NETS[name].inputs(2))
    keep = by_row(analysis, np.random.default_rng(0))
    assert any(np.ndim(units) == 2 for units in keep.values())
    plan = analysis.plan_keeping(keep)
    before, slim = all_tensors(model), plan.apply(model)
    before = {n: t.detach().clone() for n, t in before.items()}
    penalty = depcut.training.GrowingRegularization(analysis, plan, increment=1.0, every=1)
    penalty.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    for _ in range(80):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    for (tensor, now), small in zip(model.named_parameters(), slim.parameters(), strict=True):
        kept = now.detach().abs() > 1e-4 * before[tensor].abs()
        assert torch.equal(now.detach()[kept], before[tensor][kept])
        assert int(kept.sum()) == small.numel() - int((small == 0).sum())


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0, -1, math.inf, math.nan, "1", True, None])
def test_a_strength_that_is_none(strength: Any) -> None:
    analysis = depcut.analyze(student(), X[:2])
    with pytest.raises(InputError, match=r"strength is(.|\n)*finite number above 0"):
        depcut.training.GroupLasso(analysis, strength)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"increment": 0}, "increment is 0"),
        ({"ceiling": -1.0}, "ceiling is -1.0"),
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
    ],
)
def test_growing_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    analysis = depcut.analyze(student(), X[:2])
    with pytest.raises(InputError, match=words):
        depcut.training.GrowingRegularization(analysis, analysis.plan(0.5), **options)


def test_a_plan_that_removes_nothing_or_is_of_another_model() -> None:
    analysis = depcut.analyze(student(), X[:2])
    with pytest.raises(PlanError, match=r"removes nothing(.|\n)*plan\(0\.5\)"):
        depcut.training.GrowingRegularization(analysis, analysis.plan_keeping({}))
    other = depcut.analyze(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), X[:2])
    with pytest.raises(PlanError, match="another architecture"):
        depcut.training.GrowingRegularization(analysis, other.plan(0.5))
