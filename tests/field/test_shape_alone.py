"""Values that nothing computes with, and what later calls do with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depcut

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Positions(nn.Module):
    """Reads the shape of what it gets, or also its values."""

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.randn(4)), values

    def forward(self, given: Tensor) -> Tensor:
        return self.weight.expand(given.shape[0], 4)


class Strict(Positions):
    """Takes a value in a branch that the example does not run."""

    def forward(self, given: Tensor) -> Tensor:
        out = self.weight.expand(given.shape[0], 4)
        if self.values:
            out = out + given[:, None]
        return out


class Selecting(nn.Module):
    """Selects the first of the hidden units, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)
        kind = Strict if way == "argument" else Positions
        self.positions, self.way = kind(values=False), way

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        if self.way == "shape":
            return self.b(h) + h[:, 0].shape[0]
        if self.way == "variable":
            first = h[:, 0]
            y = self.b(h)
            return y if extra is None else y + first[:, None] * extra
        return self.b(h) + self.positions(h[:, 0])


@pytest.mark.parametrize(
    ("way", "units"), [("shape", 32), ("passed", 32), ("argument", 31), ("variable", 31)]
)
def test_what_is_selected_stays_unless_its_shape_alone_is_read(way: str, units: int) -> None:
    (group,) = depcut.analyze(Selecting(way), X).groups
    assert group.size == units


def test_a_selected_unit_is_there_in_later_calls() -> None:
    net = Selecting("variable").eval()
    with torch.no_grad():
        net.a.weight[0] *= 1e-3  # the least unit of all
        net.a.bias[0] = 0.05
        net.b.weight[:, 0] = 0
    slim = depcut.shrink(net, 0.5, X)
    extra = torch.ones(4, 1)
    with torch.no_grad():
        torch.testing.assert_close(slim(X, extra) - slim(X), net(X, extra) - net(X))
