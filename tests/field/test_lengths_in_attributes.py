"""An attribute that is a width in one line and a length in another keeps its value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import normal, seeded
from torch import Tensor, nn

import depcut

WIDTH = 16


class Cropped(nn.Module):
    """`n` is the width of the hidden layer and the longest sequence."""

    def __init__(self, crop: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.n, self.crop = WIDTH, crop
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.n:
            x = self.crop(x, self.n)
        hidden = self.first(x).reshape(-1, x.shape[1], self.n)
        return self.second(hidden.relu())


class Smallest(Cropped):
    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : min(x.shape[1], self.n)]
        return self.second(self.first(x).reshape(-1, x.shape[1], self.n).relu())


class Checked(Cropped):
    """A check of the width, which must pass at the new one."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.shape[-1] != self.n:
            raise ValueError("another width")
        return self.second(hidden.reshape(*x.shape[:2], self.n).relu())


def head(x: Tensor, n: int) -> Tensor:
    return x[:, :n]


def dead_half(kind: type[Cropped]) -> Cropped:
    """The second half of the hidden units gives nothing, so that the smaller model is equal."""
    model = seeded(lambda: kind(head), 0)
    with torch.no_grad():
        model.second.weight[:, WIDTH // 2 :] = 0
    return model


@pytest.mark.parametrize("kind", [Cropped, Smallest, Checked])
def test_the_length_stays_and_the_width_shrinks(kind: type[Cropped]) -> None:
    model = dead_half(kind)
    analysis = depcut.analyze(model, normal(2, 5, 6))
    [group] = [g for g in analysis.groups if g.size == WIDTH]
    slim = analysis.plan_keeping({group.name: list(range(WIDTH // 2))}).apply(model)
    assert slim.first.out_features == WIDTH // 2
    assert slim.n == (WIDTH // 2 if kind is Checked else WIDTH)
    assert set(depcut.report(slim).patched) == (set() if kind is Checked else {""})
    assert depcut.report(slim).generated == {}
    for length in (3, 5, 12, 16, 20):
        x = normal(3, length, 6)
        torch.testing.assert_close(slim(x), model(x))
