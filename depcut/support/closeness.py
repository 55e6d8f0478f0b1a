"""How far apart two computations of the same values are: the largest difference, against the scale.

This is the distance of checks, where one wrong element is an error. Distances that rank models add
squares up instead: `depcut.allocate.influence.output_change`, `depcut.training.output_distance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """The difference of two tensors.

    Attributes:
        worst: The largest absolute difference; infinite where only one of them is finite, or both
            are not and differ.
        scale: The largest finite magnitude of what was expected; 0 if there is none.
    """

    worst: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference by the scale; itself where all that was expected is zero."""
        return self.worst / (self.scale or 1.0)


def gap(wanted: Tensor, got: Tensor) -> Gap:
    """The difference of two tensors of one shape; infinities and NaNs equal themselves.

    Args:
        wanted: What was expected; of half precision, it is compared in single precision.
        got: What was computed.
    """
    if not wanted.numel():
        return Gap(0.0, 0.0)
    if wanted.dtype in (torch.float16, torch.bfloat16):
        wanted, got = wanted.float(), got.float()
    worst = float((wanted - got).abs().max())
    if math.isfinite(worst):
        return Gap(worst, float(wanted.abs().max()))
    finite = torch.isfinite(wanted)
    odd, other = wanted[~finite], got[~finite]
    alike = (odd == other) | (odd.isnan() & other.isnan())
    same = bool((finite == torch.isfinite(got)).all() and alike.all())
    wanted, got = wanted[finite], got[finite]
    if not wanted.numel():
        return Gap(0.0 if same else math.inf, 0.0)
    scale = float(wanted.abs().max())
    return Gap(float((wanted - got).abs().max()) if same else math.inf, scale)


_LARGE = 3  # decade from which a magnitude may be a mask: 1e3
_APART = 2  # empty decades between magnitudes that are measured apart


def gaps(wanted: Tensor, got: Tensor) -> tuple[Gap, ...]:
    """The difference of two tensors of one shape, of each level of magnitude by itself.

    Large values with a gap of decades below them do not set the scale of what is below: -1e9, or
    the smallest finite number, in the masked entries of logits.

    Args:
        wanted: What was expected.
        got: What was computed.
    """
    whole = gap(wanted, got)
    if whole.scale < 10**_LARGE or not math.isfinite(whole.worst) or not whole.worst:
        return (whole,)
    magnitudes = wanted.detach().abs().double()
    least = _least_large(magnitudes)
    if least is None:
        return (whole,)
    large = magnitudes >= least
    upper = gap(wanted[large], got[large])
    lower = gap(wanted[~large], got[~large])
    # Computed large values leave their rounding behind in what they were subtracted from.
    rounding = 8 * torch.finfo(wanted.dtype).eps * upper.scale if upper.worst else 0.0
    return (upper, Gap(lower.worst, max(lower.scale, rounding)))


def _least_large(magnitudes: Tensor) -> float | None:
    """The smallest magnitude above a gap of decades; None where there is no gap."""
    some = magnitudes[torch.isfinite(magnitudes) & (magnitudes > 0)]
    decades: list[int] = some.log10().floor().long().unique().tolist()
    for below, above in pairwise(decades):
        if above >= _LARGE and above - below > _APART:
            return float(10**above)
    return None


def unequal(wanted: Tensor, got: Tensor) -> float:
    """Share of the entries in which two tensors of one shape differ.

    Args:
        wanted: What was expected.
        got: What was computed.
    """
    return float((wanted != got).double().mean()) if wanted.numel() else 0.0


def relative_error(wanted: Sequence[Any], got: Sequence[Any]) -> tuple[float, str]:
    """The largest relative difference over all real or complex tensors of two flat outputs.

    Args:
        wanted: What was expected; leaves that are no tensors or of integers are not compared.
        got: What was computed.

    Returns:
        The difference, see `gaps` and `Gap.relative`, and what is wrong besides: it is infinite
        then.
    """
    if len(wanted) != len(got):
        return math.inf, f"{len(got)} outputs instead of {len(wanted)}"
    worst = 0.0
    for want, have in zip(wanted, got, strict=True):
        if not isinstance(want, Tensor):
            continue
        if not isinstance(have, Tensor) or want.shape != have.shape:
            shape = tuple(getattr(have, "shape", ()))
            return math.inf, f"an output of shape {shape} instead of {tuple(want.shape)}"
        if want.is_meta or not (want.is_floating_point() or want.is_complex()):
            continue
        for difference in gaps(want, have):
            if difference.worst == math.inf:
                return math.inf, "an output that is not finite where the dense model's is"
            worst = max(worst, difference.relative)
    return worst, ""
