"""Nets for folders: state of every kind, and a class whose constructor needs arguments."""

from __future__ import annotations

import enum
from typing import Any

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
