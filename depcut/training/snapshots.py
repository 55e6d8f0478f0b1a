"""Weight rewinding: kept weights go back to what they were early in the dense training.

Sources: Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019; Renda et al., Comparing
Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.apply.plan import Plan
from depcut.capture.inputs import Inputs
from depcut.capture.plain import check_whole
from depcut.capture.random_state import preserved
from depcut.errors import InputError, listed
from depcut.rewrite.copying import copied
from depcut.support import files
from depcut.support.checks import (
    LARGEST,
    check_function,
    check_integer,
    check_items,
    check_kind,
    check_path,
)
from depcut.support.weights import load_weights, save_weights
from depcut.training.fresh import Init, fresh


class Snapshots:
    """Weights of a dense model at chosen iterations of its training.

    In a loop, call it once an iteration, before the optimizer's step:

        snapshots = depcut.training.Snapshots(steps=(0, 500), folder="snapshots")
        for step, (x, y) in enumerate(loader):
            snapshots(model, step)
            ...

    Args:
        steps: When a call takes a snapshot; 0 is the initialisation.
        folder: Where to keep them, as safetensors; left out, in memory. Those that are there
            already can be used.
    """

    def __init__(
        self, steps: Collection[int] = (0,), folder: str | os.PathLike[str] | None = None
    ) -> None:
        remedy = "pass numbers of steps, such as (0, 500)"
        listed_steps = check_items(steps, "steps", remedy)
        self.wanted = frozenset(
            check_integer(step, "steps", 0, LARGEST, remedy=remedy) for step in listed_steps
        )
        self.folder = None if folder is None else check_path(folder, "folder")
        self._held: dict[int, dict[str, torch.Tensor]] = {}
        if self.folder is not None:
            files.make_folder(self.folder, "folder=", InputError)

    def __call__(self, model: nn.Module, step: int) -> bool:
        """Take a snapshot if the step is one of those chosen; whether it was."""
        if step in self.wanted:
            self.take(model, step)
            return True
        return False

    def take(self, model: nn.Module, step: int) -> None:
        """Keep the model's parameters and buffers as they are now.

        Args:
            model: The model; it is only read.
            step: To find them again.

        Raises:
            DepcutError: The file cannot be written.
        """
        model, step = check_whole(model), check_integer(step, "step", 0, LARGEST)
        if self.folder is not None:
            save_weights(model, self._path(step))
        else:
            state = model.state_dict()
            self._held[step] = {n: t.detach().cpu().clone() for n, t in state.items()}

    @property
    def taken(self) -> tuple[int, ...]:
        """The steps of which there are snapshots, ascending."""
        if self.folder is None:
            return tuple(sorted(self._held))
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(match[1]) for match in matches if match))

    def restore(self, model: nn.Module, step: int = 0) -> nn.Module:
        """A copy of the model that holds a snapshot.

        Args:
            model: An instance of the architecture; it is not changed.
            step: Of the snapshot.

        Raises:
            InputError: There is no such snapshot, or it is of another architecture.
        """
        model, step = check_whole(model), check_integer(step, "step", 0, LARGEST)
        if step not in self.taken:
            raise InputError(
                f"there is no snapshot of step {step}",
                where="Snapshots",
                remedy=f"there are {listed([str(s) for s in self.taken]) or 'none'}; call "
                "snapshots.take(model, step) during the dense training",
            )
        new: nn.Module = copied(model, {})
        if self.folder is not None:
            load_weights(new, self._path(step))
            return new
        held = self._held[step]
        theirs = {n: tuple(t.shape) for n, t in new.state_dict().items()}
        odd = [n for n in {**held, **theirs} if n not in held or theirs.get(n) != held[n].shape]
        if odd:
            raise InputError(
                f"the snapshot does not fit the model: {listed(odd)}",
                where=f"Snapshots, step {step}",
                remedy="pass the dense model that the snapshot was taken of",
            )
        new.load_state_dict(held)
        return new

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{step}.safetensors"


_NAME = re.compile(r"step-(\d+)\.safetensors")


def rewind(
    model: nn.Module,
    plan: Plan | Sequence[Plan],
    snapshots: Snapshots,
    step: int = 0,
    *,
    inputs: Inputs = None,
) -> nn.Module:
    """The smaller model with its kept weights as they were early in the training.

    Args:
        plan: Made on the trained weights; of repeated pruning, the plans in their order.
        model: The dense model, trained or not; it is not changed.
        snapshots: Of the dense model.
        step: Which snapshot.
        inputs: Example inputs; left out, those of the plan.

    Raises:
        InputError: There is no such snapshot, or it does not fit.
        PlanError: The model has another architecture.
    """
    check_kind(snapshots, Snapshots, "snapshots", "pass a depcut.training.Snapshots")
    remedy = "pass what analysis.plan(...) returned; of repeated pruning, a list of them"
    plans = (plan,) if isinstance(plan, Plan) else check_items(plan, "plan", remedy)
    for each in plans or (None,):
        check_kind(each, Plan, "plan", remedy)
    small = snapshots.restore(model, step)
    for each in plans:
        small = each.apply(small, inputs, progress=False)
    return small


@dataclass(frozen=True)
class LotteryTicket:
    """A winning ticket beside its control.

    Attributes:
        ticket: The smaller model with the weights of the snapshot.
        random: The same architecture, newly drawn.
        ticket_result: What the train function returned for the ticket; None without one.
        random_result: The same of the control.
    """

    ticket: nn.Module
    random: nn.Module
    ticket_result: Any = None
    random_result: Any = None


def lottery_ticket(
    model: nn.Module,
    plan: Plan,
    snapshots: Snapshots,
    step: int = 0,
    *,
    train: Callable[[nn.Module], Any] | None = None,
    inputs: Inputs = None,
    init: Init | str | None = None,
    seed: int = 0,
) -> LotteryTicket:
    """A rewound model and the same architecture newly drawn (Frankle & Carbin 2019, section 2).

    Args:
        plan: Made on the trained weights.
        model: The dense model; it is not changed.
        snapshots: Of its training.
        step: Which snapshot.
        train: Trains and judges one model; called for both, each with the same random state. What
            it raises is not caught.
        inputs: Example inputs; left out, those of the plan.
        init: See `depcut.training.fresh`.
        seed: Of the random draw.

    Raises:
        DepcutError: See `depcut.training.rewind` and `depcut.training.fresh`.
    """
    check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
    if train is not None:
        check_function(train, "train", "pass a function of a model")
    ticket = rewind(model, plan, snapshots, step, inputs=inputs)
    random = fresh(model, plan, inputs=inputs, init=init, seed=seed)
    if train is None:
        return LotteryTicket(ticket, random)
    results = []
    for each in (ticket, random):
        with preserved():
            results.append(train(each))
    return LotteryTicket(ticket, random, *results)
