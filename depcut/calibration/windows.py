"""Second moments of overlapping patches, from correlations of shifted images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from depcut.calibration.products import single_is_kept
from depcut.graph.arguments import Call
from depcut.ops.convolution import Patches
from depcut.ops.site import Site

_PLANE = 2
_CHANNELS = 16  # of which products are large enough to be fast
_RUN = 2048  # positions whose products are summed in single precision

Offset = tuple[int, int]
Box = tuple[int, int, int, int]  # top, bottom, left, right; the ends do not belong to it


@dataclass(frozen=True, eq=False)
class Windows:
    """Patches of images as a convolution with stride 1 reads them, zeros around the images.

    Attributes:
        images: (batch, channels, height, width), in single or double precision.
        kernel: Rows and columns of taps.
        dilation: Pixels from one tap to the next, down and right.
        padding: Zeros above and below, left and right of the images.
    """

    images: torch.Tensor
    kernel: Offset
    dilation: Offset
    padding: Offset

    @staticmethod
    def of(site: Site, call: Call) -> Windows | None:
        """What a site reads, if correlations are less to compute than its second moments.

        Args:
            site: The site.
            call: Values of its node's arguments.
        """
        family = site.family
        if not isinstance(family, Patches) or family.rank != _PLANE:
            return None
        x, kernel = call["input"], tuple(call["weight"].shape[2:])
        if family.transposed or isinstance(call["padding"], str) or call["groups"] != 1:
            return None
        steps, spread, around = (_two(call[name]) for name in ("stride", "dilation", "padding"))
        span = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        if steps != (1, 1) or not any(span) or x.ndim != len(steps) + 2:
            return None
        small = any(n <= 2 * s for n, s in zip(x.shape[2:], span, strict=True))
        if small or x.shape[1] < _CHANNELS or x.dtype not in (torch.float32, torch.float64):
            return None
        return Windows(x, (kernel[0], kernel[1]), spread, around)

    @property
    def taps(self) -> list[Offset]:
        """Where the taps lie from the first one, row by row."""
        (rows, columns), (down, right) = self.kernel, self.dilation
        return [(down * i, right * j) for i in range(rows) for j in range(columns)]

    @property
    def sizes(self) -> Offset:
        """How many rows and columns of patches an image has."""
        height, width = (
            n + 2 * p - d * (k - 1)
            for n, p, d, k in zip(
                self.images.shape[2:], self.padding, self.dilation, self.kernel, strict=True
            )
        )
        return height, width

    @property
    def count(self) -> int:
        """Number of patches."""
        return len(self.images) * self.sizes[0] * self.sizes[1]

    @property
    def length(self) -> int:
        """Of a patch: channels times taps, the taps of a channel side by side."""
        return self.images.shape[1] * len(self.taps)

    def vectors(self) -> torch.Tensor:
        """The patches, (1, count, length)."""
        found = functional.unfold(self.images, self.kernel, self.dilation, self.padding)
        return found.transpose(1, 2).reshape(1, self.count, self.length)


def kept(x: torch.Tensor | Windows) -> torch.Tensor | Windows:
    """The same vectors or patches, in memory of their own."""
    return replace(x, images=x.images.clone()) if isinstance(x, Windows) else x.clone()


def _two(value: int | Sequence[int]) -> Offset:
    """A number for rows and for columns."""
    first, *rest = [value] if isinstance(value, int) else value
    return first, rest[0] if rest else first


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
    """Sums of x x^T and of x over patches x, without the patches; all of one kernel.

    The entries of two taps depend on the step from one to the other alone, but for what lies at the
    border: 13 correlations stand for the 45 pairs of a 3 x 3 kernel. With d = image - c, c being
    the first batch's mean of each channel, products of d are summed in single precision within runs
    of 2048 positions and in double precision across them, so that the error is that of `Runs`; what
    c adds is computed in double precision.

    Attributes:
        taps: See `Windows`.
        count: Number of patches.
    """

    taps: list[Offset]
    count: int = 0
    _mean: torch.Tensor | None = None
    _whole: dict[Offset, torch.Tensor] = field(default_factory=dict)
    _pairs: dict[tuple[Offset, Box], _Shifted] = field(default_factory=dict)
    _keys: dict[tuple[Offset, Offset], tuple[Offset, Box]] = field(default_factory=dict)

    def add(self, windows: Windows) -> torch.Tensor:
        """Take in patches of as many taps and channels; d, (batch, height, width, channels)."""
        images = windows.images if single_is_kept() else windows.images.double()
        if self._mean is None:
            self._mean = images.double().mean((0, 2, 3)).to(images.dtype)
        self.count += windows.count
        spread = images.permute(0, 2, 3, 1) - self._mean
        steps = {offset(a, b) for a, b in self._all_pairs()}
        for step, found in _correlations(spread, steps):
            known = self._whole.get(step)
            self._whole[step] = found if known is None else known.add_(found)
        totals = totals_of(spread)
        seen: set[tuple[Offset, Box]] = set()
        for a, b in self._all_pairs():
            lack, box = placed(windows, a, b)
            key = offset(a, b), lack
            self._keys[a, b] = key
            if key not in seen:
                seen.add(key)
                self._add_pair(key, box, spread, totals)
        return spread

    @property
    def mean(self) -> torch.Tensor:
        """c, (channels,) in double precision."""
        assert self._mean is not None
        return self._mean.double()

    def of_tap(self, tap: Offset) -> tuple[torch.Tensor, int]:
        """Sum of d over the positions where a tap is in an image, and how many there are."""
        pair = self._pairs[self._keys[tap, tap]]
        return pair.first, pair.count

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
                part = product(_cut(spread, strip), _cut(spread, moved(strip, step)))
                lacking = part if lacking is None else lacking.add_(part)
        found = _Shifted(
            len(spread) * (bottom - top) * (end - start),
            lacking,
            total_of(totals, box),
            total_of(totals, moved(box, step)),
        )
        known = self._pairs.get(key)
        if known is not None:
            found.count += known.count
            found.first += known.first
            found.second += known.second
            if known.lacking is not None and found.lacking is not None:
                found.lacking += known.lacking
        self._pairs[key] = found

    def products(self) -> torch.Tensor:
        """Sum of x x^T, (1, length, length)."""
        mean, taps = self.mean, len(self.taps)
        out = mean.new_empty(len(mean), taps, len(mean), taps)
        for i, a in enumerate(self.taps):
            for j, b in enumerate(self.taps[i:], i):
                pair = self._pairs[self._keys[a, b]]
                entry = self._whole[offset(a, b)] + torch.outer(mean, pair.second)
                entry.addr_(pair.first + pair.count * mean, mean)
                if pair.lacking is not None:
                    entry -= pair.lacking
                out[:, i, :, j] = entry
                out[:, j, :, i] = entry.T
        return out.reshape(1, len(mean) * taps, -1)

    def total(self) -> torch.Tensor:
        """Sum of x, (1, length)."""
        pairs = [self._pairs[self._keys[a, a]] for a in self.taps]
        sums = [pair.first + pair.count * self.mean for pair in pairs]
        return torch.stack(sums, 1).reshape(1, -1)


def placed(windows: Windows, a: Offset, b: Offset) -> tuple[Box, Box]:
    """Where the first of two taps is while a patch has both in an image, and what that lacks.

    Args:
        windows: The patches.
        a: The first tap.
        b: The second one.

    Returns:
        Rows and columns by which it is less than where both are in the image on each side, and
        where it is.
    """
    lack, box = list[int](), list[int]()
    for dim in (0, 1):
        size, many = windows.images.shape[2 + dim], windows.sizes[dim]
        at, step = a[dim] - windows.padding[dim], b[dim] - a[dim]
        low, high = max(0, -step), max(0, min(size, size - step))
        start = min(max(low, at), high)
        end = max(start, min(high, at + many))
        lack += [start - low, high - end]
        box += [start, end]
    return (lack[0], lack[1], lack[2], lack[3]), (box[0], box[1], box[2], box[3])


def moved(box: Box, step: Offset) -> Box:
    """A box some rows down and columns right."""
    top, bottom, left, right = box
    return top + step[0], bottom + step[0], left + step[1], right + step[1]


def _cut(images: torch.Tensor, box: Box) -> torch.Tensor:
    """Pixels (pixels, channels) of a part of images (batch, height, width, channels)."""
    top, bottom, left, right = box
    return images[:, top:bottom, left:right].reshape(-1, images.shape[3])


def totals_of(images: torch.Tensor) -> torch.Tensor:
    """Sums over all images (batch, height, width, channels) of what is above and left.

    Returns:
        (height + 1, width + 1, channels), in double precision.
    """
    sums = functional.pad(images.sum(0, dtype=torch.float64), (0, 0, 1, 0, 1, 0))
    return sums.cumsum(0).cumsum(1)


def total_of(totals: torch.Tensor, box: Box) -> torch.Tensor:
    """Sum over a box, from the sums over all that is above and left."""
    top, bottom, left, right = box
    return totals[bottom, right] - totals[top, right] - totals[bottom, left] + totals[top, left]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A^T B in double precision, of runs in that of A and B."""
    out = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for first, second in zip(a.split(_RUN), b.split(_RUN), strict=True):
        out += first.T @ second
    return out


def _correlations(
    images: torch.Tensor, steps: Iterable[Offset]
) -> Iterator[tuple[Offset, torch.Tensor]]:
    """Sums of d d'^T over all pixels d and those d' a step away that are in the same image.

    Args:
        images: (batch, height, width, channels).
        steps: Down and right; none up, nor left in the same row.
    """
    steps = list(steps)
    down, right = (max(abs(step[dim]) for step in steps) for dim in (0, 1))
    # Zeros between rows and images, so that a step is a shift of all pixels in one row.
    padded = functional.pad(images, (0, 0, 0, right, 0, down))
    wide, pixels = padded.shape[2], padded.reshape(-1, images.shape[3])
    for step in steps:
        shift = step[0] * wide + step[1]
        yield step, product(pixels[: len(pixels) - shift], pixels[shift:])
