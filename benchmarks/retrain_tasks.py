"""A dense model, how it was trained, its pruned starts, and how they are retrained."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import accuracy_peer as peer
import measure
import torch
from accuracy import Dense
from accuracy_tasks import Hook, Task, one_cycle, optimizer_of, step_through, store, train
from retrain_summary import AUTO, FT_SHARE
from safetensors.torch import load_file
from torch import nn

import depcut

EARLY = 0.05  # of T: the early snapshot
EMBEDDING_STD = 0.02  # of accuracy_nets.CharGPT, which its constructor draws


class Subject(Dense):
    """One trained model and all that its retraining needs.

    Args:
        task: Its task.
        seed: Of its training.
        budgets: Shares of T after which weight rewinding needs a snapshot, counted from the end.
    """

    def __init__(self, task: Task, seed: int, budgets: tuple[float, ...]) -> None:
        self.length = task.recipe.steps
        self.budgets = budgets
        if not task.path(seed).exists():
            self._take_snapshots(task, seed)
        super().__init__(task, seed)

    def steps(self, budget: float) -> int:
        """T_rt."""
        return round(budget * self.length)

    @cached_property
    def rates(self) -> list[float]:
        """Of the dense training, step by step."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], self.task.recipe.rate)
        schedule = one_cycle(self.task, optimizer, self.length)
        rates = []
        for _ in range(self.length):
            rates.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return rates

    @cached_property
    def analysis(self) -> Any:
        return depcut.analyze(self.model, self.inputs)

    @functools.cache  # noqa: B019  (one subject lives at a time)
    def plan(self, removed: float) -> depcut.Plan:
        """Magnitude selection."""
        return self.analysis.plan(removed, score="magnitude", align=1)

    @functools.cache  # noqa: B019
    def distance(self, removed: float) -> float:
        return depcut.training.relative_distance(self.model, self.plan(removed))

    @functools.cache  # noqa: B019
    def default_plan(self, removed: float) -> depcut.Plan:
        """Selection by obs."""
        return self.analysis.plan(removed, data=self.calibration, align=1, seed=self.seed)

    @cached_property
    def calibration(self) -> Any:
        return self.analysis.calibrate(
            self.pairs, loss=self.task.loss, batches=len(self.pairs), progress=False
        )

    def magnitude(self, removed: float) -> nn.Module:
        """Cut without compensation."""
        return copy.deepcopy(self._start("magnitude", removed))

    def default(self, removed: float) -> nn.Module:
        """Cut by obs, compensated."""
        return copy.deepcopy(self._start("default", removed))

    def default_distance(self, removed: float) -> float:
        """What `depcut.training.retrain(schedule="auto")` would take."""
        weights = depcut.training.relative_distance(self.model, self.default_plan(removed))
        return min(
            weights,
            depcut.training.output_distance(
                self.model, self._start("default", removed), self.pairs
            ),
        )

    def distance_of_peer(self, slim: nn.Module) -> float:
        """The same of a model whose weights were cut, and not changed."""
        energy, left = (
            sum(float(p.square().sum()) for p in m.parameters()) for m in (self.model, slim)
        )
        sizes = [measure.params_of(m) for m in (self.model, slim)]
        weights = math.sqrt((energy - left) / energy / (1 - sizes[1] / sizes[0]))
        return min(weights, depcut.training.output_distance(self.model, slim, self.pairs))

    @functools.cache  # noqa: B019
    def _start(self, kind: str, removed: float) -> nn.Module:
        if kind == "magnitude":
            return self.plan(removed).apply(self.model, progress=False)
        return self.default_plan(removed).apply(self.model, data=self.calibration, progress=False)

    def of_peer(self, name: str, removed: float) -> nn.Module:
        """Cut by a variant of Torch-Pruning."""
        variant = next(v for v in peer.variants(self.model) if v.name == name)
        return self.by_peer(variant, removed)[1]

    def retrain(
        self,
        model: nn.Module,
        name: str,
        steps: int,
        *,
        distance: float | None = None,
        hook: Hook | None = None,
    ) -> nn.Module:
        """By a schedule's name, in place, with the dense training's optimizer, batches and loss."""
        rates = [self.task.recipe.rate / 100] if name == FT_SHARE else self.rates
        name = {FT_SHARE: "ft", AUTO: "allr"}.get(name, name)
        return self._trained(
            model,
            steps,
            lambda o: depcut.training.schedule(
                name, o, depcut.training.OriginalSchedule(rates), steps, distance=distance
            ),
            hook,
        )

    def from_scratch(self, model: nn.Module, steps: int) -> nn.Module:
        """By the dense training's schedule, stretched to a number of steps."""
        return self._trained(model, steps, lambda o: one_cycle(self.task, o, steps))

    def _trained(
        self, model: nn.Module, steps: int, make: Callable[..., Any], hook: Hook | None = None
    ) -> nn.Module:
        optimizer = optimizer_of(self.task, model)
        order = 20_000 + self.seed  # the same for all that is compared, not that of the dense net
        step_through(self.task, model, optimizer, make(optimizer), steps, order, hook)
        return model.eval()

    @cached_property
    def snapshots(self) -> depcut.training.Snapshots:
        """Of the dense training, which is repeated for them if it was not this class that ran it.

        Raises:
            RuntimeError: Repeating gives other weights; the cached ones are from another machine.
        """
        return self._take_snapshots(self.task, self.seed)

    def _take_snapshots(self, task: Task, seed: int) -> depcut.training.Snapshots:
        """Kept beside the trained weights, which are stored, too, or must be the same."""
        at = {0, self.steps(EARLY), *(self.length - self.steps(b) for b in self.budgets)}
        weights = task.path(seed)
        folder = weights.with_name(weights.stem + "-snapshots")
        if folder.exists() and weights.exists():
            found = depcut.training.Snapshots(at, folder)
            if at <= set(found.taken):
                return found
        weights.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=weights.parent, prefix=f".{folder.name}.") as draft:
            taken = depcut.training.Snapshots(at, draft)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = task.build()
                train(task, model, seed, taken)
            if weights.exists():
                _assert_same(model, weights)
            folder.mkdir(exist_ok=True)
            for file in Path(draft).glob("step-*.safetensors"):
                file.replace(folder / file.name)
        if not weights.exists():
            store(weights, model)
        return depcut.training.Snapshots(at, folder)

    def drawn(self, removed: float) -> nn.Module:
        """The small architecture, newly drawn as the net's constructor draws."""
        return depcut.training.fresh(
            self.model, self.plan(removed), init=_embeddings, seed=self.seed
        )


def _assert_same(model: nn.Module, weights: Path) -> None:
    stored = load_file(weights)
    other = [n for n, t in model.state_dict().items() if not torch.equal(t, stored[n])]
    if other:
        raise RuntimeError(
            f"repeating the training gives other weights ({other[0]} and more): remove "
            f"{weights} and measure anew"
        )


def _embeddings(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
