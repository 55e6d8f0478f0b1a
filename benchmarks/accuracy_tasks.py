"""Four tasks that every machine can train from scratch: data, training, loss and metric.

Images are scikit-learn's digits as the demo splits them; text is the standard library's own source.
Dense weights are kept under the user's cache folder, a file a task, seed and configuration.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accuracy_nets as nets
import numpy as np
import torch
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from depcut.cli.demo_net import DigitNet
from depcut.cli.digits import accuracy, load_digits

CONTEXT = 128
RARE = 127  # the symbol of all characters that are not ASCII
HELD_OUT = 20  # one file of so many is for validation
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
WINDOWS = 250  # of validation text that the metric reads

Pair = tuple[Tensor, Tensor]
Hook = Callable[[nn.Module, int], Any]
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a task is trained; part of the name of the cached file."""

    steps: int
    batch: int
    rate: float
    momentum: bool = False  # SGD with momentum instead of AdamW
    decay: float = 0.05
    warmup: float = 0.1  # share of the steps


class Images:
    """Digits of 16x16; test accuracy in percent."""

    unit, higher_is_better = "test accuracy in %", True

    @property
    def digest(self) -> str:
        return digest(self._digits.train_images.numpy().tobytes())

    @property
    def _digits(self) -> Any:
        return _digits()

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Training images as they are."""
        chosen = torch.randint(len(self._digits.train_labels), (batch,), generator=generator)
        return self._digits.train_images[chosen], self._digits.train_labels[chosen]

    def augmented(self, generator: torch.Generator, batch: int) -> Pair:
        """Training images turned by up to 12 degrees, scaled by up to 10 % and moved by a pixel."""
        images, labels = self.draw(generator, batch)
        uniform = 2 * torch.rand(4, batch, generator=generator) - 1
        angle, scale, shift = 0.2 * uniform[0], 1 + 0.1 * uniform[1], uniform[2:] / 8
        cosine, sine = angle.cos() * scale, angle.sin() * scale
        rows = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1)
        grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, align_corners=False), labels

    def metric(self, model: nn.Module) -> float:
        return 100 * accuracy(model, self._digits)


class Text:
    """Windows of the standard library's source; validation loss in nats a character."""

    unit, higher_is_better = "validation loss in nats a character", False

    @property
    def digest(self) -> str:
        return digest(*(part.numpy().tobytes() for part in _text()))

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Windows of the training files, each with the characters that follow."""
        text = _text()[0]
        starts = torch.randint(len(text) - CONTEXT, (batch,), generator=generator)
        return _windows(text, starts)

    augmented = draw

    @torch.no_grad()
    def metric(self, model: nn.Module) -> float:
        text = _text()[1]
        starts = torch.linspace(0, len(text) - CONTEXT - 1, WINDOWS).long()
        tokens, following = _windows(text, starts)
        losses = [
            float(cross_entropy(model(x), y)) * len(x)
            for x, y in zip(tokens.split(50), following.split(50), strict=True)
        ]
        return sum(losses) / WINDOWS


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over images, or over the characters of all windows."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Task:
    """A net, what it learns, and what it is judged by.

    Attributes:
        name: Name in tables and of the cached files.
        build: The net with fresh weights, drawn from torch's global generator.
        data: Where batches come from and what is measured.
        recipe: How it is trained.
        loss: Of (output, target) of a batch: a scalar tensor.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Images | Text
    recipe: Recipe
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    @property
    def unit(self) -> str:
        return self.data.unit

    @property
    def higher_is_better(self) -> bool:
        return self.data.higher_is_better

    def metric(self, model: nn.Module) -> float:
        """On held-out data, always the same."""
        return self.data.metric(model)

    def example(self) -> Tensor:
        """Inputs of batch 2."""
        return self.data.draw(torch.Generator().manual_seed(0), 2)[0]

    def calibration(self, seed: int, batches: int, batch_size: int) -> list[Pair]:
        """Pairs of inputs and targets from the training split."""
        generator = torch.Generator().manual_seed(10_000 + seed)
        return [self.data.draw(generator, batch_size) for _ in range(batches)]

    def trained(self, seed: int) -> nn.Module:
        """The dense model in evaluation mode: from the cache, or trained and put there."""
        path = self.path(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            if path.exists():
                model.load_state_dict(load_file(path))
            else:
                train(self, model, seed)
                store(path, model)
        return model.eval()

    def path(self, seed: int) -> Path:
        """Where the trained weights are kept."""
        with torch.random.fork_rng(devices=[]):
            shapes = {k: list(v.shape) for k, v in self.build().state_dict().items()}
        key = {"recipe": asdict(self.recipe), "shapes": shapes, "data": self.data.digest}
        name = f"{self.name}-{seed}-{digest(json.dumps(key, sort_keys=True).encode())}.safetensors"
        return user_cache_path("depcut") / "accuracy" / name


def train(task: Task, model: nn.Module, seed: int, hook: Hook | None = None) -> None:
    """The dense training, in place; the hook is called before every step and only reads."""
    optimizer = optimizer_of(task, model)
    schedule = one_cycle(task, optimizer, task.recipe.steps)
    step_through(task, model, optimizer, schedule, task.recipe.steps, seed, hook)


def optimizer_of(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """That of the dense training, at its peak rate."""
    recipe, parameters = task.recipe, model.parameters()
    if recipe.momentum:
        return torch.optim.SGD(parameters, recipe.rate, momentum=0.9, weight_decay=recipe.decay)
    return torch.optim.AdamW(parameters, recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay)


def one_cycle(task: Task, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The dense training's schedule, over any number of steps."""
    recipe = task.recipe
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, steps, pct_start=recipe.warmup, cycle_momentum=False
    )


def step_through(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    steps: int,
    seed: int,
    hook: Hook | None = None,
    objective: Objective | None = None,
) -> None:
    """Train in place on one thread, so that the seed alone decides the result.

    The objective is a function of (outputs, inputs, targets) in place of the task's loss; the hook
    is called before every step.
    """
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(seed)
    model.train()
    torch.set_num_threads(1)
    with _progress() as progress:
        bar = progress.add_task(f"train {task.name}, seed {seed}", total=steps)
        for step in range(steps):
            if hook is not None:
                hook(model, step)
            inputs, targets = task.data.augmented(generator, task.recipe.batch)
            outputs = model(inputs)
            loss = objective(outputs, inputs, targets) if objective else task.loss(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(bar)
    torch.set_num_threads(threads)


@functools.cache
def _digits() -> Any:
    return load_digits(0)


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    """Training and validation characters as numbers below 128."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not SKIPPED & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")  # differs from machine to machine
    )
    parts: tuple[list[str], list[str]] = [], []
    for number, file in enumerate(files):
        text = (root / file).read_text(encoding="utf-8", errors="replace")
        parts[number % HELD_OUT == HELD_OUT // 2].append(text)
    return _encoded("\n".join(parts[0])), _encoded("\n".join(parts[1]))


def _encoded(text: str) -> Tensor:
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return torch.from_numpy(np.minimum(codes, RARE).astype(np.uint8))


def _windows(text: Tensor, starts: Tensor) -> Pair:
    read = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return read[:, :-1].contiguous(), read[:, 1:].contiguous()


def digest(*data: bytes) -> str:
    made = hashlib.sha256()
    for part in data:
        made.update(part)
    return made.hexdigest()[:16]


def store(path: Path, model: nn.Module) -> None:
    """Written to a temporary file and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        # Tied weights share memory, which the format does not hold.
        save_file({name: value.clone() for name, value in model.state_dict().items()}, draft)
        Path(draft).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(draft).unlink()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "digits_resnet",
            DigitNet,
            Images(),
            Recipe(steps=400, batch=64, rate=0.1, momentum=True, decay=5e-4, warmup=0.3),
        ),
        Task("digits_vit", nets.ViT, Images(), Recipe(steps=1800, batch=64, rate=1e-3)),
        Task(
            "char_gpt",
            lambda: nets.CharGPT(RARE + 1, CONTEXT),
            Text(),
            Recipe(steps=2800, batch=16, rate=3e-3),
        ),
        Task(
            "char_lstm",
            lambda: nets.CharLSTM(RARE + 1),
            Text(),
            Recipe(steps=3000, batch=32, rate=4e-3, decay=0.01),
        ),
    )
}
