"""Retraining in one call, for those who have no loop of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn

from depcut.capture.inputs import device_of
from depcut.capture.random_state import preserved
from depcut.errors import DepcutError, InputError, TrainingError
from depcut.plan.plan import Plan
from depcut.rewrite.copying import copied
from depcut.training.batches import Loader, open_loader
from depcut.training.checkpoint import Checkpoints, digest
from depcut.training.distillation import Distillation
from depcut.training.optimizers import Build, optimizer_for
from depcut.training.rates import Schedule, Start, peak_rate, schedule_of
from depcut.training.schedules import OriginalSchedule
from depcut.training.trainer import Loss, Metric, Options, Record, Trainer

# Attributes that accelerate leaves on a model; a second training would take it for prepared.
_TRACES = ("forward", "_original_forward", "_is_accelerate_prepared")


@dataclass(frozen=True)
class Retrained:
    """What `depcut.retrain` returns.

    Attributes:
        model: A trained copy with the weights of the best epoch; mode and device are the caller's.
        history: One record an epoch: epoch (from 1 on), steps, lr, loss, and with validation data
            valid_loss and metric; seconds.
        start: valid_loss and metric of the model as it came.
        best_epoch: The epoch whose weights these are: of the best metric, else of the lowest
            validation loss, else the last one. 0: no epoch was better than the start.
        stopped: Whether patience ran out.
        resumed: The step that a checkpoint was resumed from; 0 for a fresh start.
        settings: What was used: schedule, peak rate, distance, optimizer, steps.
    """

    model: nn.Module
    history: tuple[Record, ...]
    start: Record
    best_epoch: int
    stopped: bool
    resumed: int
    settings: dict[str, Any]


def retrain(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    *,
    epochs: int,
    loss: Loss | None = None,
    schedule: Schedule = "auto",
    lr: float | None = None,
    original: OriginalSchedule | None = None,
    optimizer: torch.optim.Optimizer | Build | None = None,
    metric: Metric | None = None,
    maximize: bool = True,
    plan: Plan | None = None,
    dense: nn.Module | None = None,
    distillation: Distillation | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    resume: bool = True,
    mixed_precision: str | None = None,
    gradient_accumulation: int = 1,
    max_grad_norm: float | None = None,
    seed: int = 0,
    accelerator: Any = None,
    progress: bool = True,
) -> Retrained:
    """Train a copy of a model, typically a smaller one whose accuracy shall come back.

    It runs on accelerate: on the GPU where there is one, in mixed precision, and in several
    processes if started by `accelerate launch` or `torchrun`.

    A run that was killed goes on when the same call is made with the same `checkpoint`, and ends
    with the weights that it would have had, bit for bit on a CPU with as many threads. For that,
    the order and the content of the batches must depend on nothing but random numbers: torch, numpy
    and random are seeded before each epoch, and so is a loader's own generator; batches that are
    done are read again and left aside. Afterwards the caller's random states are as before.

    Args:
        model: The model; it is not changed.
        train: An iterable that every epoch reads anew: (input, target) pairs or dicts of keyword
            arguments. In several processes each one takes every n-th batch, unless the loader has a
            DistributedSampler.
        valid: The same, to judge each epoch by.
        epochs: Passes over the data.
        loss: A function of (output, target) that returns a scalar; of an item that is no pair, it
            gets the whole item as target. May be left out with distillation.
        schedule: "ft", "lrw", "slr", "clr", "llr", "allr" (see `depcut.schedule`), "auto" (with a
            plan or the dense model ALLR, else LLR), or a function of (optimizer, steps) that
            returns a schedule of torch's kind, stepped once a step. ALLR by name measures what
            the plan removed, as published; "auto" takes the distance of the outputs where that is
            less, so that a model which compensation has mended is not damaged by a large rate.
        lr: The peak rate; left out, that of `original` or of the optimizer.
        original: The schedule of the dense training; FT, LRW and SLR need it.
        optimizer: One that trains `model` (a copy of it is used), a function of parameter groups,
            or None: SGD with Nesterov momentum 0.9 and weight decay 1e-4 where most parameters are
            in convolution kernels, else AdamW with weight decay 1e-2; biases and norms do not
            decay.
        metric: A function of (output, target) that returns the mean over the batch, of which larger
            is better.
        maximize: False: smaller is better.
        plan: That made the model from the dense one; for ALLR.
        dense: The dense model; left out, the one that the plan was made for.
        distillation: Of the dense model and this one; its `share` weighs it against the loss.
        patience: Stop after so many epochs in a row that are not the best so far.
        checkpoint: A folder for states, written after each epoch (safetensors and JSON).
        every: Write one after so many steps, too.
        resume: Whether to go on from what the folder holds; else it is cleared.
        mixed_precision: "no", "fp16", "bf16" or "fp8"; None: what accelerate was launched with.
        gradient_accumulation: Batches that make one step.
        max_grad_norm: Clip the norm of the gradient.
        seed: Of everything that draws.
        accelerator: An accelerate.Accelerator to use in place of one made here.
        progress: Whether to show a progress bar on standard error.

    Raises:
        InputError: An option has a wrong value, a loader is empty, the loss is no scalar.
        TrainingError: The loss is not finite, or the checkpoint is of another training.
        DepcutError: accelerate is not installed.
    """
    options = _options(
        epochs=epochs,
        loss=loss,
        metric=metric,
        maximize=maximize,
        patience=patience,
        every=every,
        accumulation=gradient_accumulation,
        max_grad_norm=max_grad_norm,
        seed=seed,
    )
    _check(model, dense, options, valid is not None, distillation)
    peak = peak_rate(lr, original, optimizer)
    with _accelerated(accelerator, mixed_precision) as found, preserved():
        ranks = {"rank": found.process_index, "world": found.num_processes}
        pairs = loss is not None
        data = open_loader(train, "train=", model, pairs=pairs, **ranks)
        judged = None if valid is None else open_loader(
            valid, "valid=", model, pairs=pairs or metric is not None, **ranks
        )  # fmt: skip
        store = _opened(checkpoint, resume, found)
        steps = epochs * -(-data.own // gradient_accumulation)
        with nullcontext() if distillation is None else distillation.paused():
            net = copied(model, {}).to(found.device)
            made = optimizer_for(optimizer, model, net, peak)
            start = Start(net, data, plan, dense, seed, store.asked() if store else {})
            rates, settings = schedule_of(
                schedule, made, steps, start, peak=peak, original=original, accelerator=found
            )
        settings |= {"optimizer": type(made).__name__, "mixed_precision": found.mixed_precision}
        run = {} if store is None else _identity(model, data, options, settings, found)
        teacher = None if distillation is None else distillation.of(net, found.device)
        trainer = Trainer(net, data, judged, options, made, rates, found, teacher, store, run)
        try:
            resumed = trainer.resume()
            with _bar(progress and found.is_main_process) as bar:
                trainer.run(bar)
        finally:
            if teacher is not None:
                teacher.close()
        return _result(model, trainer, resumed, settings, found)


def _identity(
    model: nn.Module, data: Loader, options: Options, settings: dict[str, Any], accelerator: Any
) -> dict[str, Any]:
    """What a checkpoint must have in common with the training that goes on from it."""
    return {
        **settings,
        "epochs": options.epochs,
        "batches": data.batches,
        "seed": options.seed,
        "gradient_accumulation": options.accumulation,
        "max_grad_norm": options.max_grad_norm,
        "processes": accelerator.num_processes,
        "patience": options.patience,
        "weights": digest(model),
    }


def _opened(folder: Any, resume: bool, accelerator: Any) -> Checkpoints | None:
    """The checkpoints, without those of before if these do not count."""
    if folder is None:
        return None
    store = Checkpoints(folder)
    if not resume and accelerator.is_main_process:
        store.clear()
    accelerator.wait_for_everyone()
    return store


def _result(
    model: nn.Module, trainer: Trainer, resumed: int, settings: dict[str, Any], accelerator: Any
) -> Retrained:
    course = trainer.course
    accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    for name in _TRACES:
        if name not in vars(model):
            vars(trainer.net).pop(name, None)
    net = trainer.net.to(device_of(model))
    for new, old in zip(net.modules(), model.modules(), strict=True):
        new.training = old.training
    for parameter in net.parameters():
        parameter.grad = None
    stopped = len(course.history) < trainer.options.epochs
    return Retrained(
        net, tuple(course.history), course.start, course.best or 0, stopped, resumed, settings
    )


def _options(**given: Any) -> Options:
    options = Options(**given)
    least = {"epochs": 1, "patience": 1, "every": 1, "accumulation": 1, "seed": 0}
    names = {"accumulation": "gradient_accumulation"}
    for name, smallest in least.items():
        value = given[name]
        if value is None and name in ("patience", "every"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            shown = names.get(name, name)
            raise InputError(
                f"{shown} is {value!r}",
                where=f"{shown}=",
                remedy=f"pass an integer of at least {smallest}",
            )
    norm = options.max_grad_norm
    if norm is not None and not norm > 0:
        raise InputError(
            f"max_grad_norm is {norm}", where="max_grad_norm=", remedy="pass a positive number"
        )
    return options


def _check(
    model: Any, dense: Any, options: Options, validates: bool, distillation: Distillation | None
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a torch.nn.Module",
            where="model",
            remedy="pass the module itself",
        )
    if dense is not None and not isinstance(dense, nn.Module):
        raise InputError(
            f"dense is a {type(dense).__name__}, not a torch.nn.Module",
            where="dense=",
            remedy="pass the dense model, or leave it out",
        )
    for name, function in (("loss", options.loss), ("metric", options.metric)):
        if function is not None and not callable(function):
            raise InputError(
                f"{name} is a {type(function).__name__}, not a function",
                where=f"{name}=",
                remedy="pass a function of (output, target)",
            )
    if options.loss is None and distillation is None:
        raise InputError(
            "there is nothing to minimise",
            where="loss=",
            remedy="pass loss=, a function of (output, target), or distillation=",
        )
    if validates and options.loss is None and options.metric is None:
        raise InputError(
            "there are validation data, and neither a metric nor a loss to judge by",
            where="valid=",
            remedy="pass metric= or loss=, functions of (output, target)",
        )
    if options.patience is not None and not validates:
        raise InputError(
            "patience needs validation data",
            where="patience=",
            remedy="pass valid=, or leave patience out",
        )


@contextmanager
def _accelerated(given: Any, mixed_precision: str | None) -> Iterator[Any]:
    """An Accelerator, whose precision does not stay behind for the next one."""
    try:
        from accelerate import Accelerator, state  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise DepcutError(
            "depcut.retrain runs on accelerate, which is not installed",
            where="depcut.retrain",
            remedy="pip install 'depcut[train]'; or use depcut.schedule and depcut.Distillation in "
            "your own loop",
        ) from error
    existed = state.is_initialized()
    try:
        found = given or Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise InputError(
            f"accelerate refuses: {error}",
            where=f"mixed_precision={mixed_precision!r}",
            remedy='pass "no", "fp16", "bf16" or "fp8", that of the Accelerator you have made, if '
            "any, or accelerator= itself",
        ) from error
    if found.gradient_accumulation_steps != 1:
        raise TrainingError(
            f"accelerate is set to accumulate {found.gradient_accumulation_steps} batches",
            where="accelerator",
            remedy="set it to 1 there, and pass gradient_accumulation= here",
        )
    try:
        yield found
    finally:
        if given is None:
            found.free_memory()
        if not existed:
            state.AcceleratorState._reset_state()


def _bar(shown: bool) -> Progress:
    """A progress bar on standard error that vanishes when it is done."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    visible = shown and (console.is_interactive or console.is_jupyter)
    return Progress(*columns, console=console, transient=True, disable=not visible)
