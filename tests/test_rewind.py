"""Rewound tickets and scratch controls: the same architecture, other weights, nothing left over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS
from oracle import all_tensors, assert_untouched, by_row, call, outputs, sliced, snapshot
from selection import sampled
from torch import nn

import depcut
from depcut.errors import DepcutError, InputError, PlanError


def planned(name: str) -> tuple[nn.Module, Any]:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    return model, analysis.plan_keeping(by_row(analysis, np.random.default_rng(0)))


@torch.no_grad()
def trained(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


# Rewinding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["residual", "attention_gqa_expand", "lstm", "tied_autoencoder"])
def test_kept_weights_return_to_the_snapshot(name: str, on_disk: bool, tmp_path: Path) -> None:
    model = NETS[name].build()
    early = {n: t.detach().clone() for n, t in all_tensors(model).items()}
    snapshots = depcut.training.Snapshots(steps=(0, 7), folder=tmp_path / "s" if on_disk else None)
    assert [snapshots(model, step) for step in (0, 1)] == [True, False]
    trained(model)
    assert snapshots(model, 7)
    assert snapshots.taken == (0, 7)
    plan = depcut.analyze(model, NETS[name].inputs(2)).plan(0.4, of="channels", align=1)
    before = snapshot(model)
    small = depcut.training.rewind(model, plan, snapshots)
    assert_untouched(model, before)
    indices = plan.tensor_indices()
    for tensor, value in all_tensors(small).items():
        assert torch.equal(value.detach(), sliced(early[tensor], indices[tensor])), tensor
    late = all_tensors(depcut.training.rewind(model, plan, snapshots, 7))
    for tensor, value in all_tensors(plan.apply(model)).items():
        assert torch.equal(value, late[tensor]), tensor


def test_snapshots_on_disk_are_found_again(tmp_path: Path) -> None:
    model = NETS["residual"].build()
    depcut.training.Snapshots(folder=tmp_path).take(model, 0)
    again = depcut.training.Snapshots(folder=tmp_path)
    assert again.taken == (0,)
    restored = again.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters()))  # noqa: B905
    assert [path.name for path in tmp_path.iterdir()] == ["step-0.safetensors"]


def test_plans_of_repeated_pruning_are_applied_in_turn() -> None:
    net = NETS["residual"]
    model = net.build()
    snapshots = depcut.training.Snapshots()
    snapshots(model, 0)
    first = depcut.analyze(model, net.inputs(2)).plan(0.3, align=1)
    smaller = first.apply(model)
    trained(smaller)
    second = depcut.analyze(smaller, net.inputs(2)).plan(0.3, align=1)
    rewound = depcut.training.rewind(model, [first, second], snapshots)
    expected = second.apply(first.apply(snapshots.restore(model)))
    assert all(
        torch.equal(a, b) for a, b in zip(rewound.parameters(), expected.parameters(), strict=True)
    )
    shapes = [p.shape for p in second.apply(smaller).parameters()]
    assert [p.shape for p in rewound.parameters()] == shapes


def test_a_missing_snapshot_and_one_of_another_model(tmp_path: Path) -> None:
    model, plan = planned("residual")
    with pytest.raises(InputError, match=r"no snapshot of step 3(.|\n)*there are none"):
        depcut.training.rewind(model, plan, depcut.training.Snapshots(), 3)
    for snapshots in (depcut.training.Snapshots(), depcut.training.Snapshots(folder=tmp_path)):
        snapshots.take(NETS["mlp"].build(), 0)
        with pytest.raises(InputError, match=r"does not fit|cannot be loaded"):
            depcut.training.rewind(model, plan, snapshots)


def test_a_ticket_and_its_control_in_one_call() -> None:
    model, plan = planned("residual")
    snapshots = depcut.training.Snapshots()
    snapshots(model, 0)
    inputs = NETS["residual"].inputs(2)
    draws = []

    def train(small: nn.Module) -> float:
        draws.append(float(torch.rand(())))
        return float(call(small, inputs).detach().sum())

    found = depcut.training.lottery_ticket(model, plan, snapshots, train=train)
    assert draws[0] == draws[1]
    assert found.ticket_result != found.random_result
    assert found.ticket_result == float(call(plan.apply(model), inputs).detach().sum())
    assert [p.shape for p in found.ticket.parameters()] == [
        p.shape for p in found.random.parameters()
    ]
    assert depcut.training.lottery_ticket(model, plan, snapshots).ticket_result is None


# Scratch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "lstm", "mlp", "plain", "depthwise"])
def test_a_fresh_model_is_the_same_architecture_with_other_weights(name: str) -> None:
    if name not in NETS:
        pytest.skip("no such net")
    model, plan = planned(name)
    before, state = snapshot(model), torch.get_rng_state()
    slim, new = plan.apply(model), depcut.training.fresh(model, plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(model, before)
    assert type(new) is type(slim)
    old = all_tensors(slim)
    assert list(new.state_dict()) == list(slim.state_dict())
    for tensor, value in all_tensors(new).items():
        assert value.shape == old[tensor].shape
        assert value.isfinite().all()
        if value.requires_grad:
            assert (value != old[tensor]).all(), tensor
    inputs = NETS[name].inputs(2)
    assert [o.shape for o in outputs(new, inputs)] == [o.shape for o in outputs(slim, inputs)]
    again = all_tensors(depcut.training.fresh(model, plan))
    assert all(torch.equal(t, again[n]) for n, t in all_tensors(new).items())
    other = all_tensors(depcut.training.fresh(model, plan, seed=1))
    assert any(not torch.equal(t, other[n]) for n, t in all_tensors(new).items())


def test_running_statistics_start_anew() -> None:
    model, plan = planned("residual")
    new = depcut.training.fresh(model, plan)
    norms = [m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
        assert (norm.weight == 1).all()
        assert norm.num_batches_tracked == 0


def test_layers_draw_for_their_own_fan_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(),
                          nn.Linear(300, 4))  # fmt: skip
    plan = depcut.analyze(model, torch.randn(2, 8)).plan(0.75, of="channels")
    new = depcut.training.fresh(model, plan)
    assert float(new[2].weight.detach().abs().max()) == pytest.approx(
        new[2].in_features ** -0.5, rel=0.01
    )


def test_a_parametrized_weight_is_drawn_through_its_inverse() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 40))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(50)
    plan = depcut.analyze(model, torch.randn(2, 6)).plan(0.5, of="channels")
    new = depcut.training.fresh(model, plan)
    assert new[0].weight.shape == (new[0].out_features, 6)
    assert 0.3 < float(new[0].weight.detach().abs().max()) <= 6**-0.5 + 1e-6


class TypedRows(nn.Linear):
    """Four rows of four, typed into the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).reshape(*x.shape[:-1], 4, 4).square().flatten(-2)


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner, self.block, self.head = nn.Linear(16, 16), block, nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        attends = isinstance(self.block, nn.MultiheadAttention)
        x = self.block(x, x, x, need_weights=False)[0] if attends else self.block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("block", "name", "weight", "bias"),
    [
        (lambda: TypedRows(16, 16), "GeneratedModule", "weight", False),
        (
            lambda: nn.MultiheadAttention(16, 4, batch_first=True),
            "SlimMultiheadAttention",
            "in_proj_weight",
            True,
        ),
    ],
)
def test_what_stands_for_a_class_draws_as_that_class(
    block: Callable[[], nn.Module], name: str, weight: str, bias: bool
) -> None:
    torch.manual_seed(0)
    model, x = OneBlock(block()), torch.randn(2, 5, 16)
    plan = depcut.analyze(model, x).plan(0.5, of="channels", align=1)
    slim = plan.apply(model)
    assert type(slim.block).__name__ == name
    new = depcut.training.fresh(model, plan)
    drawn = getattr(new.block, weight)
    assert drawn.isfinite().all()
    assert not torch.isin(drawn, getattr(slim.block, weight)).any()
    assert not bias or not new.block.in_proj_bias.any()
    assert new(x).shape == (2, 3)


