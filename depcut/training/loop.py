"""Retraining in one call, for those who have no loop of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.apply.plan import Plan
from depcut.capture.inputs import device_of
from depcut.capture.plain import refuse_spread
from depcut.capture.process_state import importing
from depcut.capture.random_state import preserved
from depcut.capture.refusals import check_module
from depcut.errors import DepcutError, InputError, TrainingError
from depcut.rewrite.copying import copied
from depcut.support.accelerate_private import TRACES, reset_state
from depcut.support.checks import check_function, check_integer, check_kind
from depcut.support.files import claimed
from depcut.support.keywords import settled, takes_options
from depcut.support.unwrap import unwrapped
from depcut.training.batches import Loader, open_loader
from depcut.training.checkpoint import Checkpoints, digest
from depcut.training.distillation import Distillation
from depcut.training.identity import callable_text, structure_text
from depcut.training.optimizers import Build, optimizer_for
from depcut.training.options import RetrainKeywords, TrainingOptions
from depcut.training.rates import Start, peak_rate, schedule_of
from depcut.training.trainer import Loss, Metric, Record, Settings, Trainer

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class Retrained:
    """What `depcut.training.retrain` returns.

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


@takes_options(TrainingOptions, RetrainKeywords)
def retrain(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    *,
    epochs: int,
    loss: Loss | None = None,
    metric: Metric | None = None,
    optimizer: torch.optim.Optimizer | Build | None = None,
    plan: Plan | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    options: TrainingOptions | None = None,
    **given: Unpack[RetrainKeywords],
) -> Retrained:
    """Train a copy of a model, typically a smaller one, to recover its accuracy.

    It runs on accelerate: on the GPU where there is one, in mixed precision, and in several
    processes if started by `accelerate launch` or `torchrun`.

    A run that was killed goes on when the same call is made with the same `checkpoint`, and ends
    with the weights that it would have had, bit for bit on a CPU with as many threads. For that,
    the order and the content of the batches must depend on nothing but random numbers: torch, numpy
    and random are seeded before each epoch, and so is a loader's own generator; batches that are
    done are read again and left aside. Afterwards the caller's random states are as before. What
    the caller's functions, the loader and the model raise while it trains is not caught.

    Args:
        model: The model; it is not changed.
        train: An iterable that every epoch reads anew: (input, target) pairs or dicts of keyword
            arguments. In several processes each one takes every n-th batch, unless the loader has a
            DistributedSampler.
        valid: The same, to judge each epoch by.
        epochs: Passes over the data.
        loss: A function of (output, target) that returns a scalar; of an item that is no pair, it
            gets the whole item as target. May be left out with distillation.
        metric: A function of (output, target) that returns the mean over the batch.
        optimizer: One that trains `model` (a copy of it is used), a function of parameter groups,
            or None: SGD with Nesterov momentum 0.9 and weight decay 1e-4 where most parameters are
            in convolution kernels, else AdamW with weight decay 1e-2; biases and norms do not
            decay.
        plan: That made the model from the dense one; for ALLR.
        checkpoint: A folder for states, written after each epoch (safetensors and JSON).
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.training.TrainingOptions`.

    Raises:
        InputError: An option has a wrong value, a loader is empty, the loss is no scalar.
        TrainingError: The loss is not finite, or the checkpoint is of another training.
        DepcutError: accelerate is not installed.
    """
    chosen = settled(TrainingOptions, options, given, RetrainKeywords, "retrain")
    course, model = _course(epochs, loss, metric, chosen), unwrapped(model)
    refuse_spread(model)
    _check(model, course, valid is not None, chosen.distillation, plan)
    peak = peak_rate(chosen.lr, chosen.original, optimizer)
    teaching = chosen.distillation
    with (
        _accelerated(chosen.accelerator, chosen.mixed_precision) as accelerator,
        preserved(),
        ExitStack() as claim,
    ):
        data, judged = _loaders(model, train, valid, course, accelerator)
        store = claim.enter_context(_opened(checkpoint, chosen.resume, accelerator))
        steps = epochs * -(-data.own // chosen.gradient_accumulation)
        with nullcontext() if teaching is None else teaching.paused():
            net = copied(model, {}).to(accelerator.device)
            own_optimizer = optimizer_for(optimizer, model, net, peak)
            asked = store.asked() if store else {}
            start = Start(net, data, plan, chosen.dense, chosen.seed, asked)
            how = {"peak": peak, "original": chosen.original, "accelerator": accelerator}
            rates, settings = schedule_of(chosen.schedule, own_optimizer, steps, start, **how)
        settings["optimizer"] = type(own_optimizer).__name__
        settings["mixed_precision"] = accelerator.mixed_precision
        about = model, data, course, settings, accelerator, teaching
        run = {} if store is None else _identity(*about)
        teacher = None if teaching is None else teaching.of(net, accelerator.device)
        trainer = Trainer(
            net, data, judged, course, own_optimizer, rates, accelerator, teacher, store, run
        )
        resumed = _trained(trainer, teacher, chosen.progress and accelerator.is_main_process)
        return _result(model, trainer, resumed, settings, accelerator)


def _loaders(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None,
    course: Settings,
    accelerator: Any,
) -> tuple[Loader, Loader | None]:
    """The data to train on and to judge by, this process's share of both."""
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    data = open_loader(train, "train=", model, pairs=course.loss is not None, **ranks)
    if valid is None:
        return data, None
    pairs = course.loss is not None or course.metric is not None
    return data, open_loader(valid, "valid=", model, pairs=pairs, **ranks)


def _trained(trainer: Trainer, teacher: Distillation | None, shown: bool) -> int:
    """Train to the end; the step that was resumed from."""
    try:
        resumed = trainer.resume()
        with _bar(shown) as bar:
            trainer.run(bar)
    finally:
        if teacher is not None:
            teacher.close()
    return resumed


def _identity(
    model: nn.Module,
    data: Loader,
    options: Settings,
    settings: dict[str, Any],
    accelerator: Any,
    teaching: Distillation | None,
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
        "structure": structure_text(model),
        "weights": digest(model),
        "loss": callable_text(options.loss),
        "metric": callable_text(options.metric),
        "distillation": callable_text(teaching),
        "teacher": None if teaching is None else digest(teaching.dense),
    }


@contextmanager
def _opened(folder: Any, resume: bool, accelerator: Any) -> Iterator[Checkpoints | None]:
    """The checkpoints of a folder that no other run uses, cleared first unless the run resumes."""
    if folder is None:
        yield None
        return
    store, writes = Checkpoints(folder), accelerator.is_main_process
    with claimed(store.folder, "checkpoint=", TrainingError) if writes else nullcontext():
        if writes and not resume:
            store.clear()
        accelerator.wait_for_everyone()
        yield store


def _result(
    model: nn.Module, trainer: Trainer, resumed: int, settings: dict[str, Any], accelerator: Any
) -> Retrained:
    course = trainer.course
    accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    for name in TRACES:
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


def _course(
    epochs: Any, loss: Loss | None, metric: Metric | None, chosen: TrainingOptions
) -> Settings:
    """The settings of the loop, from the arguments of `retrain`."""
    return Settings(
        epochs=check_integer(epochs, "epochs", 1),
        loss=loss,
        metric=metric,
        maximize=chosen.maximize,
        patience=chosen.patience,
        every=chosen.every,
        accumulation=chosen.gradient_accumulation,
        max_grad_norm=chosen.max_grad_norm,
        seed=chosen.seed,
    )


def _check(
    model: Any,
    options: Settings,
    validates: bool,
    distillation: Distillation | None,
    plan: Plan | None,
) -> None:
    if plan is not None:
        check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
    check_module(model)
    for name, function in (("loss", options.loss), ("metric", options.metric)):
        if function is not None:
            check_function(function, name, "pass a function of (output, target)")
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
    """An Accelerator; the process-wide state that making it set is taken back."""
    try:
        importing("accelerate")
        from accelerate import Accelerator, state
    except ImportError as error:
        raise DepcutError(
            "depcut.training.retrain runs on accelerate, which is not installed",
            where="depcut.training.retrain",
            remedy="pip install 'depcut[train]'; or use depcut.training.schedule and "
            "depcut.training.Distillation in your own loop",
        ) from error
    existed = state.is_initialized()
    try:
        accelerator = given if given is not None else Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise InputError(
            f"accelerate refuses: {error}",
            where=f"mixed_precision={mixed_precision!r}",
            remedy='pass "no", "fp16", "bf16" or "fp8", that of the Accelerator you have made, if '
            "any, or accelerator= itself",
        ) from error
    if accelerator.gradient_accumulation_steps != 1:
        raise TrainingError(
            f"accelerate is set to accumulate {accelerator.gradient_accumulation_steps} batches",
            where="accelerator",
            remedy="set it to 1 there, and pass gradient_accumulation= here",
        )
    try:
        yield accelerator
    finally:
        if given is None:
            accelerator.free_memory()
        if not existed:
            reset_state()


def _bar(shown: bool) -> Progress:
    """A progress bar on standard error that vanishes when it is done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    visible = shown and (console.is_interactive or console.is_jupyter)
    return Progress(*columns, console=console, transient=True, disable=not visible)
