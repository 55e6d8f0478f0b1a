"""The recipes of CONTRIBUTING.md are run: one file each is enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.branches import find
from depcut.errors import InputError
from depcut.scores.context import CRITERIA, criterion
from depcut.timing.backends import RUNTIMES, runtime
from depcut.timing.bench import bench

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def recipe(file: str) -> dict[str, Any]:
    """Run the code that stands for a file, and give back its names."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "__name__": "recipe"}
    exec(dict(blocks)[file], names)
    return names


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Leave the tables as they were."""
    before = dict(CRITERIA), dict(RUNTIMES)
    yield
    for table, own in zip((CRITERIA, RUNTIMES), before, strict=True):
        for name in set(table) - set(own):
            del table[name]


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_a_criterion() -> None:
    recipe("depcut/scores/cubes.py")
    model, x = chain(), torch.randn(2, 4)
    plan = depcut.analyze(model, x).plan(0.5, score="l3", align=1)
    first, last = model[0], model[2]
    cubes = first.weight.abs().pow(3).sum(1) + first.bias.abs().pow(3)
    cubes = cubes + last.weight.abs().pow(3).sum(0)
    kept = plan.tensor_indices()["0.weight"][0]
    assert kept is not None
    assert len(kept) < 6
    assert set(kept) == set(np.argsort(-cubes.detach().numpy())[: len(kept)])


def test_a_kind_of_depth_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Highest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(x, self.back(torch.relu(self.wide(x))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Highest(), Highest(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    assert not depcut.analyze(model, x).residuals.branches
    monkeypatch.setattr(find, "_ADDITIONS", recipe("depcut/branches/find.py")["_ADDITIONS"])
    analysis = depcut.analyze(model, x)
    assert [branch.name for branch in analysis.residuals.branches] == ["1", "2"]
    slim = analysis.plan_keeping({}, dropped=["1"]).apply(model)
    without = nn.Sequential(model[0], model[2], model[3])
    torch.testing.assert_close(slim(x), without(x))


def test_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("depcut/timing/runtimes/autocast.py")
    model, seen = chain(), set()
    # Of the class: what is timed is a clone, whose hooks are the clone's own.
    plain = type(model[2]).forward

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = plain(self, x)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(type(model[2]), "forward", forward)
    found = bench({"a": model}, torch.randn(2, 4), runtime="torch.bfloat16", rounds=6)
    assert seen == {torch.bfloat16}
    assert "autocast to bfloat16" in found.runtime
    with pytest.raises(InputError, match=r"not of torch\.bfloat16, which has cpu"):
        bench({"a": model}, torch.randn(2, 4), runtime="torch.bfloat16", provider="cuda")
    with pytest.raises(InputError) as caught:
        bench({"a": model}, torch.randn(2, 4), runtime="none")
    assert '"torch.bfloat16"' in caught.value.remedy


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="two criteria named 'l1'"):
        criterion("l1")(lambda _: [])
    with pytest.raises(ValueError, match="two runtimes named 'torch'"):
        runtime("torch")(type(RUNTIMES["torch"]))
