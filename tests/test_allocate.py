"""Budgets met, widths aligned, nothing collapsed, and what goes first."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from nets import MLP, Head, conv, normal, seeded
from oracle import families
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut
from depcut.errors import BudgetError
from depcut.plan.preferences import preferences

# Nets that are wide enough for a budget to be met within a percent --------------------------------


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 32), conv(32, 48), conv(48, 64), Head(64))


class Blocks(nn.Module):
    """Residual blocks, one of them with grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 40)
        self.plain = nn.Sequential(conv(40, 56), conv(56, 40))
        self.grouped = nn.Sequential(conv(40, 48, 1), conv(48, 48, groups=6), conv(48, 40, 1))
        self.head = Head(40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.plain(x)
        return self.head(x + self.grouped(x))


class Attention(nn.Module):
    """Heads of equal query, key and value size, from one attribute."""

    def __init__(self, width: int = 64, heads: int = 8, size: int = 16, sdpa: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.sdpa = heads, size, sdpa
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.size)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, sdpa: bool = False) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 64), Attention(sdpa=sdpa)
        self.norm, self.mlp, self.head = nn.LayerNorm(64), MLP(64, 96), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.mlp(x))


class Chunks(nn.Module):
    """Halves that a chunk keeps equal, and that different layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 64)
        self.left, self.right, self.head = conv(32, 24), conv(32, 40), Head(64)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([self.left(a), self.right(b)], 1))


MODELS = {
    "chain": (Chain, (2, 3, 8, 8)),
    "blocks": (Blocks, (2, 3, 8, 8)),
    "transformer": (Transformer, (2, 7, 6)),
    "sdpa": (functools.partial(Transformer, sdpa=True), (2, 7, 6)),
    "chunks": (Chunks, (2, 3, 8, 8)),
}


def analysis_of(name: str) -> Any:
    return _analysed(name)


@functools.cache
def _analysed(name: str) -> Any:
    make, shape = MODELS[name]
    return depcut.analyze(seeded(make, 0), normal(*shape))


def count(plan: Any, g: Any) -> int:
    """How many units a group keeps (in each row, where rows keep different ones)."""
    return int(plan.kept[g.name].shape[-1]) if g.name in plan.kept else g.size


def kept_counts(analysis: Any, plan: Any) -> dict[str, int]:
    return {g.name: count(plan, g) for g in analysis.groups}


def cost_of(analysis: Any, plan: Any, of: str) -> float:
    counts = kept_counts(analysis, plan)
    return float(analysis.costs[of](np.array([counts[g.name] for g in analysis.groups])))


def group(analysis: Any, layer: str, *sizes: int) -> Any:
    """The one group (of one of these sizes) that narrows a layer's output."""
    found = [g for g in analysis.groups if layer in g.layers and (not sizes or g.size in sizes)]
    assert len(found) == 1, found
    return found[0]


def linear_chain(*widths: int) -> Any:
    layers = [nn.Linear(a, b) for a, b in zip((6, *widths), (*widths, 5), strict=True)]
    return depcut.analyze(seeded(lambda: nn.Sequential(*layers), 0), normal(2, 6))


# Budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("of", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", ["chain", "blocks", "transformer", "sdpa", "chunks"])
def test_an_unaligned_budget_is_met_within_a_percent(name: str, of: str, allocation: str) -> None:
    analysis = analysis_of(name)
    for ratio in (0.1, 0.3, 0.5, 0.7, 0.9):
        plan = analysis.plan(ratio, of=of, align=1, allocation=allocation)
        assert cost_of(analysis, plan, of) / analysis.costs[of].total == pytest.approx(
            1 - ratio, abs=0.01
        )


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_an_aligned_budget_is_met_within_one_step(of: str, allocation: str) -> None:
    analysis = analysis_of("chain")
    cost = analysis.costs[of]
    for ratio in (0.2, 0.5, 0.8):
        plan = analysis.plan(ratio, of=of, align=8, allocation=allocation)
        counts = np.array(list(kept_counts(analysis, plan).values()))
        missed = abs(cost(counts) - (1 - ratio) * cost.total)
        steps = [abs(cost(counts + 8 * unit) - cost(counts)) for unit in np.eye(len(counts))]
        assert missed <= max(steps)


