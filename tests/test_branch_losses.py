"""Branches and widths in one problem: their losses have one unit, and the least sum is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from nets import normal, seeded
from test_depth import deep
from torch import Tensor, nn

import depcut
from depcut.allocate.branch_losses import branch_losses, width_loss
from depcut.allocate.choose import Chooser, Request
from depcut.allocate.judges import PredictedLoss
from depcut.allocate.savings import Savings
from depcut.analysis import Analysis
from depcut.latency import target, workload
from depcut.latency.measure import Beside
from depcut.latency.model import LatencyModel
from depcut.plan.cost import count_macs


def texts(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 5, 12, generator=generator) for _ in range(batches)]


@dataclass(frozen=True)
class Judged:
    """A model some of whose branches hardly do anything, with the losses of all that can go."""

    analysis: Analysis
    data: Any
    chooser: Chooser
    losses: dict[str, float]


IDLE = {"blocks.0.mlp", "blocks.1.attn"}


@pytest.fixture(scope="module")
def quiet() -> Judged:
    model, given = deep()
    analysis = depcut.analyze(model, given)
    data = analysis.calibrate(texts(), progress=False)
    assert data is not None
    losses = branch_losses(analysis.coupling, model, analysis.branches, data)
    request = Request("obs", "global", 1, calibration=data)
    return Judged(analysis, data, Chooser(analysis.coupling, model, request), losses)


def test_a_branch_costs_what_removing_all_of_its_units_does(quiet: Judged) -> None:
    for name in ("blocks.0.mlp", "blocks.1.mlp"):
        (group,) = [g for g in quiet.analysis.groups if g.name == f"{name}.0"]
        scores = quiet.chooser.scores[group.index]
        assert quiet.losses[name] == pytest.approx(float(scores.sum()), rel=0.15)


class Shifted(nn.Module):
    """A convolution net with a branch that adds a constant to each channel, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.constant, self.other = (
            nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1)) for _ in range(2)
        )
        with torch.no_grad():
            self.constant[2].weight.mul_(1e-3)
            self.constant[2].bias.copy_(torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.constant(x)
        return self.head((x + self.other(x)).relu().mean((2, 3)))


def test_what_a_bias_can_take_over_costs_nothing() -> None:
    model = seeded(Shifted, 0)
    analysis = depcut.analyze(model, normal(2, 3, 6, 6))
    data = analysis.calibrate([normal(8, 3, 6, 6)], progress=False)
    assert data is not None
    losses = branch_losses(analysis.coupling, model, analysis.branches, data)
    assert losses["constant"] < 1e-3 * losses["other"]


@pytest.mark.parametrize("ratio", [0.6, pytest.param(0.3, marks=pytest.mark.sweep)])
def test_the_plan_of_least_loss_is_taken(quiet: Judged, ratio: float) -> None:
    analysis, chooser = quiet.analysis, quiet.chooser
    plan = analysis.plan(ratio, data=quiet.data, align=1, depth=True)
    found = sum(quiet.losses[name] for name in plan.dropped) + width_loss(chooser, plan)
    alone = width_loss(chooser, analysis.plan(ratio, data=quiet.data, align=1))
    assert found <= alone * (1 + 1e-9)
    assert plan.dropped if ratio == 0.6 else True
    assert IDLE.issuperset(plan.dropped)


def test_what_widths_alone_remove_counts_neither_as_loss_nor_as_gain(quiet: Judged) -> None:
    analysis, chooser = quiet.analysis, quiet.chooser
    emptied = analysis.plan_keeping({"blocks.1.mlp.0": [0]})
    (group,) = [g for g in analysis.groups if g.name == "blocks.1.mlp.0"]
    lost = float(chooser.scores[group.index][1:].sum())
    assert width_loss(chooser, emptied) == pytest.approx(lost)
    saved_at = partial(Savings, analysis.coupling, analysis.residuals, "macs")

    def order(loss: float) -> list[str]:
        losses = {b.name: 1e-3 * lost for b in analysis.branches} | {"blocks.1.mlp": loss}
        judge = PredictedLoss(chooser, analysis.residuals, saved_at, losses, lambda _: emptied)
        return [b.name for b in judge.ranked(analysis.branches)]

    assert order(lost)[0] == "blocks.1.mlp", "it is lost already"
    assert order(2 * lost)[-1] == "blocks.1.mlp", "hardly anything is saved"


# Time ---------------------------------------------------------------------------------------------


def clockwork(
    monkeypatch: pytest.MonkeyPatch, aside: float = 0.0, off: float = 1.1, power: float = 1.0
) -> None:
    """A machine whose seconds are MACs, of which its model says less.

    Args:
        monkeypatch: Puts it in the place of this one.
        aside: Seconds of each branch beside its MACs, as a share of those of all MACs; the model
            takes them for what stays.
        off: Measured over predicted seconds.
        power: Of the predicted share of the dense seconds, which is measured.
    """

    class Clock:
        dense = None

        def __init__(self, dense: nn.Module, inputs: Tensor, *_: Any, **__: Any) -> None:
            whole = count_macs(dense, inputs)

            def seconds(model: nn.Module) -> float:
                branches = len(depcut.analyze(model, inputs).branches) if aside else 0
                return float(count_macs(model, inputs) + aside * whole * branches)

            self.seconds, self.whole = seconds, seconds(dense)

        def written(self, slim: nn.Module) -> nn.Module:
            return slim

        def beside(self, slim: nn.Module | None, _: int) -> Beside:
            share = 1.0 if slim is None else off * (self.seconds(slim) / self.whole) ** power
            return Beside(share, self.whole)

    def modelled(analysis: Analysis, **_: Any) -> LatencyModel:
        cost = analysis.costs["macs"]
        cost = cost.less(-aside * cost.total * len(analysis.branches))
        return LatencyModel(
            analysis.coupling, cost, cost.total, np.zeros(1), 1.0, 1.0, 1, "none", "none"
        )

    monkeypatch.setattr(workload, "Bench", Clock)
    monkeypatch.setattr(Analysis, "latency", modelled)


def test_branches_go_for_a_budget_of_time(quiet: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    monkeypatch.setattr(target, "_TRIES", 2)
    plan = quiet.analysis.plan(
        0.5, of="latency", data=quiet.data, align=1, depth=True, progress=False
    )
    assert plan.dropped
    assert IDLE.issuperset(plan.dropped)
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.05)


@pytest.mark.parametrize(
    ("ratio", "aside"),
    [(0.6, 0.2), pytest.param(0.7, 0.3, marks=pytest.mark.sweep)],
)
def test_what_a_branch_takes_along_is_measured(
    quiet: Judged, monkeypatch: pytest.MonkeyPatch, ratio: float, aside: float
) -> None:
    # Most of what a branch takes is not in the kernels of its own widths.
    clockwork(monkeypatch, aside=aside, off=1.0)
    plan = quiet.analysis.plan(
        ratio, of="latency", data=quiet.data, align=1, depth=True, progress=False
    )
    assert set(plan.dropped) == IDLE
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx((1 - ratio) * facts["dense_ms"], rel=0.015)
    assert facts["predicted_ms"] == pytest.approx(facts["measured_ms"], rel=0.03)
    assert facts["candidates"] == 1, "the first was right"


def test_a_time_is_met_between_what_was_too_fast_and_what_was_too_slow(
    quiet: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Corrected by what the last one missed alone, candidates would swing about the target.
    clockwork(monkeypatch, off=1.0, power=3.0)
    plan = quiet.analysis.plan(0.5, of="latency", data=quiet.data, align=1, progress=False)
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.03)


def test_a_candidate_that_is_close_by_chance_is_not_taken(
    quiet: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork(monkeypatch, off=1.2)
    rounds: list[int] = []
    measured = workload.Benches.beside

    def lucky(self: workload.Benches, slim: Any, count: int) -> workload.Together:
        found = measured(self, slim, count)
        rounds.append(count)
        # The first candidate is a sixth too slow, which its first measurement does not show.
        return replace(found, ratio=found.ratio / 1.2) if len(rounds) == 2 else found

    monkeypatch.setattr(workload.Benches, "beside", lucky)
    plan = quiet.analysis.plan(0.5, of="latency", data=quiet.data, align=1, progress=False)
    facts = plan.settings["latency"]
    assert facts["candidates"] > 1
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.015)
    assert rounds[-1] > rounds[1], "the one that is taken is measured more often"
