"""Jobs of the study that train small nets: tickets, retraining and their controls."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from measure import Row
from study_prune import Job
from study_train import REMOVED, Trained
from torch import Tensor, nn

import depcut

FINE, FINER = 0.1, 0.01  # fine-tuning's constant rates, of the peak
SHORT = 0.25  # of T
CYCLES = 3
FROM, TO = 0.2, 0.7  # shares of T between which units go in training that prunes as it goes
AT_START = ("random", "magnitude", "snip", "grasp", "synflow")


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


Ran = tuple[nn.Module, int]  # the model, and the steps that it has had since the dense one
Run = Callable[[Trained, depcut.Plan], Ran]


def _rows(subject: Trained, run: Run) -> Iterator[Row]:
    for removed in REMOVED:
        plan = subject.plan(removed)
        start = time.process_time()
        try:
            model, steps = run(subject, plan)
        except depcut.DepcutError as error:
            yield {"removed": removed, "error": error.what}
            continue
        seconds = round(time.process_time() - start, 1)
        yield {
            "removed": removed,
            **subject.judged(model),
            **subject.sized(model),
            "steps": steps,
            "seconds": seconds,
        }


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
    rates = subject.falling(steps)
    return subject.retrained(_pruned(subject, plan), steps, rates), steps


def _cycles(subject: Trained, plan: depcut.Plan) -> Ran:
    """Part of the units at a time, each time with a linear schedule (Renda et al. 2020)."""
    bounds = [subject.length * cycle // CYCLES for cycle in range(CYCLES + 1)]

    def retrain(model: nn.Module, cycle: int) -> None:
        steps = bounds[cycle + 1] - bounds[cycle]
        subject.retrained(model, steps, subject.falling(steps))

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


def budgeted(subject: Trained, plan: depcut.Plan) -> Ran:
    """Dense for T / 2, pruned, and T / 2 with a linear schedule (Zimmer et al. 2023: BIMP)."""
    model, steps = subject.budgeted, subject.length - subject.length // 2
    own = depcut.analyze(model, subject.inputs).plan(
        plan.settings["ratio"], score="magnitude", align=1
    )
    slim = own.apply(model, progress=False)
    return subject.retrained(slim, steps, subject.falling(steps)), subject.length


def pruned_while_trained(subject: Trained, plan: depcut.Plan) -> Ran:
    """One training of T steps from the start, in which units go (Zhu & Gupta 2017)."""
    model = subject.snapshots.restore(subject.model, 0)
    start, end = round(FROM * subject.length), round(TO * subject.length)
    return subject.shrinking(model, plan.settings["ratio"], "macs", start, end), subject.length


TICKETS: Mapping[str, Run] = {
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
    "budgeted: T/2 dense, T/2 pruned": budgeted,
    "pruned while trained, T in all": pruned_while_trained,
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
