"""Nets for folders: state of every kind, and a class whose constructor needs arguments."""

from __future__ import annotations

import enum
import functools
import math
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere


class Kind(enum.Enum):
    """A setting that is no number."""

    PLAIN = 1


class Settings:
    """An object that modules share."""

    def __init__(self) -> None:
        self.width, self.kind, self.activation = 16, Kind.PLAIN, F.gelu


class Stateful(nn.Module):
    """[B, 6] to [B, 6]: tied weights, buffers of all kinds, other data types, shared objects."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.again = nn.Linear(6, 16)
        self.again.weight = self.up.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("drawn", torch.rand(6), persistent=False)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.rand(3)).to(torch.complex128))
        self.table = torch.rand(6, 6)
        self.names: Any = {"a": (1, 2.5, None), 3: [torch.float16, slice(1, None)]}

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.drawn @ self.table
        h = self.settings.activation(self.up(x)) + self.again(x)
        return self.drop(self.down(h))


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: float


class Words(list[str]):
    """A list of a class of its own."""


class Keeping(nn.Module):
    """[B, 6] to [B, 6]; it holds a value of every kind that a folder describes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.numbers = [math.inf, np.float64(1.5), np.int64(3), 2 + 1j, b"ab", "text"]
        self.tuples = (Point(1, 2.0), torch.Size([3, 4]), range(2, 9, 3), slice(1, 5))
        self.mappings = [
            OrderedDict(a=1, b=2),
            {Kind.PLAIN: (1, 2)},
            {3, Kind.PLAIN},
            frozenset({5}),
        ]
        self.words = Words(["a", "b"])
        self.kinds = [Kind.PLAIN, torch.float16, torch.channels_last, torch.device("cpu")]
        self.table = np.arange(6.0).reshape(2, 3)
        self.clamp = functools.partial(torch.clamp, min=-4.0)
        self.scale = self.doubled
        self.last = weakref.ref(self.down)

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.clamp(self.scale(self.up(x))).relu())


class Sized(nn.Module):
    """[B, L, 8] to [B, L, 8], with a size that the constructor takes and the code types in."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unflatten(-1, (4, 4)).relu()
        return self.b(h.flatten(2) / 16**0.5)


def sized() -> nn.Module:
    """The net as it was shrunk."""
    return Sized(16)


class Attention(nn.Module):
    """[B, L, 16] to the same, by torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(x, x, x)[0])
