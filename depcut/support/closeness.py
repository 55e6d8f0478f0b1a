"""How far apart two computations of the same values are: the largest difference, against the scale.

This is the distance of checks, where one wrong element is an error. Distances that rank models add
squares up instead: `depcut.allocate.influence.output_change`, `depcut.training.output_distance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


def relative_error(wanted: Sequence[Any], got: Sequence[Any]) -> tuple[float, str]:
    """The largest relative difference over all real or complex tensors of two flat outputs.

    Args:
        wanted: What was expected; leaves that are no tensors or of integers are not compared.
        got: What was computed.

    Returns:
        The difference, see `Gap.relative`, and what is wrong besides: it is infinite then.
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
        difference = gap(want, have)
        if difference.worst == math.inf:
            return math.inf, "an output that is not finite where the dense model's is"
        worst = max(worst, difference.relative)
    return worst, ""
