"""Nets whose code types widths in, so that shrinking them takes a patch of their source."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut


class Heads(nn.Module):
    """Attention over [B, L, 8] or [L, 8]; the example call gives `x` alone."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.p = nn.Linear(8, 48), nn.Linear(16, 8), p

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        batched = x.dim() == 3
        if not batched:
            x = x[None]
        x = F.dropout(x, self.p, self.training)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        if is_causal:
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 16)
        return self.proj(h) if batched else self.proj(h)[0]


class Images(nn.Module):
    """Images of any size, [B, 3, H, W] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        b, _, height, width = h.shape
        h = h.view(b, 4, 4, height, width).transpose(1, 2).reshape(b, 16, height, width)
        h = self.b(h).view(b, 16, height * width)
        return self.head(h.amax(2) / 16**0.5)


class Sign(torch.autograd.Function):
    """The sign, whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.5


class Regions(nn.Module):
    """Parts without gradients and in low precision, [B, 8] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, fail: str = "") -> Tensor:
        h = self.a(x).view(len(x), 4, 4)
        with torch.no_grad():
            gate = h.flatten(1)
            if fail == "no_grad":
                raise ValueError(fail)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.b(h.reshape(len(x), 16) * gate)
            if fail == "autocast":
                raise ValueError(fail)
        return h.float()


class Straight(nn.Module):
    """Signs with a gradient, [B, 8] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).view(len(x), 4, 4)
        return self.b(Sign.apply(h).reshape(len(x), 16))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Normal values, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(model: nn.Module, x: Any, ratio: float = 0.4, **options: Any) -> tuple[Any, Any]:
    """A smaller model with a patch, and the dense one with zeros in place of what went."""
    model.eval()
    plan = depcut.analyze(model, x).plan(ratio, align=1, **options)
    dense = zeroed(model, plan.tensor_indices())
    slim = plan.apply(dense)
    assert type(slim).__name__ == type(model).__name__
    report = depcut.report(slim)
    assert report.patched
    assert not report.generated
    return slim, dense


def zeroed(model: nn.Module, kept: Mapping[str, tuple[Any, ...]]) -> nn.Module:
    """A copy with zeros in every parameter wherever an index went."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in kept:
                stays = torch.zeros_like(parameter)
                stays[index(parameter.shape, kept[name])] = 1
                parameter.mul_(stays)
    return dense


def index(shape: torch.Size, kept: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """Index arrays that broadcast."""
    out = []
    for dim, (size, at) in enumerate(zip(shape, kept, strict=True)):
        array = np.arange(size) if at is None else np.asarray(at)
        if array.ndim == 1:
            array = array.reshape([-1 if i == dim else 1 for i in range(len(shape))])
        out.append(array)
    return tuple(out)


def assert_same(
    slim: Callable[..., Any],
    dense: Callable[..., Any],
    *args: Any,
    tolerance: float = 1e-5,
    **kw: Any,
) -> None:
    """Both give the same values, of the same precision."""
    with torch.no_grad():
        got, wanted = slim(*args, **kw), dense(*args, **kw)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model drawn anew, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()
