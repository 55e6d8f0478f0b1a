"""The study's tasks: four architectures, each on two kinds of data, and a perceptron on a table.

None is saturated: there are few labels, noise, or more to know than the nets can hold. The digits
and the table come with scikit-learn, the text is the standard library's source.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import accuracy_nets as nets
import numpy as np
import torch
from accuracy_tasks import SKIPPED, Images, Pair, Recipe, Task, Text, cross_entropy, digest
from torch import Tensor, nn

from depcut.cli.demo_net import DigitNet
from depcut.cli.digits import Digits, load_digits

FEW = 400  # labelled digits
COVERED = 8  # pixels of 16, in height and in width
NOISE = 0.2  # standard deviation, of a range of 1
SIDE = 16  # a window of text is a picture of so many rows of so many bytes
BITS = 8  # of a byte
CLASSES = 10
LEVELS, PIXELS = 17, 64  # of the scans that the decoder reads pixel by pixel
PATIENTS = 60  # whose diagnosis is known


class HardDigits(Images):
    """Few digits to learn from; noise, and a black square that hides a quarter of each."""

    unit = "test accuracy in % on hard digits"

    @property
    def _digits(self) -> Digits:
        return _hard_digits()

    def augmented(self, generator: torch.Generator, batch: int) -> Pair:
        """Turned, scaled and moved as in the demo's task, and with other noise every time."""
        images, labels = super().augmented(generator, batch)
        return images + NOISE / 2 * torch.randn(images.shape, generator=generator), labels


@functools.cache
def _hard_digits() -> Digits:
    whole, generator = load_digits(0), torch.Generator().manual_seed(0)
    return Digits(
        _worsened(whole.train_images[:FEW], generator),
        whole.train_labels[:FEW],
        _worsened(whole.test_images, generator),
        whole.test_labels,
    )


def _worsened(images: Tensor, generator: torch.Generator) -> Tensor:
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    corners = torch.randint(SIDE - COVERED + 1, (len(images), 2), generator=generator)
    places = torch.arange(SIDE)
    rows, columns = (
        (places >= corners[:, i : i + 1]) & (places < corners[:, i : i + 1] + COVERED)
        for i in (0, 1)
    )
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


