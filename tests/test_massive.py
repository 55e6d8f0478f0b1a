"""Massive activations: a few values a thousand times larger than all others, as LLMs have them."""

from __future__ import annotations

import pytest
import torch
from nets import seeded
from torch import Tensor, nn

import depcut
from depcut.calibration.levels import level
from depcut.scores import score

SIZE, HIDDEN, WORDS = 16, 32, 12
MASSIVE = 5  # the hidden unit that fires at the first token alone


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, HIDDEN), nn.Linear(HIDDEN, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Words(nn.Module):
    """A stream of tokens of which the first is a special direction, and blocks that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, SIZE), nn.Parameter(torch.zeros(WORDS, SIZE))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, 6)
        with torch.no_grad():
            self.place[0, 0] = 30
            for block in self.blocks:
                block.up.weight.mul_(3)  # type: ignore[union-attr, operator]
            unit = self.blocks[0].up.weight[MASSIVE].zero_()  # type: ignore[union-attr, index]
            unit[0] = 400
            self.blocks[0].up.bias[MASSIVE] = -1000  # type: ignore[union-attr, index]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.place)))


def texts(number: int) -> Tensor:
    return torch.randn(24, WORDS, 8, generator=torch.Generator().manual_seed(number))


def test_a_massive_activation_does_not_drown_the_damping_of_the_others() -> None:
    """The other units of its layer lose what they lose in a net in which it never fires."""
    found = []
    for fires in (True, False):
        model = seeded(Words, 0).eval()
        with torch.no_grad():
            model.place[0, 0] = 30.0 if fires else 0.0
            hidden = model.blocks[0].up(model.blocks[0].norm(model.embed(texts(0)) + model.place))
            assert (float(hidden[:, 0, MASSIVE].median()) > 300) == fires
        analysis = depcut.analyze(model, texts(0)[:2])
        data = analysis.calibrate([texts(i) for i in range(4)], progress=False)
        scores = score("obs", analysis.coupling, model, 0, data)
        (group,) = [g for g in analysis.groups if g.name == "blocks.0.up"]
        others = torch.from_numpy(scores[group.index])[torch.arange(HIDDEN) != MASSIVE]
        found.append(float(others.min()))
    with_it, without = found
    assert with_it < 4 * without


def test_a_level_without_outliers_is_the_mean() -> None:
    squares = torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(level(squares), squares.mean(1))
    assert torch.equal(level(torch.zeros(1, 4)), torch.zeros(1))


@pytest.mark.parametrize("massive", [1, 4])
def test_a_level_is_that_of_the_others(massive: int) -> None:
    squares = torch.ones(1, 64, dtype=torch.float64)
    squares[0, :massive] = 1e9
    # Each of them counts as ten times the level itself.
    assert float(level(squares)) == pytest.approx((64 - massive) / (64 - 10 * massive), rel=1e-3)


def test_many_large_inputs_are_no_outliers() -> None:
    squares = torch.ones(1, 40, dtype=torch.float64)
    squares[0, :20] = 1e6
    assert torch.equal(level(squares), squares.mean(1))
