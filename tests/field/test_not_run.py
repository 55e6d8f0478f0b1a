"""What is returned has never run: counters, statistics and caches are the caller's, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.capture.random_state import random_states


class Counting(nn.Module):
    """Counts its calls in every way, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.drop = nn.Dropout(0.5)
        self.calls, self.seen, self.array, self.cache = 0, [], np.zeros(2), {}
        self.random, self.generator = random.Random(0), torch.Generator().manual_seed(3)
        self.register_buffer("steps", torch.zeros(()))
        with torch.no_grad():
            self.a.weight[:4] = self.a.bias[:4] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(self.seen))
        self.cache[self.calls] = x.shape
        self.array += 1
        self.steps += 1
        if not torch.compiler.is_compiling():
            self.random.random()
            torch.rand(1, generator=self.generator)
            np.random.rand(), random.random()  # noqa: NPY002
        hidden = torch.relu(self.norm(self.a(x)))
        return self.b(self.drop(hidden))

    def counts(self) -> list[Any]:
        """All that a run advances."""
        return [
            *(self.calls, self.seen, self.array.tolist(), self.cache, self.random.getstate()),
            *(self.generator.get_state().tolist(), float(self.steps)),
            int(self.norm.num_batches_tracked),
        ]


X = torch.randn(5, 6)
DATA = [(torch.randn(4, 6), torch.randint(0, 4, (4,))) for _ in range(2)]
OTHER = Counting()
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "shrink": lambda m: depcut.shrink(m, 0.4, X),
    "data": lambda m: depcut.shrink(m, 0.4, X, data=[x for x, _ in DATA]),
    "loss": lambda m: depcut.shrink(
        m, 0.4, X, data=DATA, loss=nn.functional.cross_entropy, score="taylor"
    ),
    "compact": lambda m: depcut.compact(m, X),
    "another instance": lambda m: depcut.analyze(OTHER, X).plan(0.4).apply(m),
    "iterate": lambda m: depcut.training.iterate(m, 0.4, X, steps=2).model,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_a_run_advances_is_where_it_was(way: Callable[[nn.Module], nn.Module]) -> None:
    model = Counting().train()
    model(X)
    before, states = model.counts(), random_states()
    slim = way(model)
    assert slim.counts() == before == model.counts()
    assert type(slim) is Counting
    assert slim.training
    assert slim.a.out_features < 16
    after = random_states()
    assert torch.equal(states[0], after[0])
    assert states[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(states[2], after[2], strict=True))


def test_running_statistics_are_the_kept_ones() -> None:
    model = Counting().train()
    model(X)
    plan = depcut.analyze(model, X).plan(0.4)
    slim = plan.apply(model)
    for name in ("running_mean", "running_var"):
        kept = plan.tensor_indices()[f"norm.{name}"][0]
        assert torch.equal(getattr(slim.norm, name), getattr(model.norm, name)[kept])
