"""Calibration inputs made from models with floating-point inputs."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depcut.capture.capture import capture
from depcut.capture.random_state import random_states
from depcut.synthetic.batch_norm import batch_norm
from depcut.synthetic.choose import make
from depcut.synthetic.descent import STEPS, Work, planned
from depcut.synthetic.float_inputs import float_inputs
from depcut.synthetic.held_out import Features, error
from depcut.synthetic.noise import spatial
from depcut.synthetic.subject import Made, Subject


def trained(model: nn.Module, *inputs: Any) -> nn.Module:
    """With weights of one seed, and running statistics of data that is no noise."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = parameter[0].numel() ** -0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    model.train()
    for _ in range(30):
        model(*inputs)
    return model.eval()


def subject(model: nn.Module, *inputs: Any, **given: Any) -> Subject:
    return Subject(capture(model, inputs), model, given.pop("examples", 16), **given)


def distances(made: Made) -> tuple[float, float]:
    """At first and at the end."""
    first, last = re.findall(r"(\d[\d.e-]*) (?:standard|at)", made.match)
    return float(first), float(last)


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


IMAGES = 3 + 2 * torch.rand(16, 2, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(-1)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        pytest.param(image_net(), IMAGES, marks=pytest.mark.sweep),
        pytest.param(
            nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5)),
            IMAGES[..., 0],
            marks=pytest.mark.sweep,
        ),
        (nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), 100 * IMAGES[:, 0, 0]),
    ],
    ids=["image", "wave", "table"],
)
def test_the_statistics_are_reached(model: nn.Module, example: Tensor) -> None:
    trained(model, example)
    made = batch_norm(subject(model, example[:2]))
    assert made is not None
    first, last = distances(made)
    assert last < 0.1 * first
    read = torch.cat([leaves[0] for leaves in made.items])
    assert read.shape == (16, *example.shape[1:])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    reached = model[0](read).transpose(0, 1).flatten(1)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = norm.running_var.sqrt()
    assert ((reached.mean(1) - norm.running_mean).abs() < 0.3 * deviation).all()
    assert (reached.std(1) / deviation - 1).abs().mean() < 0.2


