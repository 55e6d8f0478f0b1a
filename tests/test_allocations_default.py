"""What is left of each width where a ratio is asked for, and weights are all there is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from nets import normal, seeded
from test_allocate import analysis_of, count, group, kept_counts
from torch import Tensor, nn

import depcut
from depcut.allocate.shared import readers


class Stack(nn.Module):
    """Residual blocks of two layers; as many read the stream as there are blocks, and the head."""

    def __init__(self, blocks: int = 4, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width)
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@functools.cache
def stack() -> Any:
    return depcut.analyze(seeded(Stack, 0), normal(2, 6))


def test_readers_are_the_activations_that_weights_multiply() -> None:
    found = readers(stack().coupling)
    assert found[group(stack(), "embed").index] == 5
    assert sorted(found) == [1, 1, 1, 1, 5]
    shared = analysis_of("sdpa")  # queries, keys and values read one activation
    assert readers(shared.coupling)[group(shared, "embed").index] == 3


@pytest.mark.parametrize("score", ["magnitude", "l1", "random"])
def test_what_all_layers_read_goes_last(score: str) -> None:
    plan = stack().plan(0.5, align=1, score=score)
    assert plan.settings["allocation"] == "global"
    stream = group(stack(), "embed")
    assert count(plan, stream) == stream.size
    inner = [n for name, n in kept_counts(stack(), plan).items() if name != stream.name]
    assert max(inner) < 0.6 * 96


def test_what_all_layers_read_goes_where_the_budget_needs_it() -> None:
    plan = stack().plan(0.95, align=1)
    assert abs(plan.missed or 0.0) < 0.005
    assert count(plan, group(stack(), "embed")) < 32


def test_losses_that_add_up_are_not_weighed_by_readers() -> None:
    def loss(coupling: Any, model: nn.Module, seed: int) -> list[Any]:
        return [torch.arange(1.0, g.size + 1).numpy() for g in coupling.groups]

    loss.additive = True  # type: ignore[attr-defined]
    plan = stack().plan(0.5, align=1, score=loss)
    assert count(plan, group(stack(), "embed")) < 32


def test_half_of_the_channels_is_half_of_those_of_each_layer() -> None:
    analysis = analysis_of("transformer")  # whose code allows both
    plan = analysis.plan(0.5, of="channels", align=1)
    heads, features = group(analysis, "attention.q", 8), group(analysis, "attention.q", 16)
    assert count(plan, heads) * count(plan, features) == pytest.approx(64, abs=10)
    assert count(plan, heads) < 8
    assert count(plan, features) < 16
    for layer in ("embed", "mlp.up"):
        g = group(analysis, layer)
        assert count(plan, g) == pytest.approx(g.size / 2, abs=3)
