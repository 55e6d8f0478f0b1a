"""Branches that the example call does not run: the report names what stays as wide as it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import depcut


class Branches(nn.Module):
    """One trunk, an early exit, and heads that are chosen by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.exit = nn.Linear(6, 16), nn.Linear(16, 4)
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)) for name in "ab"}
        )
        self.eval()

    def forward(self, x: Tensor, which: str = "a", early: bool = False) -> Tensor:
        hidden = torch.relu(self.trunk(x))
        return self.exit(hidden) if early else self.heads[which](hidden)


def test_the_report_names_layers_that_no_example_reached() -> None:
    slim = depcut.shrink(Branches(), 0.4, torch.randn(3, 6))
    found = depcut.report(copy.deepcopy(slim))
    assert found.unreached == ("exit", "heads.b.0", "heads.b.2")
    assert "not reached by the example inputs, left as wide as it was: exit" in str(found)
    assert slim.heads["b"][0].in_features == 16


def test_a_report_on_a_model_without_branches_names_none() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    assert depcut.report(depcut.shrink(model, 0.4, torch.randn(3, 6))).unreached == ()