def test_the_budget_is_of_what_is_named() -> None:
    analysis = analysis_of("blocks")
    plans = {of: analysis.plan(0.5, of=of, align=1) for of in ("macs", "params", "channels")}
    assert plans["macs"].macs / analysis.macs == pytest.approx(0.5, abs=0.01)
    assert plans["params"].params / analysis.params == pytest.approx(0.5, abs=0.01)
    kept = kept_counts(analysis, plans["channels"])
    for layer in ("stem.0", "plain.0.0"):  # the widths of grouped convolutions are coarse
        g = group(analysis, layer)
        assert kept[g.name] == pytest.approx(g.size / 2, rel=0.25)
    assert plans["channels"].macs / analysis.macs < 0.35


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", ["chain", "transformer"])
def test_more_goes_at_a_higher_ratio(name: str, allocation: str) -> None:
    analysis = analysis_of(name)
    for align in (1, 8):
        plans = [
            analysis.plan(ratio, align=align, allocation=allocation)
            for ratio in np.linspace(0.1, 0.9, 9)
        ]
        macs = [plan.macs for plan in plans]
        assert macs == sorted(macs, reverse=True)
        assert len(set(macs)) == len(macs)


# Widths ------------------------------------------------------------------------------------------


def test_kept_widths_are_aligned_where_the_width_allows() -> None:
    divisors = {64: 8, 48: 8, 16: 8, 24: 8, 20: 4, 12: 4, 10: 2, 9: 1, 7: 1}
    analysis = linear_chain(*divisors)
    for ratio in (0.25, 0.5, 0.75):
        for allocation in ("uniform", "global"):
            plan = analysis.plan(ratio, of="params", allocation=allocation)
            for g in analysis.groups:
                assert count(plan, g) % divisors[g.size] == 0
    narrowed = [analysis.groups[i].size for i in range(len(divisors))]
    assert set(narrowed) == set(divisors)


@pytest.mark.parametrize("align", [1, 4, 16])
def test_other_alignments(align: int) -> None:
    analysis = linear_chain(64, 96, 128)
    plan = analysis.plan(0.5, of="params", align=align)
    counts = kept_counts(analysis, plan).values()
    assert all(n % align == 0 for n in counts)
    assert any(n % (2 * align) for n in counts)


def test_heads_are_units_whatever_the_alignment() -> None:
    analysis = analysis_of("sdpa")
    heads = group(analysis, "attention.q", 8)
    counts = {count(analysis.plan(r, align=8), heads) for r in np.linspace(0.05, 0.9, 18)}
    assert any(n % 2 for n in counts)


def test_groups_of_a_convolution_are_units() -> None:
    analysis = analysis_of("blocks")
    groups = group(analysis, "grouped.1.0", 6)
    plan = analysis.plan(0.5, of="channels")
    assert count(plan, groups) == 4
    slim = plan.apply(analysis.model)
    layer = slim.grouped[1][0]
    assert layer.groups == 4
    assert layer.out_channels % 4 == 0


def test_heads_of_a_small_size_keep_the_width_aligned() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 64), Attention(64, 16, 4, sdpa=True)), 0)
    analysis = depcut.analyze(nn.Sequential(model, nn.Linear(64, 5)).eval(), normal(2, 7, 6))
    heads = group(analysis, "0.1.q", 16)
    for ratio in (0.2, 0.4, 0.6, 0.8):
        assert count(analysis.plan(ratio), heads) % 2 == 0


def test_ties_keep_equal_counts() -> None:
    analysis = analysis_of("chunks")
    [tied] = [family for family in families(analysis) if len(family) > 1]
    for allocation in ("uniform", "global"):
        for align in (1, 8):
            counts = kept_counts(analysis, analysis.plan(0.5, align=align, allocation=allocation))
            assert len({counts[g.name] for g in tied}) == 1
            assert counts[tied[0].name] < 32


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", ["chain", "blocks", "transformer"])
def test_no_layer_collapses(name: str, allocation: str) -> None:
    analysis = analysis_of(name)
    for align in (1, 8):
        counts = kept_counts(analysis, analysis.plan(0.95, align=align, allocation=allocation))
        assert min(counts.values()) >= 1
        whole_widths = [g for g in analysis.groups if "[" not in g.name]
        assert len(whole_widths) >= 2
        assert all(align <= counts[g.name] < g.size for g in whole_widths)


