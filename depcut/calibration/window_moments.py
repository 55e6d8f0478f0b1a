"""Moments of overlapping patches and of targets, without the patches."""

from __future__ import annotations

import torch
from torch.nn import functional

from depcut.calibration.moments import Moments
from depcut.calibration.products import single_is_kept
from depcut.calibration.windows import (
    Windows,
    WindowSums,
    moved,
    placed,
    product,
    total_of,
    totals_of,
)


class WindowMoments:
    """Sums over patches x and their targets y, see `Moments`; all of one kernel.

    A tap's share of the sum of y x^T is a correlation of the targets with the images, shifted. The
    error is that of `WindowSums`, for the targets as well: they are taken less their first batch's
    mean, and what means add is computed in double precision.

    Args:
        like: Patches of that kernel.
    """

    def __init__(self, like: Windows) -> None:
        self.taps = like.taps
        self.sums = WindowSums(self.taps)
        self._mean: torch.Tensor | None = None
        # Of e = y - mean: with d of each tap (out, channels); where the tap is in the image.
        self._cross: list[torch.Tensor] = []
        self._there: list[torch.Tensor] = []
        self._total = self._squares = torch.zeros(())

    def add(self, windows: Windows, y: torch.Tensor) -> None:
        """Take in patches and targets (1, patches, out), in their order."""
        spread = self.sums.add(windows)
        y = y[0].to(spread.dtype) if single_is_kept() else y[0].double()
        if self._mean is None:
            self._mean = y.double().mean(0).to(y.dtype)
            zeros = self._mean.new_zeros(len(self._mean), dtype=torch.float64)
            self._total, self._squares = zeros, zeros.clone()
            self._there = [zeros.clone() for _ in self.taps]
            self._cross = [zeros.new_zeros(len(zeros), spread.shape[3]) for _ in self.taps]
        rest = (y - self._mean).reshape(len(spread), *windows.sizes, -1)
        totals = totals_of(rest)
        self._total += totals[-1, -1]
        self._squares += rest.square().sum((0, 1, 2), dtype=torch.float64)
        # A step is a shift of all pixels in one row; what it leads out of an image to is zero.
        shape = [
            max(n + p, m)
            for n, p, m in zip(spread.shape[1:3], windows.padding, windows.sizes, strict=True)
        ]
        targets, pixels = (_laid_out(part, shape) for part in (rest, spread))
        for i, tap in enumerate(self.taps):
            back = windows.padding[0] - tap[0], windows.padding[1] - tap[1]
            self._there[i] += total_of(totals, moved(placed(windows, tap, tap)[1], back))
            shift = -back[0] * shape[1] - back[1]
            first = targets[max(-shift, 0) : len(targets) - max(shift, 0)]
            second = pixels[max(shift, 0) : len(pixels) - max(-shift, 0)]
            self._cross[i] += product(first, second)

    def moments(self) -> Moments:
        """All that was taken in."""
        assert self._mean is not None
        mean, center, count = self._mean.double(), self.sums.mean, self.sums.count
        crosses = []
        for tap, cross, there in zip(self.taps, self._cross, self._there, strict=True):
            pixels, known = self.sums.of_tap(tap)
            crosses.append(cross + torch.outer(mean, pixels))
            crosses[-1].addr_(there + known * mean, center)
        return Moments(
            count,
            self.sums.products(),
            self.sums.total(),
            torch.stack(crosses, 2).reshape(1, len(mean), -1),
            (self._total + count * mean)[None],
            (self._squares + mean * (2 * self._total + count * mean))[None],
        )


def _laid_out(images: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Pixels (pixels, channels) of images (batch, height, width, channels) with zeros beside."""
    down, right = (n - m for n, m in zip(shape, images.shape[1:3], strict=True))
    return functional.pad(images, (0, 0, 0, right, 0, down)).reshape(-1, images.shape[3])
