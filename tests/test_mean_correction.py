"""Means of removed units, which batch norms know without data, go into what reads the units."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.capture.capture import capture
from depcut.repair.channel_values import ChannelValues, channel_values


class Convolutions(nn.Module):
    """Two pairs of layers around a batch norm; a linear layer reads means over positions."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.activation = activation or nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 16, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def images() -> Tensor:
    return torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module) -> nn.Module:
    """The model with directions in its weights that no drawing gives, as training leaves them.

    Scales and shifts are drawn, and the statistics are what normal images give it.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data
            rows, columns = len(weight), weight[0].numel()
            pair = (torch.randn(n, 2, generator=generator) for n in (rows, columns))
            low = torch.einsum("ik,jk->ij", *pair).view_as(weight)
            module.weight.data = weight + 0.7 * weight.std() * low
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            with torch.no_grad():
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
    model.train()
    with torch.no_grad():
        model(images())
    return model.eval()


def net(activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return trained(Convolutions(activation))


def errors(model: nn.Module, ratio: float = 0.5) -> tuple[float, float]:
    """Squared errors of the outputs, plain and corrected."""
    plan = depcut.analyze(model, images()[:2]).plan(ratio, align=1)
    with torch.no_grad():
        expected, plain, moved = (
            m(images()) for m in (model, plan.apply(model, compensate=False), plan.apply(model))
        )
    return float((plain - expected).square().mean()), float((moved - expected).square().mean())


@pytest.mark.parametrize("activation", [nn.ReLU6(inplace=True), nn.Hardswish()])
def test_a_correction_brings_the_outputs_closer(activation: nn.Module) -> None:
    plain, moved = errors(net(activation))
    assert moved < 0.3 * plain


def test_the_mean_behind_a_relu_is_that_of_the_closed_form() -> None:
    model = net()
    program = capture(model, images()[:2])
    found = channel_values(program, dict(model.named_parameters()) | dict(model.named_buffers()))
    (relu, *_) = (n for n in found if "relu" in n.name)
    mean, deviation = model.norm1.bias.double(), model.norm1.weight.double().abs()
    score = mean / deviation
    density = torch.exp(-0.5 * score.square()) / math.sqrt(2 * math.pi)
    expected = mean * torch.special.ndtr(score) + deviation * density
    torch.testing.assert_close(found[relu].mean, expected.detach(), rtol=1e-3, atol=1e-3)


def test_without_compensation_what_stays_is_what_it_was() -> None:
    model = net()
    plan = depcut.analyze(model, images()[:2]).plan(0.5, align=1)
    slim = plan.apply(model, compensate=False)
    kept = plan.tensor_indices()["norm2.running_mean"][0]
    assert torch.equal(slim.norm2.running_mean, model.norm2.running_mean[kept])
    assert not any("batch norms" in note for note in depcut.report(slim).notes)


def test_the_report_names_the_layers() -> None:
    model = net()
    slim = depcut.shrink(model, 0.5, images()[:2], data=None, align=1)
    (note,) = (n for n in depcut.report(slim).notes if "batch norms" in n)
    assert "conv2" in note
    assert "head" in note


def test_fresh_statistics_say_nothing() -> None:
    torch.manual_seed(0)
    plain, moved = errors(Convolutions().eval())
    assert plain == moved


def test_statistics_beside_drawn_weights_are_of_nothing() -> None:
    torch.manual_seed(0)
    model = Convolutions().eval()
    model.norm1.running_mean.add_(1.0)
    model.norm2.running_var.mul_(3.0)
    plain, moved = errors(model)
    assert plain == moved


class Overwritten(Convolutions):
    """A layer reads what a later operator changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        y = self.conv2(x)
        functional.relu_(x)
        return self.head((functional.relu(self.norm2(y)) + x[:, :, 2:, 2:]).mean((2, 3)))


def test_what_is_changed_in_place_while_others_read_it_is_not_known() -> None:
    model = trained(Overwritten())
    program = capture(model, images()[:2])
    found = channel_values(program, dict(model.named_parameters()) | dict(model.named_buffers()))
    assert all("norm1" not in str(n.meta["nn_module_stack"]) for n in found)
    assert any("norm2" in str(n.meta["nn_module_stack"]) for n in found)


class Followed(nn.Module):
    """A batch norm of normal channels, and what a function makes of it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return self.function(self.norm(first), self.second(second))


KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "joined": lambda a, b: torch.cat([a.relu(), b.sigmoid()], 1),
    "a square of itself": lambda a, b: a * a.tanh(),
    "independent summands": lambda a, b: functional.relu(a + b),
    "a mean over positions, flattened": lambda a, b: functional.silu(a).mean((2, 3)),
    "pooled, then a view": lambda a, b: functional.adaptive_avg_pool2d(b.relu(), 1).flatten(1),
    "averaged over windows": lambda a, b: functional.avg_pool2d(a.exp(), 2),
    "dropout that is off": lambda a, b: functional.dropout(a.relu(), training=False).clone(),
    "clipped": lambda a, b: a.clamp(-0.5, 1.0),
}
UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "padding counts as zeros": lambda a, b: functional.avg_pool2d(a.relu() + 1, 2, padding=1),
    "joined along positions": lambda a, b: torch.cat([a, b], 2),
    "joined with what is not known": lambda a, b: torch.cat([a, a.cumsum(2)], 1),
    "a view that moves channels": lambda a, b: a.reshape(len(a), 3, -1),
    "means are no values": lambda a, b: a.mean((2, 3)).relu(),
    "positions that stay": lambda a, b: a.mean(2),
    "a product of two": lambda a, b: a * b,
    "a channel for all": lambda a, b: a + b[:, :1],
    "a number for each row": lambda a, b: a * torch.arange(len(a)).view(-1, 1, 1, 1),
}


def followed(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ChannelValues | None]:
    """What a model returns of many normal inputs, and what is known of it without any."""
    generator = torch.Generator().manual_seed(0)
    model = Followed(function).eval()
    x = 2 + 3 * torch.randn(256, 12, 8, 8, generator=generator)
    with torch.no_grad():
        for norm in (model.norm, model.second):
            norm.running_mean.fill_(2.0)
            norm.running_var.fill_(9.0)
            norm.weight.copy_(torch.rand(6, generator=generator) - 0.3)
            norm.bias.copy_(torch.randn(6, generator=generator))
        out = model(x)
    program = capture(model, x[:2])
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return out, channel_values(program, tensors).get(program.outputs[0])


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_of_channels_is_what_many_normal_inputs_give(case: str) -> None:
    out, known = followed(KNOWN[case])
    assert known is not None
    samples = out.transpose(0, 1).flatten(1).double()
    deviation = samples.std(1).clamp_min(0.1)
    assert bool(((known.mean - samples.mean(1)).abs() < 0.05 * deviation).all())
    if not known.averaged:
        torch.testing.assert_close(known.variance, samples.var(1), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("case", UNKNOWN)
def test_of_other_channels_nothing_is_known(case: str) -> None:
    assert followed(UNKNOWN[case])[1] is None


def test_channels_that_a_mask_zeroed_are_not_known() -> None:
    model = net()
    with torch.no_grad():
        model.conv1.weight[3] = 0
    program = capture(model, images()[:2])
    found = channel_values(program, dict(model.named_parameters()) | dict(model.named_buffers()))
    (relu, *_) = (n for n in found if "relu" in n.name)
    assert found[relu].mean.isnan().nonzero().flatten().tolist() == [3]
