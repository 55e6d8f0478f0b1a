"""generated="never": plans that the model's own code carries out, and what they cost."""

from __future__ import annotations

import pytest
import torch
from nets import seeded
from torch import Tensor, nn

import depcut

CODE = """
def forward(self, x):
    return self.second(self.first(x).view(-1, 4, 4).relu().flatten(1))
"""


def hidden() -> type[nn.Module]:
    """A class whose code cannot be read, with a size that is typed in."""
    namespace: dict[str, object] = {}
    exec(CODE, namespace)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)

    Hidden.forward = namespace["forward"]  # type: ignore[assignment]
    return Hidden


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = hidden()()
        self.up, self.down = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.inner(x)).relu())


def test_code_without_source_is_generated_unless_that_is_ruled_out() -> None:
    model, x = seeded(Net, 0), torch.randn(2, 6)
    allowed = depcut.report(depcut.shrink(model, 0.5, x, of="channels"))
    assert set(allowed.generated) == {"inner"}
    slim = depcut.shrink(model, 0.5, x, of="channels", generated="never")
    never = depcut.report(slim)
    assert never.generated == {}
    assert type(slim.inner) is type(model.inner)
    assert slim.inner.first.weight.shape == model.inner.first.weight.shape
    assert slim.up.out_features < 32
    kept = never.settings["kept_whole"]
    assert len(kept["groups"]) >= 1
    assert 0 < kept["share_of_macs"] < 1
    assert "kept whole, as their new widths need a generated module" in str(never)


def test_a_budget_that_own_code_cannot_meet_is_an_error() -> None:
    model, x = seeded(Net, 0), torch.randn(2, 6)
    with pytest.raises(depcut.BudgetError):
        depcut.shrink(model, 0.9, x, align=1, generated="never")


def test_other_values_are_refused() -> None:
    with pytest.raises(depcut.InputError, match="generated"):
        depcut.Options(generated="sometimes")
