"""A plan for a model that has changed since it was analysed is refused, with what has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.errors import InputError, PlanError


class Settings:
    def __init__(self) -> None:
        self.power = 1


class Net(nn.Module):
    """Reads attributes, counts its calls, and keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.settings, self.scale, self.name = Settings(), 2.0, "net"
        self.calls, self.last, self.seen = 0, None, {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.seen[self.calls] = self.layers(x)
        return self.last**self.settings.power * self.scale


def twice(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return 2 * out


def look(_module: nn.Module, _args: Any, out: Tensor) -> None:
    assert out.ndim == 2


def replace_layer(model: Net) -> None:
    model.layers[1] = nn.Tanh()


def replace_attribute(model: Net) -> None:
    model.scale = 3.0


def replace_in_helper(model: Net) -> None:
    model.settings.power = 2


def add_hook(model: Net) -> None:
    model.layers[0].register_forward_hook(twice)


def replace_forward(model: Net) -> None:
    model.forward = lambda x: model.layers(x).neg()


def add_layer(model: Net) -> None:
    model.layers.append(nn.Tanh())


def fail(model: Net) -> None:
    model.scale = "no number"


CHANGES: dict[Callable[[Net], None], str] = {
    replace_layer: r"layer 'layers\.1' was a ReLU, is a Tanh",
    replace_attribute: "scale of the model",
    replace_in_helper: "settings of the model",
    add_hook: r"_forward_hooks of layer 'layers\.0'",
    replace_forward: "forward of the model",
    add_layer: r"layer 'layers\.3' is new",
    fail: "scale of the model: the model itself raises TypeError",
}
X = torch.randn(3, 6)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_computes_something_else_is_refused(change: Callable[[Net], None]) -> None:
    model = Net()
    plan = depcut.analyze(model, X).plan(0.4)
    change(model)
    with pytest.raises(PlanError, match=CHANGES[change]):
        plan.apply(model)


def test_a_changed_model_can_be_bound_anew() -> None:
    model = Net()
    plan = depcut.analyze(model, X).plan(0.4)
    replace_layer(model)
    slim = plan.bind(model).apply(model)
    assert isinstance(slim.layers[1], nn.Tanh)
    assert not depcut.report(slim).generated


def run(model: Net) -> None:
    model(X)


def train(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(X).sum().backward()
    optimizer.step()


def rename(model: Net) -> None:
    model.name = "other"


def add_looking_hook(model: Net) -> None:
    model.layers[0].register_forward_hook(look)


@pytest.mark.parametrize("change", [run, train, rename, add_looking_hook])
def test_a_model_that_computes_the_same_is_not(change: Callable[[Net], None]) -> None:
    model = Net()
    plan = depcut.analyze(model, X).plan(0.4)
    change(model)
    slim = plan.apply(model)
    assert type(slim) is Net
    assert slim.calls == model.calls


def test_another_instance_is_taken_as_it_is() -> None:
    model = Net()
    plan = depcut.analyze(model, X).plan(0.4)
    other = copy.deepcopy(model)
    replace_layer(other)
    assert isinstance(plan.apply(other).layers[1], nn.Tanh)


# Calibrations -----------------------------------------------------------------------------------


def test_a_calibration_of_another_model_is_refused() -> None:
    data = [torch.randn(4, 6)]
    other = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    analysis = depcut.analyze(Net(), X)
    theirs = depcut.analyze(other, X).calibrate(data)
    with pytest.raises(InputError, match=r"made for another model: 0\.weight"):
        analysis.plan(0.4, data=theirs)
    plan = analysis.plan(0.4)
    assert plan.model is not None
    with pytest.raises(InputError, match=r"made for another model: 0\.weight"):
        plan.apply(plan.model, data=theirs)


def test_a_calibration_is_taken_for_another_instance() -> None:
    model = Net()
    analysis = depcut.analyze(model, X)
    data = analysis.calibrate([torch.randn(4, 6)])
    plan = analysis.plan(0.4, data=data)
    slim = plan.apply(copy.deepcopy(model), torch.randn(5, 6), data=data)
    torch.testing.assert_close(slim(X), plan.apply(model, data=data)(X))


def test_a_second_loss_is_refused() -> None:
    analysis = depcut.analyze(Net(), X)
    pairs = [(torch.randn(4, 6), torch.randn(4, 4))]
    data = analysis.calibrate(pairs, loss=functional.mse_loss)
    assert analysis.calibrate(data, loss=functional.mse_loss).loss is functional.mse_loss
    with pytest.raises(InputError, match="made with another loss"):
        analysis.plan(0.4, data=data, loss=functional.l1_loss, score="taylor")
    with pytest.raises(InputError, match="made without a loss"):
        analysis.plan(0.4, data=analysis.calibrate([X]), loss=functional.l1_loss, score="taylor")
