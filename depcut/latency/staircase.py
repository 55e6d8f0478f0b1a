"""Measurements to a function of the kept counts: one small regression for each kind of kernel.

The time of a kernel is a sum of products of its sizes with coefficients >= 0: a constant, the
elements that it writes, those that it reads, and what it multiplies (elements written times one of
the sizes read: for convolutions and matrix products the multiply-accumulates). The sizes are
rounded up to the blocks that explain the measurements best. This is the shape of the usual roofline
arguments (Williams et al. 2009), with rates that are measured in place, not read off a data sheet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depcut.coupling.groups import Coupling
from depcut.latency.align import Track, aligned
from depcut.latency.samples import Samples
from depcut.latency.sizes import Recogniser, Size, constant
from depcut.plan.cost import Blocked, Cost, compile_staircase
from depcut.timing.kernels import Kernel

Numbers = NDArray[np.float64]

_BLOCKS = (1, 16, 32, 64)
_READ_BLOCKS = (1, 16)
_SIMPLER = 0.97  # a block must explain this much better than none
_TICK = 2e-6  # seconds; the runtime's clock counts microseconds

# A feature: places (tensor, dimension) of the sizes that are multiplied; tensor -1 is the output.
Feature = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fitted:
    """Time as a function of the kept counts.

    Attributes:
        cost: Seconds.
        errors: Relative error, [samples].
        explained: Share of the dense model's time in kernels whose sizes are all recognised.
    """

    cost: Cost
    errors: Numbers
    explained: float


@dataclass(frozen=True)
class _Member:
    """One kernel of the dense model: its sizes, as functions and in the samples, and its times."""

    sizes: dict[tuple[int, int], Size | None]
    series: dict[tuple[int, int], NDArray[np.int64]]
    seconds: Numbers


def fit(coupling: Coupling, samples: Samples) -> Fitted:
    """Fit every kind of kernel, then a constant and a scale from their sum to the whole model.

    Args:
        coupling: The groups that the counts are of.
        samples: The measurements.
    """
    from scipy.optimize import nnls

    totals = samples.seconds
    sums = np.array([sum(k.seconds for k in sample.kernels) for sample in samples.samples])
    recogniser = Recogniser(coupling, samples.counts)
    kinds: dict[tuple[object, ...], list[_Member]] = {}
    for track in aligned(samples):
        dense = track.kernels[0]
        kind = (dense.op, dense.inputs, dense.outputs)
        kinds.setdefault(kind, []).append(_member(track, totals / sums, recogniser))
    items: list[tuple[float, Blocked]] = []
    known = 0.0
    for members in kinds.values():
        items += _fit_kind(members)
        complete = [m for m in members if None not in m.sizes.values()]
        known += sum(float(m.seconds[0]) for m in complete)
    kernels_only = compile_staircase(coupling, items)
    predicted = kernels_only.many(samples.counts)
    (base, scale), _ = nnls(
        np.stack([np.ones(len(totals)), predicted], axis=1) / totals[:, None],
        np.ones(len(totals)),
    )
    cost = compile_staircase(coupling, [(base, []), *((scale * t, sizes) for t, sizes in items)])
    return Fitted(cost, cost.many(samples.counts) / totals - 1, known / float(totals[0]))


def _member(track: Track, scales: Numbers, recogniser: Recogniser) -> _Member:
    """A kernel and its counterparts, their times brought to the scale of the whole model."""
    dense = track.kernels[0]
    series = {
        (tensor, place): np.array([_shape(k, tensor)[place] for k in track.kernels], dtype=np.int64)
        for tensor in range(-bool(dense.outputs), min(len(k.inputs) for k in track.kernels))
        for place in range(min(len(_shape(k, tensor)) for k in track.kernels))
    }
    sizes = {place: recogniser.size(values, track.places) for place, values in series.items()}
    seconds = np.array([k.seconds for k in track.kernels]) * scales[list(track.places)]
    return _Member(sizes, series, seconds)


def _shape(kernel: Kernel, tensor: int) -> tuple[int, ...]:
    return kernel.outputs[0] if tensor < 0 else kernel.inputs[tensor]


def _fit_kind(members: list[_Member]) -> list[tuple[float, Blocked]]:
    """Summands of the time of kernels that are alike in the dense model."""
    from scipy.optimize import nnls

    features = list(_features(members))
    times = np.concatenate([m.seconds for m in members])
    weights = 1 / np.maximum(times, _TICK)
    best: tuple[float, tuple[int, int], Numbers] | None = None
    for blocks in itertools.product(_BLOCKS, _READ_BLOCKS):
        table = np.stack([_column(members, feature, blocks) for feature in features], axis=1)
        scale = table.max(axis=0)
        factors, error = nnls(table / scale * weights[:, None], times * weights)
        if best is None or error < _SIMPLER * best[0]:
            best = (error, blocks, factors / scale)
    assert best is not None
    _, blocks, factors = best
    return [
        (float(factor), [_blocked(member.sizes[place], place, blocks) for place in feature])
        for member in members
        for feature, factor in zip(features, factors, strict=True)
        if factor > 0
    ]


def _features(members: list[_Member]) -> Iterator[Feature]:
    """Products of sizes that may explain the time, none proportional to another."""
    places = members[0].series
    known = {p for p in places if all(m.sizes[p] is not None for m in members)}
    tensors = {
        tensor: tuple(p for p in places if p[0] == tensor) for tensor in {p[0] for p in places}
    }
    whole = {tensor: own for tensor, own in tensors.items() if known.issuperset(own)}
    written = whole.get(-1)
    candidates: list[Feature] = [(), *whole.values()]
    if written is not None:
        varying = [p for p in known if p[0] >= 0 and any(np.ptp(m.series[p]) for m in members)]
        candidates += [(*written, place) for place in sorted(varying)]
    seen = set()
    for feature in candidates:
        column = _column(members, feature, (1, 1))
        key = tuple(np.round(column / column.max(), 9))
        if column.max() > 0 and key not in seen:
            seen.add(key)
            yield feature


def _column(members: list[_Member], feature: Feature, blocks: tuple[int, int]) -> Numbers:
    """Values of a feature, [samples of all members]."""
    columns = []
    for member in members:
        column = np.ones(len(member.seconds))
        for place in feature:
            values = member.series[place]
            block = _block(place, blocks) if np.ptp(values) else 1
            column = column * (-(-values // block) * block)
        columns.append(column)
    return np.concatenate(columns)


def _block(place: tuple[int, int], blocks: tuple[int, int]) -> int:
    """What sizes at a place are rounded up to: those written to the first, read to the second."""
    return blocks[0] if place[0] < 0 else blocks[1]


def _blocked(
    size: Size | None, place: tuple[int, int], blocks: tuple[int, int]
) -> tuple[dict[tuple[int, ...], float], int]:
    """A factor of a summand; constants are not rounded."""
    size = size or constant(1)
    fixed = set(size.count) == {()}
    return size.count, 1 if fixed else math.lcm(size.block, _block(place, blocks))
