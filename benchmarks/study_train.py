"""Jobs of the study that train: tickets and their controls, and large-sparse against small-dense.

All that is compared trains for the same number of steps, on the same batches in the same order,
with the dense training's optimizer. T is the number of steps of the dense training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accuracy_tasks import Hook, Objective, Task, one_cycle, optimizer_of, step_through, train
from measure import Row
from study_prune import Job, Subject
from study_sparse import by_magnitude, matrices, nonzero
from torch import Tensor, nn

import depcut
from depcut.training.gradual import cubic

REMOVED = (0.5, 0.8, 0.9)
EARLY = 0.05  # of T: the step of the early ticket
ORDER = 20_000  # seeds of the batches that retraining sees, apart from those of the dense net
FINE, FINER = 0.1, 0.01  # fine-tuning's constant rates, of the peak
SHORT = 0.25  # of T
CYCLES = 3
GROWS = 0.5  # share of gradual training in which zeros grow
MASKS = 20  # times that they grow
AT_START = ("random", "magnitude", "snip", "grasp", "synflow")
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


def _raw(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=RAW_STD)
    positions = getattr(module, "positions", None)
    if isinstance(positions, nn.Parameter):
        nn.init.normal_(positions, std=RAW_STD)


def tickets(subject: Trained) -> Iterator[Job]:
    """The same small architecture after the same steps, from different weights and rates."""
    for name, run in TICKETS.items():
        yield Job("tickets", name, partial(_rows, subject, run))
    yield Job("tickets", "dense, rate rewound", partial(_dense_again, subject))


def _dense_again(subject: Trained) -> Iterator[Row]:
    """The control of what goes on from trained weights: all units, for as many steps more."""
    start = time.process_time()
    model = subject.retrained(copy.deepcopy(subject.model), subject.length, subject.rates)
    yield {
        "removed": 0.0,
        **subject.judged(model),
        **subject.sized(model),
        "steps": subject.length,
        "seconds": round(time.process_time() - start, 1),
    }


def _rows(subject: Trained, run: Callable[[Trained, depcut.Plan], tuple[nn.Module, int]]) -> Any:
    for removed in REMOVED:
        plan = subject.plan(removed)
        start = time.process_time()
        model, steps = run(subject, plan)
        seconds = round(time.process_time() - start, 1)
        yield {
            "removed": removed,
            **subject.judged(model),
            **subject.sized(model),
            "steps": steps,
            "seconds": seconds,
        }


Ran = tuple[nn.Module, int]


def _pruned(subject: Trained, plan: depcut.Plan) -> nn.Module:
    return plan.apply(subject.model, progress=False)


def none(subject: Trained, plan: depcut.Plan) -> Ran:
    """Cut, and not trained."""
    return _pruned(subject, plan), 0


def _fine_tuned(share: float, subject: Trained, plan: depcut.Plan) -> Ran:
    """Trained weights, at a constant share of the peak rate."""
    rates = [share * subject.task.recipe.rate]
    return subject.retrained(_pruned(subject, plan), subject.length, rates), subject.length


def rate_rewound(subject: Trained, plan: depcut.Plan) -> Ran:
    """Trained weights, at the dense training's rates (Renda et al. 2020)."""
    rates = subject.rates
    return subject.retrained(_pruned(subject, plan), subject.length, rates), subject.length


def _linear(share: float, subject: Trained, plan: depcut.Plan) -> Ran:
    """Trained weights, from the peak rate to zero (Zimmer et al. 2023)."""
    steps = round(share * subject.length)
    rates = _falling(subject, steps)
    return subject.retrained(_pruned(subject, plan), steps, rates), steps


def _falling(subject: Trained, steps: int) -> list[float]:
    peak = subject.task.recipe.rate
    return [peak * (1 - step / steps) for step in range(steps)]


