"""Spectral norm: in eval mode kept weights are what they were; in training it is taken anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import depcut

NORMS = {"hook": spectral_norm, "parametrization": parametrizations.spectral_norm}


def net(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """A net whose norms have been estimated in training."""
    torch.manual_seed(0)
    convs = [norm(nn.Conv2d(*c, 3, padding=1)) for c in ((3, 12), (12, 10), (10, 4))]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6))
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NORMS)
def test_kept_weights_are_the_dense_ones(name: str, training: bool) -> None:
    model, x = net(NORMS[name]).train(training), torch.randn(2, 3, 6, 6)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = depcut.analyze(model, x).plan(0.5)
    slim = plan.apply(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert slim.state_dict().keys() == before.keys()
    assert not depcut.report(slim).generated
    dense, small = model.eval(), slim.eval()
    with torch.no_grad():
        dense(x), small(x)  # the hook computes the weight in a forward
    key = "weight_orig" if name == "hook" else "parametrizations.weight.original"
    for number in (0, 2, 4):
        kept = plan.tensor_indices()[f"{number}.{key}"]
        weight = dense[number].weight.detach()
        for dim, indices in enumerate(kept):
            if indices is not None:
                weight = weight.index_select(dim, torch.from_numpy(indices))
        torch.testing.assert_close(small[number].weight.detach(), weight)


@pytest.mark.parametrize("name", NORMS)
def test_in_training_the_norm_is_that_of_the_kept_weight(name: str) -> None:
    slim = depcut.shrink(net(NORMS[name]), 0.5, torch.randn(2, 3, 6, 6)).train()
    for _ in range(60):
        slim(torch.randn(2, 3, 6, 6))
    slim.eval()(torch.randn(2, 3, 6, 6))
    norm = torch.linalg.matrix_norm(slim[2].weight.detach().flatten(1), 2)
    torch.testing.assert_close(norm, torch.ones(()), rtol=0.02, atol=0.0)
