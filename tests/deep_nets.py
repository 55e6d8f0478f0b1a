"""Residual nets of any depth: an MLP, a convolution net and a transformer, tiny in width."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nets import normal, seeded
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.scores import CRITERIA


class Feed(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Convolutions(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(size)
        self.second = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.first(x)))
        return torch.relu(x + self.norm2(self.second(hidden)))


class Attention(nn.Module):
    def __init__(self, size: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.size = heads, size // heads
        self.norm = nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        rows, words, _ = x.shape
        joint = self.qkv(self.norm(x)).view(rows, words, 3, self.heads, self.size)
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).reshape(rows, words, -1))


class Deep(nn.Module):
    """A stem, residual blocks, a head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches of two linear layers."""
    return _deep(lambda: [Feed(size) for _ in range(blocks)], size)


def _deep(blocks: Callable[[], list[nn.Module]], size: int) -> nn.Module:
    return seeded(lambda: Deep(nn.Linear(6, size), blocks(), nn.Linear(size, 4)), 0)


def conv(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches of two convolutions with batch norms."""

    def make() -> nn.Module:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size, 4))
        stem = nn.Conv2d(3, size, 3, padding=1)
        return Deep(stem, [Convolutions(size) for _ in range(blocks)], head)

    return seeded(make, 0)


def attention(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches, attention and MLP in turns."""
    kinds = (Attention, Feed)
    return _deep(lambda: [kinds[i % 2](size) for i in range(blocks)], size)


NETS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda rows: normal(rows, 6)),
    "conv": (conv, lambda rows: normal(rows, 3, 6, 6)),
    "attention": (attention, lambda rows: normal(rows, 5, 6)),
}


# Entry points -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One net of one depth, analysed."""

    net: str
    model: nn.Module
    analysis: depcut.Analysis

    def inputs(self, rows: int = 2) -> Tensor:
        return NETS[self.net][1](rows)

    def data(self) -> list[Tensor]:
        return [self.inputs(4), self.inputs(5)]

    def plan(self, **options: Any) -> depcut.Plan:
        return self.analysis.plan(0.4, **{"align": 1, "progress": False, **options})


def subject(net: str, blocks: int) -> Subject:
    model = NETS[net][0](blocks)
    return Subject(net, model, depcut.analyze(model, NETS[net][1](2)))


Call = Callable[[], Any]
ENTRIES: dict[str, Callable[[Subject], Call]] = {}


def entry(function: Callable[[Subject], Call]) -> Callable[[Subject], Call]:
    """Register what prepares, and returns, a call of an entry point."""
    ENTRIES[function.__name__.rstrip("_")] = function
    return function


def squares(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def scored(name: str) -> Callable[[Subject], Call]:
    """A plan by one criterion."""
    needs = CRITERIA[name].needs

    def prepare(it: Subject) -> Call:
        given: dict[str, Any] = {"data": it.data()} if needs else {}
        given |= {"loss": squares} if needs == "loss" else {}
        return lambda: it.plan(score=name, **given)

    return prepare


@entry
def analyze(it: Subject) -> Call:
    return lambda: depcut.analyze(it.model, it.inputs())


for _name in CRITERIA:
    ENTRIES[f"plan, {_name}"] = scored(_name)


@entry
def plan_depth(it: Subject) -> Call:
    fresh = depcut.Analysis(it.model, it.analysis.coupling, it.inputs())
    return lambda: fresh.plan(0.4, depth=True, align=1)


@entry
def plan_depth_params(it: Subject) -> Call:
    return lambda: it.plan(of="params", depth=True, data=it.data(), score="magnitude")


@entry
def apply(it: Subject) -> Call:
    plan = it.plan()
    return lambda: plan.apply(it.model)


@entry
def apply_depth(it: Subject) -> Call:
    branches = [b.name for b in it.analysis.branches[::2]]
    plan = it.analysis.plan_keeping({}, branches)
    return lambda: plan.apply(it.model)


@entry
def compensate(it: Subject) -> Call:
    plan = it.plan(of="channels")  # heads go at every depth
    return lambda: plan.apply(it.model, data=it.data(), progress=False)


@entry
def compact(it: Subject) -> Call:
    model = copy.deepcopy(it.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("up.weight", "first.weight")):
                weight[0] = 0
            if name.endswith(("up.bias", "norm1.weight", "norm1.bias")):
                weight[0] = 0
    return lambda: depcut.compact(model, it.inputs())


@entry
def gradual(it: Subject) -> Call:
    model = copy.deepcopy(it.model)

    def run() -> nn.Module:
        masks = depcut.training.Gradual(model, 0.4, it.inputs(), 0, 4, 2, align=1)
        for _ in range(6):
            masks.step()
        return masks.commit()

    return run


@entry
def iterate(it: Subject) -> Call:
    return lambda: depcut.training.iterate(
        it.model,
        0.4,
        it.inputs(),
        steps=2,
        retrain=lambda model, step: None,
        align=1,
        progress=False,
    )


@entry
def distillation(it: Subject) -> Call:
    plan = it.plan()
    slim, x = plan.apply(it.model), it.inputs(4)

    def run() -> None:
        with depcut.training.Distillation(it.model, slim, plan, hidden=("blocks.*",)) as distill:
            distill(slim(x), x).backward()

    return run


@entry
def export(it: Subject) -> Call:
    folder = tempfile.mkdtemp()
    return lambda: depcut.export(it.model, f"{folder}/deep.onnx", it.inputs())
