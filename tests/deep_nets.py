"""Residual nets of any depth: an MLP, a convolution net and a transformer, tiny in width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import normal, seeded
from torch import Tensor, nn
from torch.nn import functional


class Feed(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Convolutions(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(size)
        self.second = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.first(x)))
        return torch.relu(x + self.norm2(self.second(hidden)))


class Attention(nn.Module):
    def __init__(self, size: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.size = heads, size // heads
        self.norm = nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        rows, words, _ = x.shape
        joint = self.qkv(self.norm(x)).view(rows, words, 3, self.heads, self.size)
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).reshape(rows, words, -1))


class Deep(nn.Module):
    """A stem, residual blocks, a head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches of two linear layers."""
    make = lambda: Deep(nn.Linear(6, size), [Feed(size) for _ in range(blocks)], nn.Linear(size, 4))
    return seeded(make, 0)


def conv(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches of two convolutions with batch norms."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size, 4))
    stem = nn.Conv2d(3, size, 3, padding=1)
    return seeded(lambda: Deep(stem, [Convolutions(size) for _ in range(blocks)], head), 0)


def attention(blocks: int, size: int = 8) -> nn.Module:
    """`blocks` residual branches, attention and MLP in turns."""
    kinds = (Attention, Feed)
    make = lambda: Deep(
        nn.Linear(6, size), [kinds[i % 2](size) for i in range(blocks)], nn.Linear(size, 4)
    )
    return seeded(make, 0)


NETS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda rows: normal(rows, 6)),
    "conv": (conv, lambda rows: normal(rows, 3, 6, 6)),
    "attention": (attention, lambda rows: normal(rows, 5, 6)),
}
