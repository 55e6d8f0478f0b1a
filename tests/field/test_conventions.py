"""Adapters of libraries have the last word on a smaller model's attributes."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import depcut
from depcut.plan.keep import Keep
from depcut.support import conventions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)
        self.width = 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def test_an_adapter_finishes_models_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(slim: nn.Module, dense: nn.Module, keep: Keep) -> list[str]:
        assert isinstance(dense, Net)
        assert keep.units
        slim.width = slim.first.out_features  # type: ignore[assignment, union-attr]
        return ["width follows first"]

    loaders = {
        __name__.partition(".")[0]: lambda: types.SimpleNamespace(finish=finish),
        "another library": lambda: pytest.fail("not a model of this one"),
    }
    monkeypatch.setattr(conventions, "_LOADERS", loaders)
    net = Net().eval()
    slim = depcut.shrink(net, 0.5, torch.randn(2, 4))
    assert slim.width == slim.first.out_features == 8
    assert net.width == 16
    assert "width follows first" in depcut.report(slim).notes
