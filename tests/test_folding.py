"""Plans that remove constant units: without data, their constants go into the next bias."""

from __future__ import annotations

import torch
from torch import nn

import depcut


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        model[0].weight[[2, 7]] = 0.0
        model[0].bias[[2, 7]] = torch.tensor([1.5, 0.7])
    return model


def test_constant_units_that_go_are_folded_into_the_next_bias() -> None:
    model, x = net(), torch.randn(4, 5)
    analysis = depcut.analyze(model, x)
    kept = {analysis.groups[0].name: [u for u in range(12) if u not in (2, 7)]}
    plan = analysis.plan_keeping(kept)
    folded, plain = plan.apply(model), plan.apply(model, compensate=False)
    torch.testing.assert_close(folded(x), model(x))
    assert float((plain(x) - model(x)).detach().abs().max().item()) > 0.1


def test_of_several_units_only_the_constant_ones_are_folded() -> None:
    model, x = net(), torch.randn(4, 5)
    analysis = depcut.analyze(model, x)
    plan = analysis.plan_keeping({analysis.groups[0].name: [0, 1, 3, 4]})
    with torch.no_grad():
        hidden = model[1](model[0](x))
        hidden[:, [5, 6, 8, 9, 10, 11]] = 0.0
        expected = model[2](hidden)
    torch.testing.assert_close(plan.apply(model)(x), expected)


def test_nothing_is_folded_where_no_row_is_zero() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3)).eval()
    x = torch.randn(4, 5)
    plan = depcut.analyze(model, x).plan(0.5)
    torch.testing.assert_close(plan.apply(model)(x), plan.apply(model, compensate=False)(x))
