"""Interleaved timing: samples of calls in turns, intervals of medians, speedups beyond noise."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from depcut.capture.process_state import uncollected

# What is timed, and what times it: the seconds that so many calls of a function take.
Call: TypeAlias = Callable[[], object]
Stopwatch: TypeAlias = Callable[[Call, int], float]

# A turn lasts this long: far above what reading a clock costs, and above what the scheduler takes.
_TURN_SECONDS = 20e-3
# What comes before it, as a share: the first two calls after another model's are the slow ones.
_UNCOUNTED = 0.25
# Two sessions of the very same file differ by about 1 %: their buffers lie elsewhere.
_SMALLEST_EFFECT = 0.02
# Quartiles of a quiet machine are within a few per cent of the median.
_LARGEST_SPREAD = 0.2


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        median: Median over the rounds.
        low: Lower end of the 95 % confidence interval of the median.
        high: Upper end of it.
        samples: Seconds per call in each round, in order.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The timing of samples, in seconds per call."""
        low, high = median_interval(samples)
        return cls(statistics.median(samples), low, high, tuple(samples))

    @property
    def spread(self) -> float:
        """Interquartile range of the samples as a share of their median."""
        if len(self.samples) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (third - first) / self.median

    @property
    def is_unstable(self) -> bool:
        """Whether the spread is above 20 %, as on a machine that is busy with other work."""
        return self.spread > _LARGEST_SPREAD

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ms ({1e3 * self.low:.3g} to {1e3 * self.high:.3g})"


@dataclass(frozen=True)
class Speedup:
    """How many times faster one candidate is than another, from the rounds that both ran in.

    Attributes:
        ratio: Median of the per-round ratios of times.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of it.
    """

    ratio: float
    low: float
    high: float

    @classmethod
    def between(cls, base: Timing, candidate: Timing) -> Speedup:
        """How many times faster `candidate` is than `base`, paired round by round."""
        pairs = zip(base.samples, candidate.samples, strict=True)
        ratios = [slow / fast for slow, fast in pairs]
        return cls(statistics.median(ratios), *median_interval(ratios))

    @property
    def verdict(self) -> Literal["faster", "slower", "within noise"]:
        """What may be claimed: "within noise" unless the whole interval is beyond 2 %."""
        if self.low > 1 + _SMALLEST_EFFECT:
            return "faster"
        if self.high < 1 / (1 + _SMALLEST_EFFECT):
            return "slower"
        return "within noise"

    def __str__(self) -> str:
        interval = f"{self.low:.2f} to {self.high:.2f}"
        if self.verdict == "within noise":
            return f"no difference beyond noise ({interval}x)"
        return f"{self.ratio:.2f}x ({interval}), {self.verdict}"


def host_seconds(call: Call, count: int) -> float:
    """Seconds on the host's clock that so many calls take.

    Args:
        call: A function whose work is done when it returns.
        count: How often to call it.

    Returns:
        The seconds of all calls together.
    """
    started = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started


def interleave(
    calls: Mapping[str, Call], *, rounds: int, warmup: int, stopwatch: Stopwatch = host_seconds
) -> dict[str, list[float]]:
    """Seconds per call of each function, one sample a round, all of them in turn in every round.

    A turn begins with calls that are not counted, some 5 ms of them and one at least, since the
    caches are full of the other candidates' data; then the function is repeated until some 20 ms
    are filled, once at least. A small model beside a large one is thus measured as it runs alone.

    Args:
        calls: What to time, by name.
        rounds: Number of rounds.
        warmup: Calls of each that come first and are not counted.
        stopwatch: What tells the seconds that a number of calls take.

    Returns:
        The samples by name, in the order of the rounds.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        repeats[name] = _calls_per_turn(call, stopwatch)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    with uncollected():
        for _ in range(rounds):
            for name, call in calls.items():
                count = repeats[name]
                stopwatch(call, math.ceil(count * _UNCOUNTED))
                samples[name].append(stopwatch(call, count) / count)
    return samples


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free confidence interval of the median, from order statistics.

    The number of samples below the true median is binomial (n, 1/2), whatever the distribution;
    see Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.

    Args:
        samples: At least 6 of them for 95 %; with fewer, the interval is the whole range.
        confidence: Probability that the interval covers the median.

    Returns:
        The lower and the upper end.
    """
    ordered = sorted(samples)
    n = len(ordered)
    tail, below = 0.0, 0
    while below < n // 2:
        tail += math.comb(n, below) / 2**n
        if tail > (1 - confidence) / 2:
            break
        below += 1
    first = max(below - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def _calls_per_turn(call: Call, stopwatch: Stopwatch) -> int:
    """How many calls fill a turn: doubled until they take a quarter of it, then extrapolated."""
    count = 1
    seconds = stopwatch(call, count)
    while seconds < _TURN_SECONDS / 4:
        count *= 2
        seconds = stopwatch(call, count)
    return math.ceil(count * _TURN_SECONDS / seconds)
