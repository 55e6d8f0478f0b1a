"""Inputs by gradient descent, and how much of it there is time and memory for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from depcut.capture.process_state import quiet
from depcut.synthetic.floats import Layout, Scales, Tensors
from depcut.synthetic.running import rows_that_fit
from depcut.synthetic.subject import ROWS, Leaves, Subject

STEPS, FEWEST_STEPS = 200, 60
RATE = 0.1  # of Adam, by the standard deviation of the noise; falls to zero along a half cosine
PROBED = 4  # rows by which time and memory are told
TIED = 1.1  # a scale is preferred to later ones up to so many times the least objective
SPARE = 0.9  # share of the time that is planned with

Objective = Callable[[Leaves], Tensor]  # of flat inputs: a scalar tensor
Draw = Callable[[int, torch.Generator, Scales], Tensors]  # rows, as `Layout.noise` does


@dataclass(frozen=True)
class Work:
    """How much is done.

    Attributes:
        groups: Rows that are optimised together, of each group.
        steps: Of each group.
        scales: Of the noise to begin with.
    """

    groups: tuple[int, ...]
    steps: int
    scales: Scales = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Found:
    """The best inputs of one descent.

    Attributes:
        leaves: Flat inputs.
        rows: Their number.
        first: The objective of what it began with.
        last: That of the best.
        whole: Whether it did all of its steps.
    """

    leaves: Leaves
    rows: int
    first: float
    last: float
    whole: bool


def probed(
    subject: Subject,
    plan: Layout,
    objective: Objective,
    nbytes: Callable[[], int],
    scales: Sequence[Scales],
    steps: int = STEPS,
) -> Work | None:
    """What the time and the memory suffice for, by steps of a few rows.

    Args:
        subject: The model.
        plan: What is made.
        objective: What a step differentiates.
        nbytes: Bytes of the values that the objective computed last.
        scales: Of the noise to begin with, of which that with the least objective is chosen.
        steps: Of a group.

    Returns:
        None where they suffice for nothing, or the objective is not finite.
    """
    rows, seconds = plan.rows or PROBED, math.inf
    values: list[float] = []
    for tried in (scales[0], *scales):  # the very first step does more, and is not counted
        generator = subject.generator(1)
        made = plan.noise(rows, generator, tried)
        start = time.monotonic()
        value = _differentiated(objective, plan, plan.leaves(made, generator), made)
        values.append(value if math.isfinite(value) else math.inf)
        seconds = min(seconds, time.monotonic() - start)
    least = min(values[1:])
    if least == math.inf:
        return None
    chosen = next(i for i, v in enumerate(values[1:]) if v <= TIED * least)
    device = next(iter(made.values())).device
    affordable = max(subject.left, 0.0) * SPARE * rows / max(seconds, 1e-9)
    fitting = rows_that_fit(nbytes(), rows, device)
    work = planned(subject.examples, affordable, fitting, plan.rows, steps)
    return work and replace(work, scales=scales[chosen])


def planned(
    examples: int, affordable: float, fitting: int, fixed: int | None, steps: int = STEPS
) -> Work | None:
    """How many rows are optimised, together and in all, and in how many steps.

    Fewer rows than asked for are made before there are fewer steps, down to one group; then there
    are fewer steps, down to the fewest; then the group is smaller.

    Args:
        examples: Rows that are asked for.
        affordable: Steps of one row that there is time for.
        fitting: Rows that there is memory for at once.
        fixed: Rows of every call, where the batch is not free.
        steps: Of a group, where there is time for them.

    Returns:
        None where there is no time for the fewest steps of two rows, or of one call.
    """
    group = fixed or max(2, min(ROWS, examples, fitting))
    whole, rest = divmod(int(min(examples, affordable / steps)), group)
    if whole:
        return Work((group,) * whole + ((rest,) if rest > 1 and fixed is None else ()), steps)
    fewest = min(FEWEST_STEPS, steps)
    if affordable / group >= fewest:
        return Work((group,), int(affordable / group))
    fewer = int(affordable / fewest)
    return Work((fewer,), fewest) if fewer > 1 and fixed is None else None


def descents(
    subject: Subject,
    plan: Layout,
    objective_of: Callable[[int], Objective],
    work: Work,
    draw: Draw | None = None,
) -> list[Found]:
    """The inputs of every group; without one that the time ended in, but for the first.

    Args:
        subject: The model.
        plan: What is made.
        objective_of: What is made small, for the number of a group.
        work: How much is done.
        draw: What a group begins with; left out, white noise.
    """
    out: list[Found] = []
    for number, rows in enumerate(work.groups):
        told = _share_of(subject, number, len(work.groups))
        generator = subject.generator(2 + number)
        made = (draw or plan.noise)(rows, generator, work.scales)
        objective = objective_of(number)
        found = _descended(subject, plan, objective, made, generator, work, told)
        if found.whole or not number:
            out.append(found)
        if not found.whole:
            break
    return out


def _share_of(subject: Subject, number: int, groups: int) -> Callable[[float], None]:
    return lambda share: subject.advance((number + share) / groups)


def _descended(
    subject: Subject,
    plan: Layout,
    objective: Objective,
    made: Tensors,
    generator: torch.Generator,
    work: Work,
    told: Callable[[float], None],
) -> Found:
    given, best, steps = plan.leaves(made, generator), made, work.steps
    rows = len(next(iter(made.values())))
    settings = [{"params": t, "share": RATE * work.scales[p][1]} for p, t in made.items()]
    optimizer = torch.optim.Adam(settings, RATE)
    first = last = math.inf
    whole = False
    for step in range(steps + 1):
        value = _differentiated(objective, plan, given, made)
        first = value if not step else first
        if value < last:
            last, best = value, {p: t.detach().clone() for p, t in made.items()}
        told(step / steps)
        whole = step == steps
        if whole or not math.isfinite(value) or subject.left <= 0:
            break
        for setting in optimizer.param_groups:
            setting["lr"] = setting["share"] * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    return Found(plan.replaced(given, best), rows, first, last, whole)


def _differentiated(objective: Objective, plan: Layout, given: Leaves, made: Tensors) -> float:
    """The objective, after which the tensors that are made have its gradients."""
    tensors = list(made.values())
    for tensor in tensors:
        tensor.requires_grad_()
    with quiet():
        value = objective(plan.replaced(given, made))
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    return float(value.detach())
