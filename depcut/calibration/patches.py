"""Sites of convolutions: every patch that a kernel sees (im2col), each group a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from depcut.calibration.site import Call, Place, Site

_CONV: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_PLANE = 2


@dataclass(frozen=True)
class Patches:
    """A convolution of any rank, or its transpose.

    Attributes:
        rank: Number of spatial dimensions.
        transposed: Whether it is a transposed convolution, whose weight is (in, out / groups, ...).
    """

    rank: int
    transposed: bool

    @property
    def result(self) -> int:
        """The channels."""
        return -self.rank - 1

    def inputs(self, call: Call) -> torch.Tensor:
        """(groups, batch * positions, in / groups * taps)."""
        x: torch.Tensor = call["input"]
        x = x if x.ndim == self.rank + 2 else x[None]
        kernel = call["weight"].shape[2:]
        groups, channels = call["groups"], x.shape[1]
        if kernel.numel() == 1 and self._is_plain(call):
            patches = x.flatten(2)
        elif self.rank == _PLANE and not self.transposed and not isinstance(call["padding"], str):
            options = {k: call[k] for k in ("dilation", "padding", "stride")}
            patches = functional.unfold(x, tuple(kernel), **options)
        else:
            patches = self._spread(x, call, kernel)
        columns = patches.reshape(len(x), groups, channels // groups * kernel.numel(), -1)
        return columns.permute(1, 0, 3, 2).flatten(1, 2)

    def _spread(self, x: torch.Tensor, call: Call, kernel: torch.Size) -> torch.Tensor:
        """One output channel for each channel and tap, by kernels with a single one."""
        taps = torch.eye(kernel.numel(), dtype=x.dtype, device=x.device)
        channels = x.shape[1]
        names = ["stride", "padding", "dilation"] + ["output_padding"] * self.transposed
        options: dict[str, Any] = {k: call[k] for k in names}
        if self.transposed:
            weight = taps.reshape(1, -1, *kernel).repeat(channels, 1, *[1] * self.rank)
            made = _TRANSPOSED[self.rank](x, weight, groups=channels, **options)
        else:
            weight = taps.reshape(-1, 1, *kernel).repeat(channels, 1, *[1] * self.rank)
            made = _CONV[self.rank](x, weight, groups=channels, **options)
        return made.flatten(2)

    def _is_plain(self, call: Call) -> bool:
        """One tap, no stride and no padding: the patches are the input itself."""
        padding = call["padding"]
        offsets = (
            [] if isinstance(padding, str) else [padding] if isinstance(padding, int) else padding
        )
        strides = call["stride"]
        strides = [strides] if isinstance(strides, int) else strides
        return not any(offsets) and all(s == 1 for s in strides) and not self.transposed

    def _grouped(self, call: Call) -> torch.Tensor:
        """The weight as (groups, out, in / groups, taps), a view where there is one."""
        weight, groups = call["weight"], call["groups"]
        if self.transposed:
            return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(3)  # type: ignore[no-any-return]
        return weight.unflatten(0, (groups, -1)).flatten(3)  # type: ignore[no-any-return]

    def matrix(self, call: Call) -> torch.Tensor:
        """(groups, out, in / groups * taps)."""
        return self._grouped(call).flatten(2)

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Turned back."""
        blocks = self._grouped(call)
        solved = matrix.reshape(blocks.shape)
        if self.transposed:
            solved = solved.transpose(1, 2)
        call["weight"].copy_(solved.reshape(call["weight"].shape))


def conv(place: Place) -> list[Site]:
    """Weight (out, in / groups, *kernel)."""
    name, biases = place.parameter(place.arg("weight")), place.biases(place.arg("bias"))
    if name is None or biases is None:
        return []
    weight = place.dims("weight")
    family = Patches(len(weight) - 2, transposed=False)
    return [Site(place.node, (name,), biases, (tuple(weight[1:]),), weight[0], family)]


def conv_transpose(place: Place) -> list[Site]:
    """Weight (in, out, *kernel); with groups, columns would be a part of the first dimension."""
    name, biases = place.parameter(place.arg("weight")), place.biases(place.arg("bias"))
    if name is None or biases is None or place.arg("groups") != 1:
        return []
    weight = place.dims("weight")
    family = Patches(len(weight) - 2, transposed=True)
    return [Site(place.node, (name,), biases, ((weight[0], *weight[2:]),), weight[1], family)]
