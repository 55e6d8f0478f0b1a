"""Nets and data of the benchmark without data on which no recipe was tuned.

They are trained so that they make errors: the digits have a covered part, or there are few of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from accuracy_tasks import Images, Pair, Recipe, Task
from torch import Tensor, nn

from depcut.cli.demo_net import DigitNet
from depcut.cli.digits import Digits, load_digits

COVERED = 9  # pixels of 16, in height and in width
FEW = 200  # images to train on


class Covered(Images):
    """Digits of which a square at a random place is black."""

    unit = "test accuracy in % on covered digits"

    @property
    def _digits(self) -> Digits:
        return _covered()


class Few(Images):
    """Digits of which only some may be trained on, as they are."""

    unit = "test accuracy in % after few digits"

    @property
    def _digits(self) -> Digits:
        whole = load_digits(0)
        return Digits(
            whole.train_images[:FEW],
            whole.train_labels[:FEW],
            whole.test_images,
            whole.test_labels,
        )

    def augmented(self, generator: torch.Generator, batch: int) -> Pair:
        """No augmentation: the net is to make errors."""
        return self.draw(generator, batch)


@functools.cache
def _covered() -> Digits:
    whole, generator = load_digits(0), torch.Generator().manual_seed(0)
    return Digits(
        _cover(whole.train_images.repeat(4, 1, 1, 1), generator),
        whole.train_labels.repeat(4),
        _cover(whole.test_images, generator),
        whole.test_labels,
    )


def _cover(images: Tensor, generator: torch.Generator) -> Tensor:
    out = images.clone()
    places = torch.randint(images.shape[-1] - COVERED + 1, (len(images), 2), generator=generator)
    for image, (row, column) in zip(out, places.tolist(), strict=True):
        image[:, row : row + COVERED, column : column + COVERED] = 0
    return out


class Inverted(nn.Module):
    """Expand, depthwise convolution, project, around a shortcut where the sizes are equal."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = expand * inputs
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """Inverted residuals (Sandler et al. 2018) on grey 16x16 images."""

    def __init__(self, widths: Sequence[int] = (24, 32, 64, 96), expand: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU6(),
        ]
        for before, width in pairwise(widths):
            layers += [Inverted(before, width, 2, expand), Inverted(width, width, 1, expand)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x).mean((2, 3)))
        return scores


class Mixing(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, figure 4) with its scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.fc2(nn.functional.gelu(self.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of ConvNeXt blocks on grey 16x16 images."""

    def __init__(self, widths: Sequence[int] = (48, 96), depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 2, 2)
        self.first = nn.Sequential(*(Mixing(widths[0]) for _ in range(depth)))
        self.down = nn.Conv2d(widths[0], widths[1], 2, 2)
        self.second = nn.Sequential(*(Mixing(widths[1]) for _ in range(depth)))
        self.norm = nn.LayerNorm(widths[1])
        self.head = nn.Linear(widths[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        scores: Tensor = self.head(self.norm(x.mean((2, 3))))
        return scores


HELD_OUT: Sequence[Task] = (
    Task("covered_mobilenet", MobileNet, Covered(), Recipe(steps=900, batch=64, rate=3e-3)),
    Task("covered_convnext", ConvNeXt, Covered(), Recipe(steps=900, batch=64, rate=2e-3)),
    Task(
        "few_resnet",
        lambda: DigitNet(widths=(32, 64, 128)),
        Few(),
        Recipe(steps=60, batch=32, rate=0.05, momentum=True, decay=5e-4, warmup=0.3),
    ),
)
