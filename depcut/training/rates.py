"""The learning rates of `depcut.training.retrain`: peak rate, schedule and its distance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from depcut.apply.plan import Plan
from depcut.errors import InputError
from depcut.support.checks import check_number
from depcut.training.batches import Loader
from depcut.training.distance import relative_distance
from depcut.training.options import Schedule
from depcut.training.outputs import BATCHES, distance_over
from depcut.training.schedules import OriginalSchedule, named
from depcut.training.streams import DATA


@dataclass(frozen=True, eq=False)
class Start:
    """What is known of a model that will be retrained.

    Attributes:
        net: The model.
        data: What it will be trained on.
        plan: That made it, or None.
        dense: The dense model, or None: the plan's.
        seed: Of the training.
        asked: What the run that goes on was asked for, settings included; empty for a fresh one.
    """

    net: nn.Module
    data: Loader
    plan: Plan | None
    dense: nn.Module | None
    seed: int
    asked: Mapping[str, Any]

    @property
    def dense_model(self) -> nn.Module | None:
        """The dense model, if it is known."""
        return self.dense if self.dense is not None or self.plan is None else self.plan.model

    def outputs(self, accelerator: Any) -> float | None:
        """Distance of the outputs on the first batches, or what it was when the run began.

        None where it cannot be told: without a dense model, or if outputs are not finite.
        """
        if self.dense_model is None:
            return None
        before = self.asked.get("output_distance")
        if before is not None:
            return float(before)
        batches = islice(self.data.read(self.seed, DATA, 0), BATCHES)
        distance = torch.tensor(distance_over(self.dense_model, self.net, batches))
        if accelerator.num_processes > 1:
            distance = accelerator.reduce(distance.to(accelerator.device), "mean")
        return float(distance) if torch.isfinite(distance) else None


def peak_rate(lr: float | None, original: OriginalSchedule | None, optimizer: Any) -> float:
    """The largest rate of a retraining.

    Raises:
        InputError: Nothing says what it is, or it is not positive.
    """
    if lr is None and original is not None:
        return original.top
    if lr is None and isinstance(optimizer, torch.optim.Optimizer):
        lr = max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)
    if lr is None:
        raise InputError(
            "there is no learning rate",
            where="lr=",
            remedy="pass lr=, the largest rate of the dense training, or original=",
        )
    return check_number(lr, "lr", "pass a positive number", above=0)


def schedule_of(
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: Start,
    *,
    peak: float,
    original: OriginalSchedule | None,
    accelerator: Any,
) -> tuple[Any, dict[str, Any]]:
    """The schedule, and what there is to say about it.

    Args:
        schedule: As of `depcut.training.retrain`.
        optimizer: Whose rates it sets.
        steps: T_rt.
        start: The model that is retrained.
        peak: The largest rate.
        original: The schedule of the dense training, if known.
        accelerator: Of accelerate.

    Raises:
        InputError: It is no schedule, or needs what is not there.
    """
    if not isinstance(schedule, str):
        rates = schedule(optimizer, steps)
        if not all(callable(getattr(rates, n, None)) for n in ("step", "state_dict")):
            raise InputError(
                f"the schedule is a {type(rates).__name__}",
                where="schedule=",
                remedy="return one of torch.optim.lr_scheduler's kind",
            )
        return rates, {"schedule": type(rates).__name__, "lr": peak, "steps": steps}
    settings: dict[str, Any] = {"schedule": schedule, "lr": peak, "steps": steps}
    distance = None
    if schedule == "auto":
        outputs = start.outputs(accelerator)
        known = [_removed(start)] if start.plan is not None else []
        known += [] if outputs is None else [outputs]
        settings |= {"schedule": "allr" if known else "llr", "output_distance": outputs}
        distance = min(known, default=None)
    elif schedule.lower() == "allr":
        distance = _removed(start)
    kind = named(settings["schedule"])
    given = OriginalSchedule(peak=peak) if original is None else replace(original, peak=peak)
    rates = kind(optimizer, given, steps, distance=distance)
    return rates, {**settings, "distance": distance}


def _removed(start: Start) -> float:
    """Distance of the weights, which needs the plan and the dense model."""
    if start.plan is None or start.dense_model is None:
        raise InputError(
            "ALLR measures what pruning removed, and there is no "
            + ("plan" if start.plan is None else "dense model"),
            where="schedule='allr'",
            remedy="pass plan= and dense=, or use schedule='llr'",
        )
    return relative_distance(start.dense_model, start.plan)