def _cycles(subject: Trained, plan: depcut.Plan) -> Ran:
    """Part of the units at a time, each time with a linear schedule (Renda et al. 2020)."""
    bounds = [subject.length * cycle // CYCLES for cycle in range(CYCLES + 1)]

    def retrain(model: nn.Module, cycle: int) -> None:
        steps = bounds[cycle + 1] - bounds[cycle]
        subject.retrained(model, steps, _falling(subject, steps))

    made = depcut.training.iterate(
        subject.model,
        plan.settings["ratio"],
        subject.inputs,
        steps=CYCLES,
        retrain=retrain,
        score="magnitude",
        compensate=False,
        align=1,
        progress=False,
    )
    return made.model.eval(), subject.length


def _random_units(subject: Trained, plan: depcut.Plan) -> Ran:
    """Trained weights of units that were drawn, as many as the plan keeps; else rate_rewound."""
    drawn = subject.analysis.plan(
        plan.settings["ratio"], score="random", align=1, seed=subject.seed
    )
    return rate_rewound(subject, drawn)


def distilled(subject: Trained, plan: depcut.Plan) -> Ran:
    """As rate_rewound, with the dense model's outputs as half of the loss."""
    slim = _pruned(subject, plan)
    with depcut.training.Distillation(subject.model, slim, plan) as distill:

        def objective(outputs: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            own = subject.task.loss(outputs, targets)
            return 0.5 * own + 0.5 * distill(outputs, inputs)

        subject.retrained(slim, subject.length, subject.rates, objective=objective)
    return slim, subject.length


def ticket(subject: Trained, plan: depcut.Plan) -> Ran:
    """The initial weights of what stays (Frankle & Carbin 2019)."""
    slim = depcut.training.rewind(subject.model, plan, subject.snapshots, 0)
    return subject.retrained(slim, subject.length, subject.rates), subject.length


def early_ticket(subject: Trained, plan: depcut.Plan) -> Ran:
    """The weights after 5 % of T of what stays, and the other 95 % of T again."""
    slim = depcut.training.rewind(subject.model, plan, subject.snapshots, subject.early)
    steps = subject.length - subject.early
    return subject.retrained(slim, steps, subject.rates[subject.early :]), steps


def scratch_e(subject: Trained, plan: depcut.Plan) -> Ran:
    """New random weights, T steps: the ticket's control, and Scratch-E of Liu et al. 2019."""
    return subject.retrained(subject.drawn(plan), subject.length, subject.rates), subject.length


def scratch_b(subject: Trained, plan: depcut.Plan) -> Ran:
    """New random weights, as much compute as the dense training, at most 2 T (Liu et al. 2019).

    With half of the MACs or less: as many steps as the dense net and its retraining had together.
    """
    steps = depcut.training.scratch_epochs(plan, subject.length, "B")
    return subject.retrained(subject.drawn(plan), steps, subject.stretched(steps)), steps


TICKETS: Mapping[str, Callable[[Trained, depcut.Plan], Ran]] = {
    "none": none,
    "fine-tuned at 1 %": partial(_fine_tuned, FINER),
    "fine-tuned": partial(_fine_tuned, FINE),
    "rate rewound": rate_rewound,
    "random units, rate rewound": _random_units,
    "linear": partial(_linear, 1.0),
    "linear, T/4": partial(_linear, SHORT),
    "linear, three cycles": _cycles,
    "distilled": distilled,
    "ticket of step 0": ticket,
    "early ticket": early_ticket,
    "scratch-E": scratch_e,
    "scratch-B": scratch_b,
}


def before_training(subject: Trained) -> Iterator[Job]:
    """Units chosen by the initial weights, which are then trained for T steps."""
    for name in AT_START:
        yield Job("before_training", name, partial(_from_the_start, subject, name))


def _from_the_start(subject: Trained, criterion: str) -> Iterator[Row]:
    model = subject.snapshots.restore(subject.model, 0).eval()
    analysis = depcut.analyze(model, subject.inputs)
    data = analysis.calibrate(
        subject.pairs, loss=subject.task.loss, batches=len(subject.pairs), progress=False
    )
    for removed in REMOVED:
        start = time.process_time()
        plan = analysis.plan(
            removed, data=data, score=criterion, allocation="global", align=1, seed=subject.seed
        )
        slim = plan.apply(model, compensate=False, progress=False)
        subject.retrained(slim, subject.length, subject.rates)
        yield {
            "removed": removed,
            **subject.judged(slim),
            **subject.sized(slim),
            "least": _least_share(plan),
            "steps": subject.length,
            "seconds": round(time.process_time() - start, 1),
        }


def _least_share(plan: depcut.Plan) -> float:
    """What is left of the group that lost most: near zero where layers collapse."""
    shares = [np.shape(kept)[-1] / plan.sizes[name] for name, kept in plan.kept.items()]
    return round(min(shares, default=1.0), 4)


def sparse_dense(subject: Trained) -> Iterator[Job]:
    """Equal numbers of parameters that are not zero, 2 T steps in all (Zhu & Gupta 2017)."""
    for name, run in (
        ("large-sparse, gradual", partial(_gradual_sparse, 1.0)),
        ("large-sparse, a tenth of the rate", partial(_gradual_sparse, 0.1)),
        ("large-sparse, three times the rate", partial(_gradual_sparse, 3.0)),
        ("gradual, structured", _gradual_structured),
        ("small-dense", _small_dense),
    ):
        yield Job("sparse_dense", name, partial(_at_equal_params, subject, run))


def _at_equal_params(subject: Trained, run: Callable[[Trained, float], nn.Module]) -> Iterator[Row]:
    for removed in REMOVED:
        start = time.process_time()
        try:
            model = run(subject, removed)
        except depcut.DepcutError as error:
            yield {"removed": removed, "error": error.what}
            continue
        yield {
            "removed": removed,
            **subject.judged(model),
            "params": round(nonzero(model) / subject.params, 5),
            "steps": 2 * subject.length,
            "seconds": round(time.process_time() - start, 1),
        }


def _gradual_sparse(times: float, subject: Trained, removed: float) -> nn.Module:
    """The smallest weights of all matrices are zero, more of them as training goes on.

    The rates are those of the dense training times a factor.
    """
    model = copy.deepcopy(subject.model)
    # Biases and norms stay whole: the matrices carry the whole of what goes.
    share = removed * subject.params / sum(m.weight.numel() for m in matrices(model).values())
    end = round(GROWS * subject.length)
    every = max(1, end // MASKS)
    masks: dict[str, Tensor] = {}

    def hook(model: nn.Module, step: int) -> None:
        if step == end or (step < end and step % every == 0):
            by_magnitude(model, subject, min(1.0, cubic(step, 0, end, 0.0, share)))
            masks.update({n: m.weight.data != 0 for n, m in matrices(model).items()})
        _enforce(model, masks)

    rates = [times * rate for rate in subject.rates]
    model = subject.retrained(model, subject.length, rates, hook)
    _enforce(model, masks)
    return model


def _enforce(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_submodule(name).weight.data *= mask


def _gradual_structured(subject: Trained, removed: float) -> nn.Module:
    """The same schedule for whole units."""
    model, end = copy.deepcopy(subject.model), round(GROWS * subject.length)
    masks = depcut.training.Gradual(
        model,
        removed,
        subject.inputs,
        start=0,
        end=end,
        every=max(1, end // MASKS),
        of="params",
        score="magnitude",
        align=1,
    )
    subject.retrained(
        model, subject.length, subject.rates, hook=lambda _, step: masks.step() if step else None
    )
    masks.step()  # the hook comes before a step, and so not after the last one
    return masks.commit().eval()


def _small_dense(subject: Trained, removed: float) -> nn.Module:
    """A narrow net of its own, trained as long as the others in all."""
    drawn, steps = subject.drawn(subject.plan(removed, of="params")), 2 * subject.length
    return subject.retrained(drawn, steps, subject.stretched(steps))
