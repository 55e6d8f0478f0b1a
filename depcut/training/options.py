"""What can be chosen for retraining beside the model, the data and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from depcut.errors import InputError
from depcut.options import Common
from depcut.support.checks import check_function, check_kind, check_number
from depcut.support.keywords import option
from depcut.training.distillation import Distillation
from depcut.training.schedules import OriginalSchedule, named

Schedule = str | Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Common):
    """What can be chosen for retraining. Immutable; `help(depcut.training.retrain)` lists all.

    Raises:
        InputError: A value is of the wrong type or out of its range.
    """

    schedule: Schedule = option(
        "auto",
        '"ft", "lrw", "slr", "clr", "llr", "allr" (see `depcut.training.schedule`), "auto" (with a '
        "plan or the dense model ALLR, else LLR), or a function of (optimizer, steps) that returns "
        "a schedule of torch's kind, stepped once a step. ALLR by name measures what the plan "
        'removed, as published; "auto" takes the distance of the outputs where that is less, so '
        "that a model which compensation has repaired is not damaged by a large rate.",
    )
    lr: float | None = option(
        None, "The peak rate; left out, that of `original` or of the optimizer."
    )
    original: OriginalSchedule | None = option(
        None, "The schedule of the dense training; FT, LRW and SLR need it."
    )
    maximize: bool = option(True, "Whether a larger metric is better.")
    dense: nn.Module | None = option(
        None, "The dense model; left out, the one that the plan was made for."
    )
    distillation: Distillation | None = option(
        None, "Of the dense model and this one; its `share` weighs it against the loss."
    )
    patience: int | None = option(
        None, "Stop after so many epochs in a row that are not the best so far."
    )
    every: int | None = option(None, "Write a checkpoint after so many steps, too.")
    mixed_precision: str | None = option(
        None, '"no", "fp16", "bf16" or "fp8"; left out, what accelerate was launched with.'
    )
    gradient_accumulation: int = option(1, "Batches that make one step.")
    max_grad_norm: float | None = option(None, "Clip the norm of the gradient.")
    accelerator: Any = option(
        None, "An accelerate.Accelerator to use in place of one made for the call."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flag("maximize")
        self._integer("patience", 1, optional=True)
        self._integer("every", 1, optional=True)
        self._integer("gradient_accumulation", 1)
        if self.dense is not None and not isinstance(self.dense, nn.Module):
            raise InputError(
                f"dense is a {type(self.dense).__name__}, not a torch.nn.Module",
                where="dense=",
                remedy="pass the dense model, or leave it out",
            )
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, float) and norm == math.inf):
            # infinity clips nothing
            check_number(norm, "max_grad_norm", "pass a positive number", above=0)
        if self.lr is not None:
            self._set("lr", check_number(self.lr, "lr", "pass a positive number", above=0))
        if self.mixed_precision is not None:
            remedy = 'pass "no", "fp16", "bf16" or "fp8", or leave it out'
            check_kind(self.mixed_precision, str, "mixed_precision", remedy)  # accelerate knows all
        self._check_parts()

    def _check_parts(self) -> None:
        """Refuse what is no schedule, no distillation, no accelerator."""
        if isinstance(self.schedule, str):
            if self.schedule != "auto":
                named(self.schedule)
        else:
            check_function(
                self.schedule, "schedule", "pass a name, or a function of (optimizer, steps)"
            )
        if self.original is not None:
            remedy = "pass depcut.training.OriginalSchedule(rates, length)"
            check_kind(self.original, OriginalSchedule, "original", remedy)
        if self.distillation is not None:
            remedy = "pass depcut.training.Distillation(dense, slim, plan)"
            check_kind(self.distillation, Distillation, "distillation", remedy)
        if self.accelerator is not None and not callable(
            getattr(self.accelerator, "prepare", None)
        ):
            raise InputError(
                f"accelerator is a {type(self.accelerator).__name__}",
                where="accelerator=",
                remedy="pass an accelerate.Accelerator, or leave it out",
            )


class RetrainKeywords(TypedDict, total=False):
    """Flat keywords of `retrain`."""

    seed: int
    resume: bool
    progress: bool
    schedule: Schedule
    lr: float | None
    original: OriginalSchedule | None
    maximize: bool
    dense: nn.Module | None
    distillation: Distillation | None
    patience: int | None
    every: int | None
    mixed_precision: str | None
    gradient_accumulation: int
    max_grad_norm: float | None
    accelerator: Any
