"""Nothing of the caller's changes by any public call, whether it succeeds or fails midway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS
from selection import sampled
from state import snapshot, unchanged
from torch import Tensor, nn

import depcut
from depcut import training
from depcut.errors import BudgetError
from depcut.support.torch_private import pytree


class BlownError(Exception):
    """What the fuse raises."""


class Fuse:
    """Counts the forwards of a model and of all that is made of it, and raises in one of them."""

    limit: int | None = None
    count = 0

    @classmethod
    def hook(cls, *_: Any) -> None:
        cls.count += 1
        if cls.count == cls.limit:
            raise BlownError(f"forward {cls.count}")


def blow(module: nn.Module, args: Any) -> None:
    """Not a method: a hook over an object would get a copy of it."""
    Fuse.hook(module, args)


class Helper:
    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def table(self, size: int) -> Tensor:
        if size not in self.seen:
            self.seen[size] = torch.arange(size, dtype=torch.float32)
        return self.seen[size]


class Caching(nn.Module):
    """Caches in every place, counts, draws, and makes attributes that were not there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 24), nn.BatchNorm1d(24)
        self.second, self.drop = nn.Linear(24, 8), nn.Dropout(0.1)
        self.helper, self.calls, self.notes = Helper(), 0, []
        self.cache: dict[Any, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("steps", torch.zeros(()))
        self.table = lambda size: self.helper.table(size)[: self.second.out_features]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.anchors = torch.ones(x.shape[1])
        self.cache[tuple(x.shape[1:])] = self.anchors
        self.hidden = self.norm(self.first(x * self.anchors))
        if not torch.compiler.is_compiling():
            torch.rand(1, generator=self.generator)
        self.notes.append(self.hidden)
        self.last = self.second(self.drop(torch.relu(self.hidden)))
        return self.last + self.table(x.shape[1])


def square(output: Any, _target: Any) -> Tensor:
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    return sum(t.float().square().mean() for t in leaves if t.is_floating_point())


def pairs(x: Any) -> list[Any]:
    return [(x, torch.zeros(1)), (x, torch.zeros(1))]


def by_gradients(model: nn.Module, x: Any, _: Path) -> Any:
    return depcut.shrink(
        model, 0.2, x, of="params", data=pairs(x), loss=square, score="taylor", progress=False
    )


def benched(model: nn.Module, x: Any, _: Path) -> Any:
    return depcut.bench({"model": model}, x, runtime="torch", rounds=6, warmup=0)


def retrained(model: nn.Module, x: Any, folder: Path) -> Any:
    return training.retrain(
        model, pairs(x), pairs(x), epochs=1, loss=square, lr=0.01, checkpoint=folder, progress=False
    )


def distilled(model: nn.Module, x: Any, _: Path) -> Any:
    plan = depcut.analyze(model, x).plan(0.2, of="params")
    slim = plan.apply(model)
    with training.Distillation(model, slim, plan) as loss:
        return loss(slim.eval()(x), x)


def shrunk(model: nn.Module, x: Any, _: Path) -> Any:
    return depcut.shrink(model, 0.2, x, of="params")


def shrunk_on_data(model: nn.Module, x: Any, _: Path) -> Any:
    return depcut.shrink(model, 0.2, x, of="params", data=[x, x], progress=False)


def iterated(model: nn.Module, x: Any, folder: Path) -> Any:
    return training.iterate(
        model, 0.2, x, of="params", steps=2, checkpoint=folder, progress=False
    ).model


CALLS: dict[str, Callable[[nn.Module, Any, Path], Any]] = {
    "analyze": lambda m, x, _: depcut.analyze(m, x),
    "depth": lambda m, x, _: depcut.shrink(m, 0.2, x, depth=True),
    "shrink": shrunk,
    "data": shrunk_on_data,
    "gradients": by_gradients,
    "compact": lambda m, x, _: depcut.compaction(m, x).apply(),
    "export": lambda m, x, folder: depcut.export(m, folder / "model.onnx", x),
    "bench": benched,
    "compare": lambda m, x, _: depcut.compare(m, m, x, runtime=None),
    "retrain": retrained,
    "iterate": iterated,
    "distil": distilled,
    "distance": lambda m, x, _: training.output_distance(m, m, [x]),
    "fresh": lambda m, x, _: training.fresh(m, depcut.analyze(m, x).plan(0.2, of="params")),
}
QUICK = ("shrink", "data", "gradients", "compact", "compare", "distance", "bench")


def failing(call: Any, model: nn.Module, x: Any, folder: Path, limit: int | None) -> Any:
    """What a call returns; None where it raises, at the latest in a chosen forward."""
    Fuse.limit, Fuse.count = limit, 0
    try:
        return call(model, x, folder)
    except (BlownError, depcut.DepcutError) as error:
        if limit is None and not isinstance(error, BudgetError):
            raise
        return None
    finally:
        Fuse.limit = None


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Caching().eval()
    model.drop.train()
    model(torch.randn(3, 8))
    model.first.weight.grad = torch.ones_like(model.first.weight)
    model.first.register_forward_pre_hook(blow)
    return model, torch.randn(4, 8)


# At which forward a call fails; None: at none.
FORWARDS = (None, 1, 2, 3, 4, 6, 9)
CASES = {f"{name}-{n}": (name, n) for name in CALLS for n in FORWARDS}


@pytest.mark.parametrize(
    "case",
    sampled(CASES, [f"{name}-{n}" for name in QUICK for n in (None, 2)]),
)
def test_a_model_that_caches_is_untouched(case: tuple[str, int | None], tmp_path: Path) -> None:
    (name, limit), (model, x) = case, net()
    shown = snapshot(model)
    result = failing(CALLS[name], model, x, tmp_path, limit)
    assert unchanged(shown, snapshot(model)) == []
    # What fails once while it is checked may be replaced by its graph, which caches nothing.
    if isinstance(result, nn.Module) and limit is None:
        assert_clean(result)


def assert_clean(slim: nn.Module) -> None:
    """No fake tensor, and nothing of a dense size but what the caller's model had cached."""
    for place, entry in snapshot(slim).items():
        assert "FakeTensor" not in repr(entry), place
    assert slim.calls == 1
    slim(torch.randn(2, 8))
    assert slim.hidden.shape == (2, slim.first.out_features)


def shares() -> list[Any]:
    """Each net with each call: one in 24 in the sweep, in turns, the others `-m exhaustive`."""
    return [
        pytest.param(
            structure,
            name,
            marks=pytest.mark.sweep if (i + j) % 24 == 0 else pytest.mark.exhaustive,
        )
        for i, structure in enumerate(NETS)
        for j, name in enumerate(CALLS)
    ]


@pytest.mark.parametrize(("structure", "name"), shares())
def test_every_net_is_untouched(structure: str, name: str, tmp_path: Path) -> None:
    found = NETS[structure]
    model, x = found.build().train(), found.inputs(2)
    model.register_forward_pre_hook(blow)
    for limit in (None, 2, 5) if name not in ("export", "bench") else (None,):
        shown, folder = snapshot(model), tmp_path / str(limit)
        folder.mkdir()
        failing(CALLS[name], model, x, folder, limit)
        assert unchanged(shown, snapshot(model)) == [], f"at forward {limit}"
