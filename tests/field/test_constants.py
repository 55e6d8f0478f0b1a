"""Constants of removed units go into a bias only where no other input size changes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from selection import sampled
from torch import Tensor, nn
from torch.nn import functional

import depcut

Head = Callable[[Tensor, Tensor], Tensor]  # (hidden [B, C, H, W], image) -> [B, C]

# Of a channel that holds one number everywhere, these make a number that depends on the size.
CHANGING: dict[str, Head] = {
    "a sum": lambda h, _: h.sum((2, 3)),
    "a norm": lambda h, _: h.norm(dim=(2, 3)),
    "a logsumexp": lambda h, _: h.flatten(2).logsumexp(-1),
    "padding, then a mean": lambda h, _: functional.pad(h, (1, 1, 1, 1)).mean((2, 3)),
    "the end of a cumsum": lambda h, _: h.flatten(2).cumsum(-1)[:, :, -1],
    "a factor x.shape[2]": lambda h, x: h.mean((2, 3)) * x.shape[2],
    "a power of x.shape[3]": lambda h, x: h.mean((2, 3)) * x.shape[3] ** -0.5,
    "the number of the batch": lambda h, x: h.mean((2, 3)) * x.shape[0],
    "a sum of ones": lambda h, x: h.mean((2, 3)) * torch.ones(x.shape[3]).sum(),
    "a matmul with ones": lambda h, x: (h.flatten(2) @ torch.ones(1, x[0, 0].numel(), 1))[..., 0],
    "zero by chance": lambda h, x: h.mean((2, 3)) * (x.shape[2] - 8),
}
LASTING: dict[str, Head] = {
    "a mean": lambda h, _: h.mean((2, 3)),
    "a sum by the number of positions": lambda h, x: h.sum((2, 3)) / x[0, 0].numel(),
    "adaptive pooling": lambda h, _: functional.adaptive_avg_pool2d(h, 1).flatten(1),
    "an extremum": lambda h, _: 0.5 * h.amax((2, 3)),
}


class Pooled(nn.Module):
    """Half of the channels are constants, one of them zero, before they are pooled."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), head
        with torch.no_grad():
            self.conv.weight[:4] = 0.0
            self.conv.bias.copy_(torch.linspace(0.0, 1.4, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(torch.relu(self.conv(x)), x))


QUICK = ("a sum", "a power of x.shape[3]", "zero by chance")
IMAGES = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 8), torch.randn(1, 3, 5, 9)]


def assert_equal(slim: nn.Module, model: nn.Module) -> None:
    for image in IMAGES:
        torch.testing.assert_close(slim(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sampled(list(CHANGING), QUICK))
def test_a_constant_that_grows_with_the_image_stays(name: str) -> None:
    model = Pooled(CHANGING[name])
    found = depcut.compaction(model, IMAGES[0])
    assert_equal(found.apply(), model)
    assert not found.folded


@pytest.mark.parametrize("name", sampled(list(LASTING), ["a sum by the number of positions"]))
def test_a_constant_of_any_image_is_folded(name: str) -> None:
    model = Pooled(LASTING[name])
    found = depcut.compaction(model, IMAGES[0])
    assert_equal(found.apply(), model)
    assert sum(found.removed.values()) == 4


def test_what_stays_for_its_size_is_said() -> None:
    found = depcut.compaction(Pooled(CHANGING["a sum"]), IMAGES[0])
    assert "changes with the size of the inputs" in str(found)
    assert sum(found.removed.values()) == 1  # zero at any size


@pytest.mark.parametrize(("head", "folds"), [("a sum", False), ("a mean", True)])
def test_a_plan_folds_what_any_image_leaves_as_it_is(head: str, folds: bool) -> None:
    model = Pooled({**CHANGING, **LASTING}[head])
    analysis = depcut.analyze(model, IMAGES[0])
    plan = analysis.plan_keeping({analysis.groups[0].name: [4, 5, 6, 7]})
    slim, plain = plan.apply(model), plan.apply(model, compensate=False)
    assert torch.equal(slim.fc.bias, plain.fc.bias) != folds


class Places(nn.Module):
    """Lengths up to a limit, with a table of which the first rows are zero in some columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(16, 6), nn.Linear(6, 12), nn.Linear(12, 3)
        with torch.no_grad():
            self.up.weight[:5] = 0.0
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.table(ids)))
        return self.down(hidden.cumsum(1)[:, -1] / ids.shape[1])


def test_ids_of_other_lengths_are_tried() -> None:
    model = Places()
    found = depcut.compaction(model, torch.arange(12).view(2, 6))
    slim = found.apply()
    assert slim.up.out_features == 7
    for length in (2, 6, 11):
        ids = torch.randint(0, 16, (3, length))
        torch.testing.assert_close(slim(ids), model(ids), rtol=1e-4, atol=1e-5)
