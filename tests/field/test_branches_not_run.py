"""Branches that no example call took and that name a width: an error by name, or patched too."""

from __future__ import annotations

import pytest
import torch
from nets import normal, seeded
from torch import Tensor, nn

import depcut
from depcut.errors import InputError


class Branching(nn.Module):
    """Without a flag, hidden units in four rows; with it, in eight, and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, twice: bool = False, thrice: bool = False) -> Tensor:
        hidden = self.first(x).view(-1, 16).relu()
        if twice:
            hidden = hidden[:, :16] * 2
        if thrice:
            hidden = hidden * 3
        return self.second(hidden)


def halved(inputs: object) -> tuple[nn.Module, nn.Module]:
    """The dense model, whose second half of units is dead, and the smaller one."""
    model = seeded(Branching, 0)
    with torch.no_grad():
        model.second.weight[:, 8:] = 0
    analysis = depcut.analyze(model, inputs)  # type: ignore[arg-type]
    [group] = [g for g in analysis.groups if g.size == 16]
    return model, analysis.plan_keeping({group.name: list(range(8))}).apply(model)


def test_a_branch_that_no_example_took_is_refused_where_it_names_the_width() -> None:
    x = normal(2, 6)
    model, slim = halved(x)
    torch.testing.assert_close(slim(x), model(x))
    torch.testing.assert_close(slim(x, thrice=True), model(x, thrice=True))
    with pytest.raises(InputError, match="16 in a branch of Branching"):
        slim(x, twice=True)
    assert "_depcut_not_run(" in depcut.report(slim).patched[""]


def test_with_an_example_of_it_the_branch_is_right() -> None:
    x = normal(2, 6)
    model, slim = halved([(x,), {"x": x, "twice": True}])
    torch.testing.assert_close(slim(x), model(x))
    torch.testing.assert_close(slim(x, twice=True), model(x, twice=True))
