"""The loop itself: steps, validation, checkpoints, the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depcut.calibration.data import moved
from depcut.calibration.reader import Batch
from depcut.capture.modes import modes
from depcut.errors import InputError, TrainingError
from depcut.support.failures import reraise_fatal
from depcut.training.batches import Loader
from depcut.training.checkpoint import Checkpoints, load_tensors, model_tensors
from depcut.training.distillation import Distillation
from depcut.training.identity import data_text
from depcut.training.optimizers import load_named_state, named_state, names_of
from depcut.training.streams import DATA, STEP, VALID, seed_everything

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Loss = Callable[[Any, Any], torch.Tensor]
Metric = Callable[[Any, Any], Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one training does; see `depcut.training.retrain`."""

    epochs: int
    loss: Loss | None
    metric: Metric | None
    maximize: bool
    patience: int | None
    every: int | None
    accumulation: int
    max_grad_norm: float | None
    seed: int


@dataclass
class Course:
    """How far a training has come.

    Attributes:
        epoch: The epoch in progress, from 0 on.
        batch: Steps done in it.
        step: Steps done in all.
        total: Sum of the losses of the epoch's steps.
        start: What validation said before the first step; empty without validation data.
        history: One record per finished epoch.
        best: The epoch with the best score, from 1 on; 0 for the start, None before it.
        score: Its score, larger is better.
        waited: Epochs since then.
        done: Whether there is nothing left to do.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: float = 0.0
    start: Record = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    best: int | None = None
    score: float = -math.inf
    waited: int = 0
    done: bool = False


class Trainer:
    """Trains one model.

    Args:
        net: The model, on its device.
        train: Its data.
        valid: Data to judge it by, or None.
        options: What to do.
        optimizer: Its optimizer.
        schedule: Stepped once an optimizer step.
        accelerator: Of accelerate; it has prepared nothing yet.
        distillation: Of this very model, or None.
        checkpoints: Where to keep states, or None.
        run: Identity of this training, which a checkpoint must share.
    """

    def __init__(
        self,
        net: nn.Module,
        train: Loader,
        valid: Loader | None,
        options: Settings,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        accelerator: Any,
        distillation: Distillation | None,
        checkpoints: Checkpoints | None,
        run: dict[str, Any],
    ) -> None:
        self.net, self.train, self.valid, self.options = net, train, valid, options
        self.plain_optimizer, self.schedule, self.accelerator = optimizer, schedule, accelerator
        self.distillation, self.checkpoints, self.identity = distillation, checkpoints, run
        self.names = names_of(optimizer, net)
        self.model, self.optimizer = accelerator.prepare(net, optimizer)
        self.steps = -(-train.own // options.accumulation)
        self.course = Course()
        self.kept: dict[str, torch.Tensor] = {}

    def resume(self) -> int:
        """Go on from the newest checkpoint; the number of steps that are done.

        Raises:
            TrainingError: It is of another training.
        """
        state = self.checkpoints.latest() if self.checkpoints is not None else None
        if state is None or self.checkpoints is None:
            return 0
        if "data" in state["run"] and self.accelerator.is_main_process:
            self._note_data(next(self.train.read(self.options.seed, DATA, 0)))
        for key, value in self.identity.items():
            was = state["run"].get(key)
            if was != value:
                raise TrainingError(
                    f"the checkpoint is of another training: {key} was {was!r} and is {value!r}",
                    where=f"checkpoint={self.checkpoints.folder}",
                    remedy="pass another folder, or resume=False to start anew in this one",
                )
        try:
            load_tensors(self.net, state["model"])
            load_named_state(self.plain_optimizer, self.names, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.course = Course(**state["course"])
        except Exception as error:
            reraise_fatal(error)
            raise self.checkpoints.damaged(error) from error
        return self.course.step

    def run(self, progress: Progress) -> None:
        """Train to the end, then load the best weights."""
        course, options = self.course, self.options
        task = progress.add_task("retrain", total=options.epochs * self.steps)
        progress.update(task, completed=course.step)
        if self.valid is not None and course.best is None:
            course.start = self._validate()
            self._judge(course.start, 0)
        while not course.done:
            began = time.perf_counter()
            self._epoch(progress, task)
            self._share_buffers()
            record: Record = {
                "epoch": course.epoch + 1,
                "steps": course.step,
                "lr": self._rate(),
                "loss": self._mean(course.total, self.steps),
                **self._validate(),
            }
            self._judge(record, course.epoch + 1)
            record["seconds"] = time.perf_counter() - began
            course.history.append(record)
            course.epoch, course.batch, course.total = course.epoch + 1, 0, 0.0
            impatient = options.patience is not None and course.waited >= options.patience
            course.done = impatient or course.epoch == options.epochs
            self._save()
            progress.update(task, description=f"retrain, loss {record['loss']:.4g}")
        self._load_best()

    def _rate(self) -> float:
        return max(float(group["lr"]) for group in self.plain_optimizer.param_groups)

    # Steps --------------------------------------------------------------------------------------

    def _epoch(self, progress: Progress, task: TaskID) -> None:
        course = self.course
        self.net.train()
        self.optimizer.zero_grad()
        for batches in self._groups():
            self._step(batches)
            course.batch, course.step = course.batch + 1, course.step + 1
            progress.advance(task)
            every = self.options.every
            if every and course.step % every == 0 and course.batch < self.steps:
                self._save()

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of every step of the epoch that is not done yet."""
        course, size = self.course, self.options.accumulation
        reader = self.train.read(self.options.seed, DATA, course.epoch, epoch=course.epoch)
        done = course.batch
        for number in range(self.steps):
            wanted = min(size, self.train.own - number * size)
            batches = list(islice(reader, wanted))
            if len(batches) < wanted:
                raise InputError(
                    f"the loader ended after {number * size + len(batches)} of {self.train.own} "
                    f"batches in epoch {course.epoch + 1}",
                    where=self.train.place,
                    remedy="pass a loader that gives as many batches every epoch as len() says",
                )
            if not course.epoch and not number:
                self._note_data(batches[0])
            if number >= done:
                yield batches

    def _note_data(self, first: Batch) -> None:
        """The first batch of the first epoch tells the data from others."""
        if self.checkpoints is not None:
            self.identity["data"] = data_text([first.args, first.kwargs, first.target])

    def _step(self, batches: list[Batch]) -> None:
        """One step of the optimizer."""
        accelerator, course = self.accelerator, self.course
        seed_everything(self.options.seed, STEP, course.step, accelerator.process_index)
        total = 0.0
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._loss(batch)
                total += self._finite(loss, "loss") / len(batches)
                accelerator.backward(loss / len(batches))
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        limit = self.options.max_grad_norm
        norm = accelerator.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        if accelerator.scaler is None and norm is not None:
            self._finite(norm, "gradient's norm")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        course.total += total

    def _loss(self, batch: Batch) -> torch.Tensor:
        args, kwargs, target = moved((batch.args, batch.kwargs, batch.target), self._device)
        output = self.model(*args, **kwargs)
        loss = None if self.options.loss is None else scalar(self.options.loss(output, target))
        if self.distillation is None:
            assert loss is not None
            return loss
        taught = self.distillation(output, *args, **kwargs)
        share = self.distillation.share
        return taught if loss is None else (1 - share) * loss + share * taught

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def _finite(self, value: torch.Tensor, what: str) -> float:
        """The mean of a number over all processes, which must be finite."""
        number = self._mean(float(value.detach()), 1)
        if math.isfinite(number):
            return number
        course, kept = self.course, "the caller's model is unchanged"
        if self.checkpoints is not None:
            kept += f", and {self.checkpoints.folder} holds the last good checkpoint"
        raise TrainingError(
            f"the {what} is {number} at step {course.step + 1} (epoch {course.epoch + 1}, step "
            f"{course.batch + 1} of {self.steps})",
            where="depcut.training.retrain",
            remedy=f"use a lower lr, or max_grad_norm=1.0, or look for NaN in the data; {kept}",
        )

    def _mean(self, total: float, count: float) -> float:
        """total / count over all processes."""
        if self.accelerator.num_processes > 1:
            pair = torch.tensor([total, float(count)], dtype=torch.float64, device=self._device)
            total, count = self.accelerator.reduce(pair, "sum").tolist()
        return total / count

    def _share_buffers(self) -> None:
        """Running statistics are those of the first process everywhere."""
        if self.accelerator.num_processes > 1 and torch.distributed.is_initialized():
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    # Validation ---------------------------------------------------------------------------------

    def _validate(self) -> Record:
        if self.valid is None:
            return {}
        loss = score = rows = 0.0
        options = self.options
        with modes(self.net, ()), torch.no_grad(), self._paused():
            for batch in self.valid.read(options.seed, VALID, even=False):
                parts = moved((batch.args, batch.kwargs, batch.target), self._device)
                args, kwargs, target = parts
                output = self.net(*args, **kwargs)
                if options.loss is not None:
                    loss += batch.rows * float(scalar(options.loss(output, target)))
                if options.metric is not None:
                    score += batch.rows * _number(options.metric(output, target))
                rows += batch.rows
        record = {}
        if options.loss is not None:
            record["valid_loss"] = self._mean(loss, rows)
        if options.metric is not None:
            record["metric"] = self._mean(score, rows)
        return record

    def _paused(self) -> Any:
        return nullcontext() if self.distillation is None else self.distillation.paused()

    def _judge(self, record: Record, epoch: int) -> None:
        """Keep these weights if they are the best so far; without validation the latest are."""
        course = self.course
        score = -record.get("valid_loss", -math.inf if self.valid is None else math.inf)
        if "metric" in record:
            score = record["metric"] if self.options.maximize else -record["metric"]
        score = -math.inf if math.isnan(score) else score
        if self.valid is None or course.best is None or score > course.score:
            course.best, course.score, course.waited = epoch, score, 0
            self._keep()
        else:
            course.waited += 1

    # Weights ------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Keep the present weights as the best."""
        if self.checkpoints is None:
            if self.valid is not None:
                tensors = model_tensors(self.net).items()
                self.kept = {n: t.detach().cpu().clone() for n, t in tensors}
        elif self.accelerator.is_main_process:
            self.checkpoints.write_best(self.course.best or 0, self.net)

    def _load_best(self) -> None:
        if self.checkpoints is not None and self.course.best is not None:
            self.checkpoints.load_best(self.course.best, self.net)
        elif self.kept:
            load_tensors(self.net, self.kept)

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "run": self.identity,
                "course": vars(self.course),
                "model": model_tensors(self.net),
                "optimizer": named_state(self.plain_optimizer, self.names),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
            }
            self.checkpoints.write(self.course.step, state, self.course.best)
            self.checkpoints.write_history(self.course.history)
        self.accelerator.wait_for_everyone()


def scalar(loss: Any) -> torch.Tensor:
    """A loss as a tensor without dimensions.

    Raises:
        InputError: It is no such number.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else None
        raise InputError(
            f"the loss is {got or 'a ' + type(loss).__name__}, not a scalar tensor",
            where="loss=",
            remedy="return one number, e.g. with reduction='mean'",
        )
    return loss.reshape(())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the metric is a {type(value).__name__}, not a number: {error}",
            where="metric=",
            remedy="return the mean over the batch as one number",
        ) from error