class Packages(Images):
    """Which of ten packages of the standard library do 256 bytes stand in?

    They are seen as a picture of 16x16, with a channel for each of a byte's bits.
    """

    unit = "test accuracy in % on packages"

    @property
    def _digits(self) -> Digits:
        """The test windows; those to train on are drawn from the whole text."""
        return _package_windows()

    @property
    def digest(self) -> str:
        return digest(b"bits", *(text.numpy().tobytes() for text in _packages()))

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Windows of the first four fifths of each package."""
        texts = _packages()
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        shares = torch.rand(batch, generator=generator)
        lengths = torch.tensor([_split(text) - SIDE * SIDE for text in texts])
        starts = (shares * lengths[labels]).long()
        return _pictures(texts, labels, starts), labels

    augmented = draw


@functools.cache
def _packages() -> tuple[Tensor, ...]:
    """The text of the ten largest packages, as bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and not SKIPPED & set(parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            texts.setdefault(parts[0], []).append(text)
    largest = sorted(texts, key=lambda name: -sum(map(len, texts[name])))[:CLASSES]
    return tuple(
        torch.frombuffer(bytearray("\n".join(texts[name]).encode("utf-8")), dtype=torch.uint8)
        for name in sorted(largest)
    )


def _split(text: Tensor) -> int:
    return len(text) * 4 // 5


def _pictures(texts: tuple[Tensor, ...], labels: Tensor, starts: Tensor) -> Tensor:
    places = torch.arange(SIDE * SIDE)
    windows = [
        texts[label][start + places]
        for label, start in zip(labels.tolist(), starts.tolist(), strict=True)
    ]
    pictures = torch.stack(windows).view(-1, 1, SIDE, SIDE)
    return ((pictures >> torch.arange(BITS, dtype=torch.uint8)[:, None, None]) & 1).float() - 0.5


@functools.cache
def _package_windows() -> Digits:
    texts, each = _packages(), 300
    labels = torch.arange(CLASSES).repeat_interleave(each)
    starts = torch.cat(
        [torch.linspace(_split(t), len(t) - SIDE * SIDE - 1, each).long() for t in texts]
    )
    nothing = torch.empty(0)
    return Digits(nothing, nothing, _pictures(texts, labels, starts), labels)


class Scans(Text):
    """Scans of digits read pixel by pixel: what is the next one's level, of 17?"""

    unit = "test loss in nats a pixel"

    @property
    def digest(self) -> str:
        return digest(*(scans.numpy().tobytes() for scans in _scans()))

    def draw(self, generator: torch.Generator, batch: int) -> Pair:
        """Scans, each pixel with the one that follows; first comes a symbol of its own."""
        train = _scans()[0]
        return _shifted(train[torch.randint(len(train), (batch,), generator=generator)])

    augmented = draw

    @torch.no_grad()
    def metric(self, model: nn.Module) -> float:
        tokens, following = _shifted(_scans()[1])
        return float(cross_entropy(model(tokens), following))


@functools.cache
def _scans() -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    scans = torch.from_numpy(datasets.load_digits().images).long().flatten(1)
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))
    return scans[order[len(scans) // 4 :]], scans[order[: len(scans) // 4]]


def _shifted(scans: Tensor) -> Pair:
    first = torch.full((len(scans), 1), LEVELS)
    return torch.cat([first, scans[:, :-1]], 1), scans


class Patients(Images):
    """Thirty measurements of a tumour, of which few have a known diagnosis, with noise."""

    unit = "test accuracy in % on tumours"

    @property
    def _digits(self) -> Digits:
        return _patients()

    def augmented(self, generator: torch.Generator, batch: int) -> Pair:
        """With other noise every time."""
        values, labels = self.draw(generator, batch)
        return values + NOISE * torch.randn(values.shape, generator=generator), labels


@functools.cache
def _patients() -> Digits:
    from sklearn import datasets

    data, generator = datasets.load_breast_cancer(), torch.Generator().manual_seed(0)
    values = torch.from_numpy(data.data.astype(np.float32))
    values = (values - values.mean(0)) / values.std(0)
    values = values + torch.randn(values.shape, generator=generator)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(values), generator=generator)
    known, tested = order[:PATIENTS], order[PATIENTS:]
    return Digits(values[known], labels[known], values[tested], labels[tested])


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection (Sandler et al., MobileNetV2, 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        hidden = factor * inputs
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class Depthwise(nn.Module):
    """A small MobileNetV2 for pictures of 16x16."""

    def __init__(self, inputs: int, widths: tuple[int, ...] = (24, 40, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU6(),
        )
        blocks, channels = [], widths[0]
        for stage, width in enumerate(widths):
            blocks += [Inverted(channels, width, 2 if stage else 1), Inverted(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


class Perceptron(nn.Sequential):
    """Two hidden layers with BatchNorm."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        channels = 30
        for number in (1, 2):
            self.add_module(f"layer{number}", nn.Linear(channels, width))
            self.add_module(f"norm{number}", nn.BatchNorm1d(width))
            self.add_module(f"relu{number}", nn.ReLU())
            channels = width
        self.head = nn.Linear(width, 2)


def _cnn(inputs: int) -> nn.Module:
    net = DigitNet((32, 64, 128))
    if inputs > 1:
        net.stem[0] = nn.Conv2d(inputs, 32, 3, padding=1, bias=False)
    return net


def _vit(inputs: int) -> nn.Module:
    net = nets.ViT(width=64, depth=4)
    if inputs > 1:
        net.patches = nn.Conv2d(inputs, 64, 4, 4)
    return net


ARCHITECTURES: Mapping[str, tuple[Callable[[int], nn.Module], Recipe, Recipe]] = {
    # the net of so many input channels, how it is trained on digits, and how on text
    "cnn": (
        _cnn,
        Recipe(steps=300, batch=64, rate=0.1, momentum=True, decay=5e-4, warmup=0.3),
        Recipe(steps=400, batch=64, rate=0.1, momentum=True, decay=5e-4, warmup=0.3),
    ),
    "depthwise": (
        Depthwise,
        Recipe(steps=400, batch=64, rate=0.1, momentum=True, decay=5e-4, warmup=0.3),
        Recipe(steps=400, batch=64, rate=0.1, momentum=True, decay=5e-4, warmup=0.3),
    ),
    "vit": (
        _vit,
        Recipe(steps=1000, batch=64, rate=1e-3),
        Recipe(steps=1000, batch=64, rate=1e-3),
    ),
}


def _tasks() -> list[Task]:
    tasks = []
    for name, (build, digits, text) in ARCHITECTURES.items():
        tasks.append(Task(f"{name}_digits", partial(build, 1), HardDigits(), digits))
        tasks.append(Task(f"{name}_text", partial(build, BITS), Packages(), text))
    tasks += [
        Task(
            "gpt_digits",
            lambda: nets.CharGPT(LEVELS + 1, PIXELS, width=96),
            Scans(),
            Recipe(steps=800, batch=32, rate=2e-3),
        ),
        Task(
            "gpt_text",
            lambda: nets.CharGPT(128, 128, width=96),
            Text(),
            Recipe(steps=1500, batch=16, rate=3e-3),
        ),
        Task(
            "mlp_table",
            Perceptron,
            Patients(),
            Recipe(steps=200, batch=32, rate=3e-3, decay=0.01),
        ),
    ]
    return tasks


STUDY: Mapping[str, Task] = {task.name: task for task in _tasks()}
