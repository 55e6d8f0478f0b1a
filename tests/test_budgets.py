"""Budgets are spent: within half a percent, or as close as any combination of widths comes."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from nets import NETS, normal, seeded
from oracle import families
from selection import analysis_of, sampled, swept
from test_allocate import MODELS
from test_allocate import analysis_of as model_of
from torch import nn

import depcut
from depcut.errors import BudgetError
from depcut.plan.preferences import preferences

NEAR = 0.005
RATIOS = (0.1, 0.5, 0.7, 0.9)
MOST = 20_000  # combinations that the brute force tries
CRITERIA = ("magnitude", "random", "l1", "lamp")


@pytest.mark.parametrize("score", sampled(CRITERIA, ["magnitude"]))
@pytest.mark.parametrize("name", sampled(list(MODELS), ["blocks", "sdpa"]))
def test_every_unaligned_budget_is_spent(name: str, score: str) -> None:
    analysis, missed = model_of(name), {}
    for case in itertools.product(("macs", "params"), ("uniform", "global"), RATIOS):
        of, allocation, ratio = case
        plan = analysis.plan(ratio, of=of, align=1, allocation=allocation, score=score)
        missed[case] = abs(plan.missed or 0.0)
    assert len(missed) == 4 * len(RATIOS)
    assert {case: share for case, share in missed.items() if share > NEAR} == {}


def combinations(analysis: Any) -> np.ndarray[Any, Any] | None:
    """All counts that ties and the classes' own code allow, [rows, groups]; None: too many."""
    liked = preferences(analysis.coupling)
    equal = nx.Graph(liked.ties)
    equal.add_nodes_from(g.index for g in analysis.groups)
    for family in families(analysis):
        nx.add_path(equal, [g.index for g in family])
    classes = [sorted(c) for c in nx.connected_components(equal)]
    choices = []
    for members in classes:
        groups = [analysis.groups[i] for i in members]
        held = len({g.size for g in groups}) > 1 or not liked.holds.isdisjoint(members)
        least = groups[0].size if held else max(g.floor for g in groups)
        choices.append(range(least, groups[0].size + 1))
    if np.prod([float(len(c)) for c in choices]) > MOST:
        return None
    table = np.array(list(itertools.product(*choices)))
    counts = np.zeros((len(table), len(analysis.groups)), dtype=np.int64)
    for number, members in enumerate(classes):
        counts[:, members] = table[:, [number]]
    return counts


QUICK = ["index_slices", "transposed_grouped", "mlp_mixer"]
SLOW = [name for name in NETS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *swept(SLOW, 4)])
def test_a_budget_is_met_where_any_widths_meet_it(name: str) -> None:
    analysis = analysis_of(name)
    counts = combinations(analysis)
    if counts is None:
        pytest.skip("too many combinations for brute force")
    wrong = {}
    for case in itertools.product(("macs", "params"), ("uniform", "global"), (0.3, 0.5, 0.7)):
        of, allocation, ratio = case
        cost = analysis.costs[of]
        least = np.abs(cost.many(counts) / (cost.total * (1 - ratio)) - 1).min()
        with suppress(BudgetError):
            share = abs(analysis.plan(ratio, of=of, align=1, allocation=allocation).missed or 0.0)
            if share < least - 1e-9 or share > NEAR >= least:
                wrong[case] = share, least
    assert wrong == {}


class Coarse(nn.Module):
    """Groups of a convolution beside single channels: coarse and fine units."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 6, 5, groups=3), nn.ReLU(), nn.Conv2d(6, 40, 3))
        self.head = nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(x).mean((2, 3)))


def test_the_best_units_of_a_group_stay_when_a_budget_is_filled() -> None:
    analysis = depcut.analyze(seeded(Coarse, 0), normal(2, 3, 12, 12))
    orders = {g.name: np.random.default_rng(g.index).permutation(g.size) for g in analysis.groups}

    def ranks(coupling: Any, model: nn.Module, seed: int) -> Any:
        return [orders[g.name].astype(float) + 1 for g in coupling.groups]

    for ratio in (0.35, 0.6, 0.8):
        plan = analysis.plan(ratio, of="params", align=1, score=ranks)
        assert plan.kept
        for name, kept in plan.kept.items():
            best = np.sort(np.argsort(-orders[name])[: len(kept)])
            assert np.array_equal(kept, best)
        again = analysis.plan(ratio, of="params", align=1, score=ranks)
        assert again.digest == plan.digest


def test_a_budget_that_no_widths_meet_is_known() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)).eval()
    plan = depcut.analyze(model, normal(2, 8)).plan(0.4, align=1)
    assert plan.missed == pytest.approx(0.5 / 0.6 - 1)
    report = depcut.report(plan.apply(model))
    assert report.missed == pytest.approx(plan.missed)
    assert "-16.7% of the macs" in str(report)
    met = depcut.analyze(model, normal(2, 8)).plan(0.5, align=1)
    assert met.missed == 0
    assert "of the macs" not in str(depcut.report(met.apply(model)))


def test_a_plan_without_a_ratio_misses_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)).eval()
    plan = depcut.analyze(model, normal(2, 8)).plan_keeping({"0": [0, 2]})
    assert plan.missed is None
    assert depcut.report(plan.apply(model)).missed is None


def test_an_alignment_goes_before_the_rest_of_a_budget() -> None:
    analysis = model_of("chain")
    for ratio in (0.3, 0.6):
        plan = analysis.plan(ratio, align=8)
        assert all(len(kept) % 8 == 0 for kept in plan.kept.values())


def test_an_aligned_budget_is_passed_where_that_comes_closer() -> None:
    analysis = model_of("chain")
    missed = [analysis.plan(ratio, align=8).missed or 0.0 for ratio in np.linspace(0.1, 0.8, 15)]
    assert min(missed) < 0 < max(missed)
