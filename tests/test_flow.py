"""Synaptic flow of operators that are neither layers nor activation functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.scores import score


class Between(nn.Module):
    """Two layers, and an operation on what the first one gives and on what a third one gives."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(5, 8), nn.Linear(5, 8)
        self.last = nn.Linear(8, 3)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x), self.other(x)))


def attended(a: Tensor, b: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Four queries in two heads, one head of keys and values."""
    q = a.reshape(1, 2, -1, 4)
    k = b[:, :4].reshape(1, 1, -1, 4)
    out = functional.scaled_dot_product_attention(
        q, k, k, attn_mask=mask, is_causal=causal, enable_gqa=True
    )
    return out.reshape(-1, 8)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a difference": lambda a, b: a - b,
    "a difference to a number": lambda a, b: 1 - a * b,
    "a quotient": lambda a, b: a / (1 + b.square()),
    "a product": lambda a, b: a * b,
    "a cast": lambda a, b: (-a).double().float() + b.type_as(a),
    "a softmax": lambda a, b: (a[:, None] * b[:, :, None]).softmax(1).sum(1),
    "a layer norm": lambda a, b: functional.layer_norm(a, (8,)) + b,
    "a group norm": lambda a, b: functional.group_norm(a, 2, torch.ones(8), torch.ones(8)) + b,
    "attention of grouped queries": attended,
    "causal attention": lambda a, b: attended(a, b, causal=True),
    "attention with flags": lambda a, b: attended(a, b, mask=torch.ones(1, 1, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_flow_is_that_of_absolute_weights(name: str) -> None:
    torch.manual_seed(0)
    model, x = Between(OPERATIONS[name]).eval(), torch.randn(2, 5)
    found = flow(model, x)
    assert all(np.isfinite(scores).all() and (scores > 0).all() for scores in found)
    with torch.no_grad():
        for layer in (model.first, model.other, model.last):
            layer.weight *= torch.where(torch.rand_like(layer.weight) > 0.5, 1.0, -1.0)
    for scores, again in zip(found, flow(model, x), strict=True):
        np.testing.assert_allclose(again, scores, rtol=1e-12)
    assert any(np.ptp(scores) > 0 for scores in found)


def test_a_normed_weight_flows_by_its_length() -> None:
    torch.manual_seed(0)
    model, x = Between(lambda a, b: a + b).eval(), torch.randn(2, 5)
    found = flow(model, x)
    for layer in (model.first, model.other, model.last):
        torch.nn.utils.parametrizations.weight_norm(layer)
    normed = flow(model, x)
    assert [s.shape for s in normed] == [s.shape for s in found]
    assert all(np.isfinite(scores).all() and (scores > 0).all() for scores in normed)


def flow(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    return list(score("synflow", depcut.analyze(model, x).coupling, model, 0))
