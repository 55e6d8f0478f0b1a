"""Training, as the study's jobs repeat it.

All that is compared trains for the same number of steps, on the same batches in the same order,
with the dense training's optimizer. T is the number of steps of the dense training.
"""

from __future__ import annotations

from functools import cached_property

import torch
from accuracy_tasks import Hook, Objective, Task, one_cycle, optimizer_of, step_through, train
from study_prune import Subject
from torch import nn

import depcut

REMOVED = (0.5, 0.8, 0.9)
EARLY = 0.05  # of T: the step of the early ticket
ORDER = 20_000  # seeds of the batches that retraining sees, apart from those of the dense net
MASKS = 20  # times that zeros grow in gradual training
RAW_STD = 0.02  # of embeddings and positions, as their constructors draw them


class Trained(Subject):
    """A subject whose training can be repeated from its first and its early step."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__(task, seed)
        self.length = task.recipe.steps

    @property
    def early(self) -> int:
        return round(EARLY * self.length)

    @cached_property
    def snapshots(self) -> depcut.training.Snapshots:
        """Of the dense training, which is repeated for them.

        Raises:
            RuntimeError: Repeating gives other weights; the cached ones are from another machine.
        """
        taken = depcut.training.Snapshots((0, self.early))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.task.build()
            train(self.task, model, self.seed, taken)
        state = self.model.state_dict()
        if not all(torch.equal(t, state[n]) for n, t in model.state_dict().items()):
            path = self.task.path(self.seed)
            raise RuntimeError(f"repeating the training gives other weights: remove {path}")
        return taken

    @cached_property
    def budgeted(self) -> nn.Module:
        """The dense net after a training of its own, of T / 2 steps (Zimmer et al. 2023: BIMP)."""
        model, steps = self.snapshots.restore(self.model, 0), self.length // 2
        optimizer = optimizer_of(self.task, model)
        schedule = one_cycle(self.task, optimizer, steps)
        step_through(self.task, model, optimizer, schedule, steps, self.seed)
        return model.eval()

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

    def plan(self, removed: float, of: str = "macs") -> depcut.Plan:
        """By magnitude, the same share of every layer."""
        return self.analysis.plan(removed, of=of, score="magnitude", align=1)

    def drawn(self, plan: depcut.Plan) -> nn.Module:
        """The plan's architecture with new weights, as its constructor draws them."""
        return depcut.training.fresh(self.model, plan, init=_raw, seed=self.seed)

    def retrained(
        self,
        model: nn.Module,
        steps: int,
        rates: list[float],
        hook: Hook | None = None,
        objective: Objective | None = None,
    ) -> nn.Module:
        """Train in place for a number of steps at these rates."""
        optimizer = optimizer_of(self.task, model)
        peak = self.task.recipe.rate
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rates[min(step, len(rates) - 1)] / peak
        )
        step_through(
            self.task, model, optimizer, schedule, steps, ORDER + self.seed, hook, objective
        )
        return model.eval()

    def stretched(self, steps: int) -> list[float]:
        """The dense training's rates over another number of steps."""
        last = self.length - 1
        return [self.rates[round(step * last / max(1, steps - 1))] for step in range(steps)]

    def falling(self, steps: int) -> list[float]:
        """From the peak rate to zero."""
        peak = self.task.recipe.rate
        return [peak * (1 - step / steps) for step in range(steps)]

    def shrinking(
        self, model: nn.Module, removed: float, of: str, start: int, end: int
    ) -> nn.Module:
        """Train in place for T steps at the dense training's rates; units go from start to end."""
        masks = depcut.training.Gradual(
            model,
            removed,
            self.inputs,
            start=start,
            end=end,
            every=max(1, (end - start) // MASKS),
            of=of,
            score="magnitude",
            align=1,
        )
        self.retrained(
            model, self.length, self.rates, hook=lambda _, step: masks.step() if step else None
        )
        masks.step()  # the hook comes before a step, and so not after the last one
        return masks.commit().eval()


def _raw(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=RAW_STD)
    positions = getattr(module, "positions", None)
    if isinstance(positions, nn.Parameter):
        nn.init.normal_(positions, std=RAW_STD)
