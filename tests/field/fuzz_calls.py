"""Every public function with all that it takes, for calls with one wrong argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import depcut
from depcut import training
from depcut.training import TrainingOptions


class Net(nn.Module):
    """Two hidden widths of 16 and 24."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 24)
        self.last = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(inputs(4), torch.tensor([0, 1, 2, 3])), (inputs(4), torch.tensor([3, 2, 1, 0]))]


loss = nn.functional.cross_entropy


@dataclass(frozen=True)
class Call:
    """A public function and arguments that it accepts.

    Attributes:
        function: Takes all of them by name.
        arguments: By name, made anew for each call.
        more: Names of further arguments, which have defaults.
        refused: Whether the arguments are wrong already, so that nothing that takes long begins.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    more: tuple[str, ...] = ()
    refused: bool = False

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return (*self.arguments(), *self.more)


@functools.cache
def analysis() -> depcut.Analysis:
    return depcut.analyze(net(), inputs())


@functools.cache
def plan() -> depcut.Plan:
    return analysis().plan(0.5, align=1)


@functools.cache
def slim() -> nn.Module:
    return plan().apply(analysis().model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _of(kind: type[Any], keywords: Any) -> tuple[str, ...]:
    return tuple(keywords.__annotations__)


def _quiet(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(more)


def _dense(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": net(), "inputs": inputs(), **more}


def _apply_loaded(text: Any) -> Any:
    return depcut.Plan.load(text).apply(net())


def _gradual(**given: Any) -> nn.Module:
    gradual = training.Gradual(**given)
    for _ in range(3):
        gradual.step()
    return gradual.commit()


def _distil(**given: Any) -> Any:
    return training.Distillation(**given)


def _schedule(**given: Any) -> Any:
    made = training.schedule(**given)
    made.step()
    return made


def _explain(name: Any) -> str:
    return analysis().explain(name)


def _masked_state(state: Any) -> Any:
    gradual = training.Gradual(net(), 0.4, inputs(), 0, 4, 2, align=1)
    gradual.load_state_dict(state)
    return gradual


def _snapshots() -> training.Snapshots:
    snapshots = training.Snapshots()
    snapshots.take(net(), 0)
    return snapshots


def _taken(**given: Any) -> Any:
    return training.Snapshots(**given)(net(), 0)


SHRINK = (
    "data",
    "loss",
    "optimizer",
    "options",
    *_of(depcut.Options, depcut.options.ShrinkKeywords),
)
PLAN = ("data", "loss", "options", *_of(depcut.Options, depcut.options.PlanKeywords))
APPLY = ("inputs", "data", "optimizer", "options", *depcut.options.ApplyKeywords.__annotations__)

CALLS: dict[str, Call] = {
    "shrink": Call(depcut.shrink, _dense(ratio=0.5), SHRINK),
    "analyze": Call(depcut.analyze, _dense()),
    "Analysis.plan": Call(lambda **k: analysis().plan(**k), _quiet(ratio=0.5), PLAN),
    "Analysis.plan_keeping": Call(
        lambda **k: analysis().plan_keeping(**k), _quiet(kept={"first": [0, 3]}), ("dropped",)
    ),
    "Analysis.calibrate": Call(
        lambda **k: analysis().calibrate(**k),
        lambda: {"data": pairs(), "loss": loss},
        ("batches", "memory", "progress", "options"),
    ),
    "Analysis.explain": Call(_explain, _quiet(name="first")),
    "Analysis.latency": Call(
        lambda **k: analysis().latency(**k),
        _quiet(samples=0),
        ("threads", "refresh", "progress"),
        refused=True,
    ),
    "Plan.apply": Call(lambda **k: plan().apply(**k), lambda: {"model": net()}, APPLY),
    "Plan.bind": Call(lambda **k: plan().bind(**k), _dense()),
    "Plan.check": Call(lambda **k: plan().check(**k), lambda: {"model": net()}),
    "Plan.save": Call(lambda **k: plan().save(**k), _quiet(path="plan.json")),
    "Plan.load": Call(_apply_loaded, _quiet(text="written.json")),
    "compact": Call(depcut.compact, _dense()),
    "compaction": Call(depcut.compaction, _dense()),
    "report": Call(depcut.report, lambda: {"model": slim()}),
    "export": Call(depcut.export, _dense(path="model.onnx"), ("rtol", "atol", "metadata", "opset")),
    "bench": Call(
        depcut.bench,
        lambda: {"candidates": {"a": net()}, "inputs": inputs(), "runtime": "torch", "rounds": 6},
        ("provider", "batch_sizes", "threads", "pin", "memory", "warmup"),
    ),
    "compare": Call(
        depcut.compare,
        lambda: {"dense": net(), "slim": slim(), "inputs": inputs(), "runtime": None},
        ("provider", "batch_size", "threads", "pin", "memory", "rounds", "warmup"),
    ),
    "Options": Call(depcut.Options, _quiet(), _names(depcut.Options)),
    "Options.read": Call(depcut.Options.read, _quiet(path="options.toml")),
    "TrainingOptions": Call(TrainingOptions, _quiet(), _names(TrainingOptions)),
    "Score": Call(
        lambda **k: analysis().plan(0.5, score=depcut.Score(**k)),
        _quiet(name="magnitude"),
        ("aggregate", "members", "normalize"),
    ),
    "retrain": Call(
        training.retrain,
        lambda: {
            "model": net(),
            "train": pairs(),
            "epochs": 1,
            "loss": loss,
            "lr": 0.1,
            "progress": False,
        },
        ("valid", "metric", "optimizer", "plan", "checkpoint", "options", *_names(TrainingOptions)),
    ),
    "iterate": Call(
        training.iterate,
        _dense(ratio=0.4, steps=1, progress=False),
        (
            "retrain",
            "data",
            "loss",
            "optimizer",
            "checkpoint",
            "options",
            *depcut.options.IterateKeywords.__annotations__,
        ),
    ),
    "Gradual": Call(
        _gradual,
        _dense(ratio=0.4, start=0, end=2, every=1),
        ("initial", "data", "loss", "options", *depcut.options.GradualKeywords.__annotations__),
    ),
    "Gradual.load_state_dict": Call(_masked_state, _quiet(state=None), refused=True),
    "schedule": Call(
        _schedule,
        lambda: {"name": "clr", "optimizer": sgd(net()), "original": 0.1, "steps": 4},
        ("distance",),
    ),
    "OriginalSchedule": Call(
        training.OriginalSchedule, _quiet(), _names(training.OriginalSchedule)
    ),
    "Distillation": Call(
        _distil,
        lambda: {"dense": analysis().model, "slim": slim(), "plan": plan()},
        (
            "temperature",
            "output_weight",
            "hidden",
            "hidden_weight",
            "share",
            "logits",
            "dim",
        ),
    ),
    "GroupLasso": Call(
        lambda **k: training.GroupLasso(**k)(),
        lambda: {"analysis": analysis(), "strength": 0.1},
        ("ignore",),
    ),
    "GrowingRegularization": Call(
        lambda **k: training.GrowingRegularization(**k)(),
        lambda: {"analysis": analysis(), "plan": plan()},
        ("increment", "every", "ceiling"),
    ),
    "budget_phases": Call(
        training.budget_phases, _quiet(epochs=10, ratio=0.5), ("cycles", "dense", "schedule")
    ),
    "run_phases": Call(
        training.run_phases,
        lambda: {
            "model": net(),
            "phases": training.budget_phases(4, 0.4),
            "inputs": inputs(),
            "train": lambda *_: None,
            "progress": False,
        },
        ("data", "loss", "optimizer", "checkpoint", "options"),
    ),
    "fresh": Call(
        training.fresh, lambda: {"model": net(), "plan": plan()}, ("inputs", "init", "seed")
    ),
    "scratch_epochs": Call(
        training.scratch_epochs, lambda: {"plan": plan(), "epochs": 3}, ("control",)
    ),
    "relative_distance": Call(training.relative_distance, lambda: {"model": net(), "plan": plan()}),
    "output_distance": Call(
        training.output_distance,
        lambda: {"dense": net(), "slim": slim(), "data": pairs()},
        ("batches",),
    ),
    "lottery_ticket": Call(
        training.lottery_ticket,
        lambda: {"model": net(), "plan": plan(), "snapshots": _snapshots()},
        ("step", "train", "inputs", "init", "seed"),
    ),
    "rewind": Call(
        training.rewind,
        lambda: {"model": net(), "plan": plan(), "snapshots": _snapshots()},
        ("step", "inputs"),
    ),
    "Snapshots": Call(_taken, lambda: {"steps": (0,)}, ("folder",)),
    "Snapshots.take": Call(
        lambda **k: training.Snapshots().take(**k), lambda: {"model": net(), "step": 0}
    ),
    "Snapshots.restore": Call(
        lambda **k: _snapshots().restore(**k), lambda: {"model": net(), "step": 0}
    ),
}