def test_a_layer_without_score_keeps_a_unit() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 5)).eval()
    analysis = depcut.analyze(model, normal(2, 6))

    def nothing_in_the_first(coupling: Any, model: nn.Module, seed: int) -> Any:
        return [np.full(g.size, 1e-12 if g.index == 0 else 1.0) for g in coupling.groups]

    plan = analysis.plan(0.9, of="params", align=1, score=nothing_in_the_first, allocation="global")
    assert all(count(plan, g) >= 1 for g in analysis.groups)
    aligned = analysis.plan(0.6, of="params", score=nothing_in_the_first, allocation="global")
    assert count(aligned, analysis.groups[0]) >= 8


# What goes first ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
def test_uniform_takes_the_same_share_everywhere(of: str) -> None:
    analysis = linear_chain(64, 96, 128, 32)
    for ratio in (0.2, 0.5, 0.8):
        plan = analysis.plan(ratio, of=of, align=1, allocation="uniform")
        counts = kept_counts(analysis, plan)
        shares = [counts[g.name] / g.size for g in analysis.groups]
        # Single steps at the end meet the budget more closely.
        assert max(shares) - min(shares) < 5 / 32
        sizes = np.array([g.size for g in analysis.groups])
        assert sum(abs(shares - np.median(shares)) * sizes > 1) <= 1


