"""`with plan.masked(model)`: the dense model computes what the smaller one does, and comes back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from nets import NETS, normal
from oracle import all_tensors, assert_close, by_row, outputs
from selection import sampled
from test_depth import CASES
from test_gradual import under_a_statistic
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.errors import InputError, PlanError


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes: NaN equals NaN, and a negative zero is not zero."""
    return {n: t.detach().cpu().numpy().tobytes() for n, t in all_tensors(model).items()}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(32, 3))


def plan_of(model: nn.Module, ratio: float = 0.5, **options: Any) -> depcut.Plan:
    return depcut.analyze(model, normal(2, 12)).plan(ratio, align=1, **options)


class Normed(nn.Module):
    """A LayerNorm runs over the units of `wide`, none over those of `inner`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.gelu(self.inner(self.norm(self.wide(x)))))


@pytest.mark.parametrize("name", sampled([*NETS]))
def test_a_masked_net_computes_what_the_smaller_one_does(name: str) -> None:
    net = NETS[name]
    model = net.build().eval()
    analysis = depcut.analyze(model, net.inputs(2))
    plan = analysis.plan_keeping(by_row(analysis, np.random.default_rng(3)))
    before = bits(model)
    refused = {analysis.groups[n].name for n in under_a_statistic(analysis)} & set(plan.kept)
    if refused:
        with pytest.raises(PlanError) as caught:
            plan.masked(model).__enter__()
        assert any(f"{name} (" in caught.value.what for name in refused)
        assert bits(model) == before
        kept = {name: units for name, units in plan.kept.items() if name not in refused}
        plan = analysis.plan_keeping(kept)
    with plan.masked(model) as same:
        got = outputs(model, net.inputs(3))
    assert same is model
    slim = plan.apply(model, compensate=False)
    assert_close(outputs(slim, net.inputs(3)), got, 1e-5, plan.kept)
    assert bits(model) == before


@pytest.mark.parametrize("name", sampled([*CASES], ["pre_norm"]))
def test_a_dropped_branch_is_masked_as_a_whole(name: str) -> None:
    found = CASES[name]
    model = found.build().eval()
    analysis = depcut.analyze(model, found.inputs(2))
    plan = analysis.plan_keeping({}, dropped=list(found.zeros)[:1])
    before = bits(model)
    with plan.masked(model):
        got = outputs(model, found.inputs(5))
    slim = plan.apply(model, compensate=False)
    assert_close(outputs(slim, found.inputs(5)), got, 1e-5, plan.dropped)
    assert bits(model) == before


def test_a_branch_whose_zeros_are_no_zero_is_refused() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.gate(x).sigmoid())

    model = Gate()
    plan = depcut.analyze(model, normal(2, 12)).plan_keeping({}, dropped=["gate"])
    before = bits(model)
    with pytest.raises(PlanError, match="a dropped branch adds something else than zero"):
        plan.masked(model).__enter__()
    assert bits(model) == before


def test_what_a_statistic_runs_over_is_refused_by_name_and_not_with_ignore() -> None:
    model = Normed()
    analysis = depcut.analyze(model, normal(2, 12))
    plan = analysis.plan(0.5, align=1)
    with pytest.raises(PlanError, match=r"wide \(statistics over its units at layer 'norm'"):
        plan.masked(model).__enter__()
    narrow = analysis.plan(0.2, align=1, ignore=["wide"])
    with narrow.masked(model):
        got = outputs(model, normal(7, 12))
    assert_close(outputs(narrow.apply(model), normal(7, 12)), got, 1e-5, narrow.kept)


def test_values_come_back_bit_for_bit_after_an_error() -> None:
    model = mlp()
    plan = plan_of(model)
    with torch.no_grad():
        model[2].weight[:, ::2] = -0.0
        model[2].weight[0, :] = torch.finfo(torch.float32).tiny / 8  # subnormal
    before = bits(model)
    seen: list[bool] = []

    def judge() -> None:
        with plan.masked(model):
            seen.append(bits(model) == before)
            raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        judge()
    assert seen == [False]
    assert bits(model) == before
    assert not [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_one_plan_within_another() -> None:
    model = mlp()
    half, third = plan_of(model), plan_of(model, 0.3, score="random", seed=5)
    before, x = bits(model), normal(4, 12)
    with half.masked(model):
        alone = model(x)
        with third.masked(model):
            assert not torch.equal(model(x), alone)
        assert torch.equal(model(x), alone)
    assert bits(model) == before


def test_training_within_moves_only_what_stays() -> None:
    model, x = mlp(), normal(16, 12)
    plan = plan_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with plan.masked(model):
        zeros = {n: (p == 0) & (before[n] != 0) for n, p in model.named_parameters()}
        functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert sum(int(z.sum()) for z in zeros.values()) > 0
    assert all(torch.equal(after[n][z], before[n][z]) for n, z in zeros.items())
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_a_plan_from_a_file_masks_another_instance(tmp_path: Path) -> None:
    model = mlp()
    plan_of(model).save(tmp_path / "plan.json")
    plan, other, x = depcut.Plan.load(tmp_path / "plan.json"), mlp(), normal(9, 12)
    with torch.no_grad():
        other[0].weight.mul_(2)
    with plan.masked(other):
        got = [other(x)]
    assert_close([plan.apply(other, compensate=False)(x)], got, 1e-5, "other")


def test_a_wrapped_model_is_masked_inside() -> None:
    model, x = mlp(), normal(3, 12)
    plan = plan_of(model)
    with plan.masked(model):
        want = model(x)
    wrapped = nn.DataParallel(model)
    with plan.masked(wrapped) as same:
        assert same is wrapped
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), normal(3, 12).to(dtype)
    plan = depcut.analyze(model, x[:2]).plan(0.5, align=1)
    before = bits(model.float()) if dtype is torch.bfloat16 else bits(model)
    model.to(dtype)
    with plan.masked(model):
        got = model(x)
    slim = plan.apply(model, compensate=False)
    assert_close([slim(x)], [got], 1e-2 if dtype is torch.bfloat16 else 1e-9, "dtype")
    assert bits(model.float() if dtype is torch.bfloat16 else model) == before


def test_offloaded_tensors_are_refused() -> None:
    model = mlp()
    plan = plan_of(model)
    offloaded = accelerate.cpu_offload(mlp(), torch.device("cpu"))
    with pytest.raises(InputError, match=r"spread by accelerate's device_map"):
        plan.masked(offloaded).__enter__()


def test_mistakes_are_named() -> None:
    model = mlp()
    plan = plan_of(model)
    with pytest.raises(PlanError, match="another architecture"):
        plan.masked(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))).__enter__()
    with pytest.raises(PlanError, match=r"applies to a torch\.nn\.Module, not to a str"):
        plan.masked("model").__enter__()  # type: ignore[arg-type]
    changed = deepcopy(model)
    bound = depcut.analyze(changed, normal(2, 12)).plan(0.5, align=1)
    changed[1] = nn.Tanh()
    with pytest.raises(PlanError, match="has changed since it was analysed"):
        bound.masked(changed).__enter__()
