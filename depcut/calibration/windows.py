"""Second moments of overlapping patches, from correlations of shifted images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional

_RUN = 2048  # positions whose products are summed in single precision

Offset = tuple[int, int]
Box = tuple[int, int, int, int]  # top, bottom, left, right; the ends do not belong to it


@dataclass(frozen=True, eq=False)
class Windows:
    """Patches of images as a convolution with stride 1 reads them, zeros around the images.

    Attributes:
        images: (batch, channels, height, width), in single or double precision.
        taps: Where the taps of the kernel lie from the first one, row by row.
        padding: Rows above and columns left of the images.
        sizes: How many rows and columns of patches an image has.
    """

    images: torch.Tensor
    taps: tuple[Offset, ...]
    padding: Offset
    sizes: Offset

    @property
    def count(self) -> int:
        """Number of patches."""
        return len(self.images) * self.sizes[0] * self.sizes[1]

    @property
    def length(self) -> int:
        """Of a patch: channels times taps, the taps of a channel side by side."""
        return self.images.shape[1] * len(self.taps)


def offset(first: Offset, second: Offset) -> Offset:
    """From one tap to another."""
    return second[0] - first[0], second[1] - first[1]


@dataclass
class _Shifted:
    """Sums over the positions at which one pair of taps lies in an image, both of them.

    Attributes:
        count: Number of the positions.
        lacking: Sum of d d'^T where both lie in an image but the patch is none, (channels, same).
        first: Sum of d where the first tap is.
        second: Sum of d' where the second tap is.
    """

    count: int
    lacking: torch.Tensor | None
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class WindowSums:
    """Sums of x x^T and of x over patches x, without the patches.

    The entries of two taps depend on the step from one to the other alone, but for what lies at the
    border: 13 correlations stand for the 45 pairs of a 3 x 3 kernel. With d = image - c, c being
    the first batch's mean of each channel, products of d are summed in single precision within runs
    of 2048 positions and in double precision across them, so that the error is that of `Runs`; what
    c adds is computed in double precision.

    Attributes:
        taps: See `Windows`.
        count: Number of patches.
    """

    taps: tuple[Offset, ...]
    count: int = 0
    _mean: torch.Tensor | None = None
    _whole: dict[Offset, torch.Tensor] = field(default_factory=dict)
    _pairs: dict[tuple[Offset, Box], _Shifted] = field(default_factory=dict)

    def add(self, windows: Windows) -> None:
        """Take in patches of as many taps and channels."""
        images = windows.images
        if self._mean is None:
            self._mean = images.double().mean((0, 2, 3)).to(images.dtype)
        self.count += windows.count
        spread = images.permute(0, 2, 3, 1) - self._mean
        steps = {offset(a, b) for a, b in self._all_pairs()}
        for step, product in _correlations(spread, steps):
            known = self._whole.get(step)
            self._whole[step] = product if known is None else known.add_(product)
        totals = functional.pad(spread.sum(0, dtype=torch.float64), (0, 0, 1, 0, 1, 0))
        totals = totals.cumsum(0).cumsum(1)
        done = set()
        for a, b in self._all_pairs():
            key, box = _placed(windows, a, b)
            if key not in done:
                done.add(key)
                self._add_pair(key, box, spread, totals)

    def _all_pairs(self) -> Iterator[tuple[Offset, Offset]]:
        """Pairs of taps, the second one not before the first."""
        for i, a in enumerate(self.taps):
            for b in self.taps[i:]:
                yield a, b

    def _add_pair(
        self, key: tuple[Offset, Box], box: Box, spread: torch.Tensor, totals: torch.Tensor
    ) -> None:
        """Take in the positions of one pair of taps.

        Args:
            key: The step, and what of its whole box is lacking on each side.
            box: Where the first tap is.
            spread: d, (batch, height, width, channels).
            totals: Sums of d over all that is above and left, (height + 1, width + 1, channels).
        """
        step, (above, below, left, right) = key
        top, bottom, start, end = box
        strips = [
            (top - above, top, start - left, end + right),
            (bottom, bottom + below, start - left, end + right),
            (top, bottom, start - left, start),
            (top, bottom, end, end + right),
        ]
        lacking: torch.Tensor | None = None
        for strip in strips:
            if strip[0] < strip[1] and strip[2] < strip[3]:
                part = _product(_cut(spread, strip), _cut(spread, _moved(strip, step)))
                lacking = part if lacking is None else lacking.add_(part)
        found = _Shifted(
            len(spread) * (bottom - top) * (end - start),
            lacking,
            _total(totals, box),
            _total(totals, _moved(box, step)),
        )
        known = self._pairs.get(key)
        if known is not None:
            found.count += known.count
            found.first += known.first
            found.second += known.second
            if known.lacking is not None and found.lacking is not None:
                found.lacking += known.lacking
        self._pairs[key] = found