class Parallel(nn.Module):
    """Two like branches, so that nothing but their weights tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(x).relu(), self.right(x).relu()], -1))


def with_small_units(weak: list[int]) -> Any:
    """All units of equal norm but `weak` ones on the right."""
    model = Parallel().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
        model.right.weight[weak] = 1e-3
        model.right.bias[weak] = 1e-3
        model.out.weight[:, [32 + i for i in weak]] = 1e-3
    return depcut.analyze(model, normal(2, 6))


@pytest.mark.parametrize("score", ["l1", "l2"])
def test_global_removes_the_units_of_low_score(score: str) -> None:
    weak = [0, 3, 4, 9, 11, 17, 20, 21, 22, 23, 25, 26, 28, 29, 30, 31]
    analysis = with_small_units(weak)
    plan = analysis.plan(0.25, of="params", align=1, score=score, allocation="global")
    left, right = group(analysis, "left"), group(analysis, "right")
    assert left.name not in plan.kept
    assert plan.kept[right.name].tolist() == [i for i in range(32) if i not in weak]


def test_uniform_ranks_within_a_group_only() -> None:
    weak = list(range(16, 32))
    analysis = with_small_units(weak)
    plan = analysis.plan(0.25, of="params", align=1, allocation="uniform")
    left, right = group(analysis, "left"), group(analysis, "right")
    assert count(plan, left) == count(plan, right) == 24
    assert plan.kept[right.name].tolist() == list(range(24))[:16] + list(range(16, 24))
    assert plan.kept[left.name].tolist() == list(range(24))


def test_global_prefers_what_costs_more_at_equal_score() -> None:
    model = nn.Sequential(
        nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(5, 64), nn.Linear(64, 5)
    ).eval()
    analysis = depcut.analyze(model, normal(2, 6))

    def equal(coupling: Any, model: nn.Module, seed: int) -> Any:
        return [np.ones(g.size) for g in coupling.groups]

    plan = analysis.plan(0.3, of="params", align=1, score=equal, allocation="global")
    counts = kept_counts(analysis, plan)
    assert counts[group(analysis, "1").name] < counts[group(analysis, "3").name]


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        (["left"], {"left"}),
        (["left.weight"], {"left"}),
        ("right", {"right"}),
        (["ri*t"], {"right"}),
    ],
)
def test_named_widths_stay(keep: Any, layers: set[str]) -> None:
    analysis = with_small_units([1])
    plan = analysis.plan(0.3, of="params", align=1, ignore=keep)
    assert {n for n in ("left", "right") if group(analysis, n).name not in plan.kept} == layers
    assert plan.params / analysis.params == pytest.approx(0.7, abs=0.02)


def test_names_that_hold_every_width_leave_nothing_to_remove() -> None:
    with pytest.raises(BudgetError):
        with_small_units([1]).plan(0.3, of="params", align=1, ignore=["[lr]*t.bias"])


def test_a_module_name_keeps_all_that_its_children_produce() -> None:
    analysis = analysis_of("blocks")
    plan = analysis.plan(0.1, ignore=["plain"], align=1)
    slim = plan.apply(analysis.model)
    for name in ("plain.0.0", "plain.1.0", "stem.0"):
        dense = analysis.model.get_submodule(name).out_channels
        assert slim.get_submodule(name).out_channels == dense
    assert slim.grouped[0][0].out_channels < 48


def test_a_group_name_keeps_one_factor_of_a_width() -> None:
    analysis = analysis_of("transformer")
    heads = group(analysis, "attention.q", 8)
    for name in (heads.name, heads.name.replace("[", "[[]")):
        plan = analysis.plan(0.5, ignore=[name], align=1)
        assert heads.name not in plan.kept
    assert plan.macs / analysis.macs == pytest.approx(0.5, abs=0.01)


def test_ratios_by_glob_are_exact_and_the_rest_meets_the_budget() -> None:
    analysis = linear_chain(64, 96, 128, 32)
    plan = analysis.plan(0.5, align=1, of="params", ratios={"0": 0.25, "[3]": 0.0})
    counts = kept_counts(analysis, plan)
    assert counts[group(analysis, "0").name] == 48
    assert counts[group(analysis, "3").name] == 32
    assert plan.params / analysis.params == pytest.approx(0.5, abs=0.01)


def test_a_ratio_for_one_of_several_ties_holds_for_all() -> None:
    analysis = analysis_of("chunks")
    [tied] = [family for family in families(analysis) if len(family) > 1]
    plan = analysis.plan(0.5, align=1, ratios={tied[0].name.replace("[", "[[]"): 0.25})
    assert {count(plan, g) for g in tied} == {24}


# Preferences -------------------------------------------------------------------------------------


def test_one_attribute_for_two_axes_keeps_them_equal() -> None:
    analysis = analysis_of("transformer")
    key, value = (group(analysis, layer, 16) for layer in ("attention.k", "attention.v"))
    assert key is not value
    assert tuple(sorted((key.index, value.index))) in preferences(analysis.coupling).ties
    for allocation in ("uniform", "global"):
        plan = analysis.plan(0.6, align=1, allocation=allocation)
        counts = kept_counts(analysis, plan)
        assert counts[key.name] == counts[value.name] < 16
        slim = plan.apply(analysis.model)
        assert depcut.report(slim).generated == {}


def test_an_equality_is_given_up_when_the_budget_demands_it() -> None:
    analysis = analysis_of("transformer")
    key, value = (group(analysis, layer, 16) for layer in ("attention.k", "attention.v"))
    heads = group(analysis, "attention.k", 8)
    names = [g.name for g in (value, heads, group(analysis, "embed"), group(analysis, "mlp.up"))]
    plan = analysis.plan(0.1, align=1, ignore=[n.replace("[", "[[]") for n in names])
    assert set(plan.kept) == {key.name}
    slim = plan.apply(analysis.model)
    assert "attention" in depcut.report(slim).patched


def test_an_implicit_scale_holds_the_head_size_while_heads_can_go() -> None:
    analysis = analysis_of("sdpa")
    key, heads = group(analysis, "attention.k", 16), group(analysis, "attention.k", 8)
    assert key.index in preferences(analysis.coupling).holds
    plan = analysis.plan(0.7, align=1)
    assert key.name not in plan.kept
    assert count(plan, heads) < 8
    slim = plan.apply(analysis.model)
    assert depcut.report(slim).generated == {}


def test_an_implicit_scale_is_pinned_when_the_budget_demands_it() -> None:
    analysis = analysis_of("sdpa")
    key, heads = group(analysis, "attention.k", 16), group(analysis, "attention.k", 8)
    names = [g.name for g in (heads, group(analysis, "embed"), group(analysis, "mlp.up"))]
    plan = analysis.plan(0.2, align=1, ignore=[n.replace("[", "[[]") for n in names])
    assert count(plan, key) < 16
    slim = plan.apply(analysis.model)
    assert set(depcut.report(slim).patched) == {"attention"}
    assert "scale=0.25" in depcut.report(slim).patched["attention"]


# Repeatability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_equal_seeds_make_equal_plans(allocation: str) -> None:
    analysis = analysis_of("blocks")

    def digest(seed: int) -> str:
        return analysis.plan(0.5, score="random", seed=seed, allocation=allocation).digest

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


def test_magnitude_does_not_depend_on_the_seed() -> None:
    analysis = analysis_of("chain")
    assert analysis.plan(0.5, seed=1).digest == analysis.plan(0.5, seed=2).digest
