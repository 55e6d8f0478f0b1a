"""The values of a smaller model beside those of the reference, each with what rounding may do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from depcut.plan.keep import Keep
from depcut.reference.run import kept_part
from depcut.support.closeness import Gap, gaps, unequal
from depcut.verify.module_results import ModuleResults
from depcut.verify.precision import coarsest, tolerance
from depcut.verify.replay import Recording, Replay, other_number

CERTAIN = 3e-6  # a smaller difference of outputs needs no second look in double precision
_CERTAIN_INSIDE = 1e-5  # and of values within, whose scale may be that of a difference
# Share of the largest value's scale below which a value's own scale is what others leave behind.
_DUST = 1e-2
_DUST_IN_DOUBLE = 1e-6
_MASK = 1e6  # a scale that says nothing about that of other values


@dataclass
class Found:
    """What a comparison found.

    Attributes:
        size: The largest difference, relative to the value's own scale, but for values within that
            are no more than what larger ones leave behind; of integers, the share that differs.
        excess: The largest one by what rounding may cause: more than 1 is more than that.
        certain: Whether all are so small that they need no second look.
        message: What is wrong besides.
        module: Whose code computes the first value that is off, None if it is not known.
    """

    size: float = 0.0
    excess: float = 0.0
    certain: bool = True
    message: str = ""
    module: str | None = None

    @property
    def good(self) -> bool:
        """Whether rounding may have caused all of it."""
        return not self.message and self.excess <= 1


@dataclass(frozen=True)
class _Pair:
    wanted: Tensor
    got: Tensor
    dtype: torch.dtype | None
    module: str | None


@dataclass(frozen=True)
class Expected:
    """What the reference computes.

    Attributes:
        outputs: Its flat outputs.
        values: The kept part, or a sample of it, of what modules get and return.
        recording: What it drew, and the numbers that it computed with.
    """

    outputs: list[Any]
    values: Mapping[fx.Node, Any]
    recording: Recording = field(default_factory=Recording)


def compare(
    keep: Keep, expected: Expected, seen: ModuleResults, replay: Replay | None, *, double: bool
) -> Found:
    """Compare one run of a smaller model with the reference's.

    Args:
        keep: What stays.
        expected: Of the reference.
        seen: Of the smaller model.
        replay: What it drew, if that was seen.
        double: Whether both ran in double precision.
    """
    if len(expected.outputs) != len(seen.outputs):
        message = f"{len(seen.outputs)} outputs instead of {len(expected.outputs)}"
        return Found(math.inf, math.inf, False, message)
    found = Found(message=seen.shape)
    dtypes = coarsest(keep.coupling.program)
    nodes = keep.coupling.program.outputs
    inside = list(_inside(expected, seen, replay, dtypes))
    outputs = []
    results = keep.coupling.program.results
    for i, (wanted, got) in enumerate(zip(expected.outputs, seen.outputs, strict=True)):
        if not isinstance(wanted, Tensor):
            continue
        if results.counts and not results.counts[i]:
            if not _is_kept_part(got, wanted, keep, nodes[i]):
                shape = tuple(getattr(got, "shape", ()))
                message = f"{results.paths[i]!r}, which does not count, has the shape {shape}"
                return Found(math.inf, math.inf, False, message)
            continue
        if not isinstance(got, Tensor) or wanted.shape != got.shape:
            shape = tuple(getattr(got, "shape", ()))
            message = f"an output of shape {shape} instead of {tuple(wanted.shape)}"
            return Found(math.inf, math.inf, False, message)
        outputs.append(_Pair(wanted, got, dtypes.get(nodes[i]), None))
    _measure(found, inside, outputs, double)
    if not found.message and replay is not None:
        module, problem = other_number(expected.recording, replay)
        if problem:
            found.message, found.module = problem, module
    if not found.good and replay is not None and replay.lost and not found.message:
        found.message = f"what {replay.lost[0]} draws differs: it cannot be replayed"
    return found


def _is_kept_part(got: Any, wanted: Tensor, keep: Keep, node: Any) -> bool:
    """Whether a value has the sizes of what is kept of the dense one, or is all of it."""
    if not isinstance(got, Tensor):
        return False
    part = kept_part(wanted, keep, keep.coupling.env[node])
    return got.shape in (part.shape, wanted.shape)


def _inside(
    expected: Expected,
    seen: ModuleResults,
    replay: Replay | None,
    dtypes: Mapping[fx.Node, torch.dtype],
) -> Iterator[_Pair]:
    """What modules get and return, and what operators that draw read."""
    for inner in seen.inner:
        wanted = expected.values.get(inner.node)
        if isinstance(wanted, Tensor) and wanted.shape == inner.value.shape:
            yield _Pair(wanted, inner.value, dtypes.get(inner.node), inner.module)
    for node, wanted, got in replay.read if replay is not None else ():
        yield _Pair(wanted, got, dtypes.get(node), None)


def _measure(found: Found, inside: list[_Pair], outputs: list[_Pair], double: bool) -> None:
    """Add the differences of pairs to what was found."""
    measured = [(p, _gaps(p)) for p in (*inside, *outputs)]
    scales = [g.scale for _, levels in measured for g in levels if g.scale < _MASK]
    floor = (_DUST_IN_DOUBLE if double else _DUST) * max(scales, default=0.0)
    for number, (pair, levels) in enumerate(measured):
        within = number < len(inside)
        for gap in levels:
            if gap.worst == math.inf:
                if not found.message:
                    what = "a value" if within else "an output"
                    found.message = f"{what} that is not finite where the dense model's is"
                    found.module = found.module or pair.module
                found.size = found.excess = math.inf
                found.certain = False
                continue
            size = gap.worst / (max(gap.scale, floor) or 1.0)
            excess = size / tolerance(pair.dtype, double=double)
            if excess > 1 and found.module is None:
                found.module = pair.module
            found.size = max(found.size, size if within else gap.relative)
            found.excess = max(found.excess, excess)
            found.certain &= gap.relative <= (_CERTAIN_INSIDE if within else CERTAIN)
        share = 0.0 if levels else unequal(pair.wanted, pair.got)
        if share:
            found.size, found.excess = max(found.size, share), math.inf
            found.certain = False
            if found.module is None:
                found.module = pair.module


def _gaps(pair: _Pair) -> tuple[Gap, ...]:
    """Differences of real or complex numbers; of others none: they are compared exactly."""
    if pair.wanted.is_meta:
        return (Gap(0.0, 0.0),)
    if not (pair.wanted.is_floating_point() or pair.wanted.is_complex()):
        return ()
    return gaps(pair.wanted, pair.got)