class Scaled(nn.Module):
    """A raw parameter that no module draws, and a constant one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.linspace(1, 2, 12))
        self.fixed = nn.Parameter(torch.arange(12.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)) * self.scale + self.fixed)


def test_raw_parameters_are_named_unless_one_says_what_to_do() -> None:
    model = Scaled()
    plan = depcut.analyze(model, torch.randn(2, 5)).plan(0.5, of="channels", align=1)
    with pytest.raises(InputError, match="nothing draws new values for scale") as caught:
        depcut.training.fresh(model, plan)
    assert 'init="moments"' in str(caught.value)

    def init(module: nn.Module) -> None:
        if isinstance(module, Scaled):
            nn.init.ones_(module.scale)

    new = depcut.training.fresh(model, plan, init=init)
    assert (new.scale == 1).all()
    kept = plan.tensor_indices()["scale"][0]
    assert torch.equal(new.fixed, model.fixed[torch.as_tensor(kept)])
    drawn = depcut.training.fresh(model, plan, init="moments").scale
    assert drawn.isfinite().all()
    assert not torch.isin(drawn, model.scale).any()
    assert 0.8 < float(drawn.detach().mean()) < 2.2


def test_how_long_the_controls_train(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 8))
    analysis = depcut.analyze(model, torch.randn(2, 8))
    plan = analysis.plan(0.2, align=1)
    assert depcut.training.scratch_epochs(plan, 40, "E") == 40
    assert depcut.training.scratch_epochs(plan, 40) == round(40 * analysis.macs / plan.macs) == 50
    assert depcut.training.scratch_epochs(analysis.plan(0.9, align=1), 40) == 80
    with pytest.raises(InputError, match="no scratch control 'C'"):
        depcut.training.scratch_epochs(plan, 40, "C")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="loaded from a file"):
        depcut.training.scratch_epochs(depcut.Plan.load(tmp_path / "plan.json"), 40)


@pytest.mark.parametrize("name", sampled([*NETS], ["residual", "layer_scale"]))
def test_every_structure_starts_afresh_or_says_why_not(name: str) -> None:
    model, plan = planned(name)
    with contextlib.suppress(InputError):  # of raw parameters
        depcut.training.fresh(model, plan)
    new = depcut.training.fresh(model, plan, init="moments")
    assert all(p.isfinite().all() for p in new.parameters())
    outputs(new, NETS[name].inputs(2))


def test_another_architecture_is_refused() -> None:
    _, plan = planned("residual")
    with pytest.raises(DepcutError, match="another architecture"):
        depcut.training.fresh(NETS["mlp"].build(), plan)
