"""Match the kernels of every sample to those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from depcut.latency.samples import Samples
from depcut.timing.kernels import Kernel

_MOST = 0.5  # of the samples must have a kernel


@dataclass(frozen=True)
class Track:
    """One kernel of the dense model through the samples.

    Attributes:
        places: Samples that have it, ascending; the first is the dense model.
        kernels: It and its counterparts there.
    """

    places: tuple[int, ...]
    kernels: tuple[Kernel, ...]


def aligned(samples: Samples) -> list[Track]:
    """Kernels of the dense model that most samples have, each with its counterparts.

    A runtime may replace a kernel at some widths (another layout, a fusion that does not apply).
    The time of what replaces it is left to the constant and the scale that
    `depcut.latency.staircase.fit` fits between the kernels and the whole model.

    Args:
        samples: The measurements.
    """
    base = samples.samples[0].kernels
    matches = [_matches(base, sample.kernels) for sample in samples.samples]
    tracks = []
    for place in range(len(base)):
        own = tuple(n for n, match in enumerate(matches) if place in match)
        if len(own) >= _MOST * len(matches):
            kernels = tuple(samples.samples[n].kernels[matches[n][place]] for n in own)
            tracks.append(Track(own, kernels))
    return tracks


def _matches(base: Sequence[Kernel], other: Sequence[Kernel]) -> dict[int, int]:
    """Position in `other` by position in `base`, for the kernels that match."""
    first, second = list(map(_kind, base)), list(map(_kind, other))
    if first == second:
        return {place: place for place in range(len(first))}
    return best_alignment(_similarity(base, other))


def _kind(kernel: Kernel) -> tuple[object, ...]:
    """Operator and ranks of a kernel, which do not depend on the widths."""
    ranks = (tuple(map(len, kernel.inputs)), tuple(map(len, kernel.outputs)))
    return (kernel.op, *ranks)


def _similarity(base: Sequence[Kernel], other: Sequence[Kernel]) -> NDArray[np.float64]:
    """Similarity of kernels, [len(base), len(other)]: 0 across families, else from 1 to 3.

    Sizes that have nothing to do with the widths (of an image, of a sentence) agree, and tell the
    layers of one stage from those of the next. Another number of inputs or another layout is a
    matter of fusion, and counts as less similar only.
    """
    same = np.zeros((len(base), len(other)))
    for place in range(max(len(_sizes(k)) for k in (*base, *other))):
        same += _equal(base, other, partial(_size_at, place))
    alike = _equal(base, other, _kind)
    family = _equal(base, other, lambda k: (_family(k.op), tuple(map(len, k.outputs))))
    return np.where(family, 1 + alike + same / max(same.max(), 1), 0.0)


def _equal(
    base: Sequence[Kernel], other: Sequence[Kernel], what: Callable[[Kernel], object]
) -> NDArray[np.bool_]:
    """Where two sequences agree in something: [length of the first, length of the second]."""
    numbers: dict[object, int] = {}
    first, second = (
        np.array([numbers.setdefault(what(k), len(numbers)) for k in some])
        for some in (base, other)
    )
    return np.asarray(first[:, None] == second[None, :])


def _size_at(place: int, kernel: Kernel) -> int | None:
    sizes = _sizes(kernel)
    return sizes[place] if place < len(sizes) else None


def _sizes(kernel: Kernel) -> tuple[int, ...]:
    return sum((*kernel.outputs, *kernel.inputs), ())


def _family(op: str) -> str:
    """The operator without the marks of fusion and blocked layout: Conv for FusedConv."""
    return op.removesuffix(" (blocked)").removeprefix("Fused")


def best_alignment(similarity: NDArray[np.float64]) -> dict[int, int]:
    """The order-preserving matching of two sequences with the greatest total similarity.

    Source: Needleman, Wunsch 1970, without a penalty for gaps.

    Args:
        similarity: [length of the first, length of the second]; 0: never matched.

    Returns:
        Place in the second by place in the first.
    """
    rows, columns = similarity.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(rows):
        straight = best[i, :-1] + similarity[i]
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(straight, best[i, 1:]))
    places = {}
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            places[i] = j
    return places
