"""Operators whose kernels take widths of some multiple alone: groups keep such counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

import depcut

EXPERTS, OUTER, INNER = 3, 16, 24


class Routed(nn.Module):
    """Rows go to experts by their place, through torch's grouped product."""

    def __init__(self, product: Any, inner: int = INNER) -> None:
        super().__init__()
        self.product = product
        self.stem, self.head = nn.Linear(10, OUTER), nn.Linear(OUTER, 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, OUTER, inner) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, inner, OUTER) / 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x).flatten(0, 1)
        share = rows.shape[0] // EXPERTS
        ends = torch.arange(share, rows.shape[0] + 1, share, dtype=torch.int32)
        hidden = self.product(rows, self.up, offs=ends).relu()
        rows = rows + self.product(hidden, self.down, offs=ends)
        return self.head(rows).unflatten(0, (x.shape[0], x.shape[1]))


@pytest.fixture
def product() -> Any:
    """Torch's own is captured in bfloat16 alone; transformers' computes by it, captured in any."""
    zoo.libraries()
    from transformers.integrations import moe

    return moe._grouped_mm


@pytest.fixture
def model(product: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Routed(product).eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))


def counts(plan: depcut.Plan) -> dict[str, int]:
    return {name: len(units) for name, units in plan.kept.items()}


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_choice_is_a_multiple(
    model: nn.Module, inputs: Tensor, ratio: float, allocation: str
) -> None:
    plan = depcut.analyze(model, inputs).plan(
        ratio, score="magnitude", allocation=allocation, align=1
    )
    assert counts(plan)
    assert all(count % 8 == 0 for count in counts(plan).values())
    slim = plan.apply(model, compensate=False, progress=False)
    assert type(slim) is Routed
    for size in ((2, 6, 10), (3, 4, 10)):
        later = torch.randn(size)
        with plan.masked(model):
            wanted = model(later)
        torch.testing.assert_close(slim(later), wanted)
    assert torch.isfinite(copy.deepcopy(slim).bfloat16()(inputs.bfloat16())).all()


def test_ratios_of_layers_are_rounded_up(model: nn.Module, inputs: Tensor) -> None:
    plan = depcut.analyze(model, inputs).plan(0.3, ratios={"up": 0.5}, score="magnitude", align=1)
    assert counts(plan)["up"] == 16


def test_other_counts_are_refused(model: nn.Module, inputs: Tensor) -> None:
    analysis = depcut.analyze(model, inputs)
    with pytest.raises(depcut.PlanError) as caught:
        analysis.plan_keeping({"up": list(range(20))})
    assert str(caught.value) == (
        "20 units are kept, no multiple of 8\n"
        "  where: group 'up'\n"
        "  to do: keep a multiple of 8: an operator takes no other widths"
    )


@pytest.mark.parametrize(("dead", "gone"), [(3, 0), (9, 8), (24, 16)])
def test_dead_units_go_in_multiples(model: nn.Module, inputs: Tensor, dead: int, gone: int) -> None:
    with torch.no_grad():
        model.down[:, :dead] = 0.0
    found = depcut.compaction(model, inputs)
    assert found.removed.get("up", 0) == gone
    [stuck] = [stuck for stuck in found.stuck if stuck.group == "up"]
    assert (len(stuck.units), stuck.reason) == (dead - gone, "a multiple of 8 must stay")


def test_of_a_width_that_is_none_half_the_multiple_stays(product: Any, inputs: Tensor) -> None:
    model = Routed(product, inner=20).eval()
    plan = depcut.analyze(model, inputs).plan(0.3, score="magnitude", align=1)
    assert counts(plan)["up"] % 4 == 0
    assert plan.apply(model, progress=False)(inputs).shape == (2, 6, 4)


def test_torchs_own_product_as_well(inputs: Tensor) -> None:
    model, inputs = Routed(functional.grouped_mm).eval().bfloat16(), inputs.bfloat16()
    plan = depcut.analyze(model, inputs).plan(0.4, score="magnitude", align=1)
    assert counts(plan)
    assert all(count % 8 == 0 for count in counts(plan).values())
    assert plan.apply(model, compensate=False, progress=False)(inputs).shape == (2, 6, 4)