class Functional(nn.Module):
    """A norm without a module of its own, an image with a table, a mask and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.embed = nn.Conv2d(2, 4, 3), nn.Linear(3, 4), nn.Embedding(9, 4)
        self.register_buffer("mean", torch.full((4,), 5.0))
        self.register_buffer("var", torch.full((4,), 4.0))

    def forward(self, image: Tensor, table: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        y = self.conv(image).mean((2, 3)) + self.fc(table) + self.embed(numbers)
        return functional.batch_norm(y, self.mean, self.var) * mask


def test_several_inputs_and_a_functional_norm() -> None:
    torch.manual_seed(0)
    example = (IMAGES[:3], torch.randn(3, 3), torch.ones(3, 1), torch.tensor([4, 5, 6]))
    made = batch_norm(subject(Functional(), *example))
    assert made is not None
    assert "one" not in made.recipe
    assert made.recipe.endswith(", the other inputs rows of the example")
    first, last = distances(made)
    assert last < 0.4 * first
    image, table, mask, numbers = made.items[0]
    assert image.shape == (4, 2, 8, 8)
    assert table.shape == (4, 3)
    assert torch.equal(mask, torch.ones(4, 1))
    assert set(numbers.tolist()) <= {4, 5, 6}


def test_nothing_is_touched_and_the_seed_decides() -> None:
    model = trained(image_net(), IMAGES)
    model[0].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = random_states()
    given = subject(model, IMAGES, examples=4)
    with torch.no_grad():
        made = [batch_norm(replace(given, seed=seed)) for seed in (1, 1, 2)]
        assert not torch.is_grad_enabled()
    assert torch.equal(states[0], random_states()[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [m.training for m in model] == [True, False, False, False, False]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    one, same, other = (m.items[0][0] for m in made if m is not None)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not one.requires_grad


def test_the_time_is_kept() -> None:
    model = trained(image_net(), IMAGES)
    shares: list[float] = []
    short = subject(model, IMAGES, examples=100_000, seconds=1.5, advance=shares.append)
    made = batch_norm(short)
    assert short.left > -1.5
    assert made is not None
    assert 2 <= sum(len(leaves[0]) for leaves in made.items) < 100_000
    assert shares == sorted(shares)
    assert batch_norm(subject(model, IMAGES, seconds=0.0)) is None


def test_fewer_rows_go_before_steps() -> None:
    assert planned(70, 1e9, 1000, None) == Work((32, 32, 6), STEPS)
    assert planned(70, 40 * STEPS, 1000, None) == Work((32, 8), STEPS)
    assert planned(70, 32 * 100, 1000, None) == Work((32,), 100)
    assert planned(70, 10 * 60, 1000, None) == Work((10,), 60)
    assert planned(70, 60, 1000, None) is None
    assert planned(70, 1e9, 7, None) == Work((7,) * 10, STEPS)
    assert planned(10, 1e9, 7, 3) == Work((3, 3, 3), STEPS)


def test_nothing_is_made_without_statistics_or_floats() -> None:
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.BatchNorm1d(12)).eval()
    numbers = subject(tokens, torch.ones(2, 3, dtype=torch.long))
    assert batch_norm(numbers) is None
    assert float_inputs(numbers) is None
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert batch_norm(subject(plain, IMAGES)) is None


class Classifier(nn.Module):
    """Of images or of tables, without statistics, that is sure of what it is shown."""

    def __init__(self, *layers: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).flatten(2).mean(2))
        return 10 * y


def test_a_classifier_is_sure_of_optimised_noise() -> None:
    torch.manual_seed(0)
    model = Classifier(nn.Conv2d(3, 12, 3, 2), nn.GELU(), nn.Conv2d(12, 16, 3)).eval()
    given = subject(model, torch.randn(2, 3, 12, 12), examples=24)
    states = random_states()
    made = make(given)
    assert torch.equal(states[0], random_states()[0])
    assert made is not None
    assert made.recipe == "noise optimised until the model is sure of its outputs"
    assert "white noise" in made.match
    assert len(made.items) >= 4
    read = torch.cat([leaves[0] for leaves in made.items])
    shares = model(read).softmax(1)
    assert shares.amax(1).mean() > 0.6
    assert set(shares.argmax(1).tolist()) == {0, 1, 2, 3}
    again = make(replace(given, started=time.monotonic()))
    assert again is not None
    assert torch.equal(read, torch.cat([leaves[0] for leaves in again.items]))


def test_noise_is_what_is_left() -> None:
    """Of a table, and of what is no classifier, at the scale of the example."""
    net = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 1)).eval()
    made = float_inputs(subject(net, 500 + 100 * torch.randn(4, 9)))
    assert made is not None
    assert made.recipe.startswith("white noise")
    assert len(made.items) == 4


def test_which_dimensions_are_spatial() -> None:
    assert spatial((8, 3, 32, 32)) == (2, 3)
    assert spatial((8, 32, 32, 3)) == (1, 2)
    assert spatial((8, 2, 400)) == (2,)
    assert spatial((8, 1, 16, 16, 16)) == (2, 3, 4)
    assert spatial((8, 30)) == ()
    assert spatial((8, 16000)) == (1,)


def test_layers_tell_which_inputs_hold_elsewhere() -> None:
    """Halves of a layer's input that are tied in one set, and not tied in the other."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(400, 8, generator=generator)
    weight = torch.eye(16)
    tied = Features(torch.cat([2 * half, half], 1), weight)
    loose = Features(torch.randn(400, 16, generator=generator), weight)
    assert error([tied], [tied]) < 0.5 * error([tied], [loose])
    assert error([loose], [tied]) > error([tied], [tied])
