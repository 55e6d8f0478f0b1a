"""Convolutions: channels contract, groups are an outer factor, what a kernel slides over stays."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from depcut import axes
from depcut.axes import Term
from depcut.graph.arguments import Call
from depcut.graph.operators import base_name
from depcut.ops.form import Form, form
from depcut.ops.registry import Op, Output, aten, rule
from depcut.ops.site import ContractionOp, Site, site
from depcut.ops.taint import TaintedOp, multilinear, tainted, taints
from depcut.ops.windows import is_padded, slid_over

_CONV = aten("conv1d conv2d conv3d")
_TRANSPOSED = aten("conv_transpose1d conv_transpose2d conv_transpose3d")
_FUNCTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_TRANSPOSED_FUNCTIONS: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_PLANE = 2


def _grouped(op: Op, groups: int) -> Term:
    """The group axis, whose count is the operator's `groups` argument."""
    return axes.axis(groups)


@rule(*_CONV)
def conv(op: Op) -> Output:
    """Weight (out, in / groups, *kernel); in = groups x i, out = groups x o."""
    x, weight, bias = op.dims("input"), op.dims("weight"), op.arg("bias")
    rank = len(weight) - 2
    batch, channels, spatial = x[: -rank - 1], x[-rank - 1], x[-rank:]
    groups = _grouped(op, op.arg("groups"))
    out = axes.axis(weight[0].size // groups.size)
    op.unify(channels, axes.product(groups, weight[1]))
    op.unify(weight[0], axes.product(groups, out))
    op.literal("groups", term=groups)
    op.contract("weight", 1, against=("input", -rank - 1))
    if bias is not None:
        op.unify(op.dims("bias")[0], weight[0])
    for term in weight[2:]:
        op.freeze(term, "kernel: taps of a convolution")
    taps = all(t.size == 1 for t in weight[2:]) and _is_plain(op)
    result = (*batch, weight[0], *slid_over(op, spatial, taps))
    op.macs(*result, *weight[1:])
    return result


def _is_plain(op: Op) -> bool:
    """No stride and no padding: positions map one to one."""
    stride, padding = op.arg("stride"), op.arg("padding")
    stride = [stride] if isinstance(stride, int) else stride
    return all(s == 1 for s in stride) and (
        isinstance(padding, str) or not any([padding] if isinstance(padding, int) else padding)
    )


@rule(*_TRANSPOSED)
def conv_transpose(op: Op) -> Output:
    """Weight (in, out / groups, *kernel); in = groups x i, out = groups x o."""
    x, weight, bias = op.dims("input"), op.dims("weight"), op.arg("bias")
    rank = len(weight) - 2
    batch, channels, spatial = x[: -rank - 1], x[-rank - 1], x[-rank:]
    groups = _grouped(op, op.arg("groups"))
    per_group = axes.axis(weight[0].size // groups.size)
    op.unify(weight[0], axes.product(groups, per_group))
    op.unify(channels, weight[0])
    op.literal("groups", term=groups)
    op.contract("weight", 0)
    out = axes.product(axes.resolve(groups), axes.resolve(weight[1]))
    if bias is not None:
        op.unify(op.dims("bias")[0], out)
    for term in weight[2:]:
        op.freeze(term, "kernel: taps of a convolution")
    op.macs(*batch, *x[-rank:], weight[0], *weight[1:])
    return (*batch, axes.resolve(out), *slid_over(op, spatial, False))


@taints(*_CONV, *_TRANSPOSED)
def convolution_taint(op: TaintedOp) -> Any:
    """Only zeros stay constant across a border, or where kernels overlap unevenly."""
    bare = is_padded(op) or "transpose" in base_name(op.node)
    out = multilinear(op, ("input", "weight"), added="bias", bare=bare)
    return None if tainted(op.taint(op.arg("bias"))) else out


@form(*_CONV)
def conv_form(op: TaintedOp) -> Form | None:
    """Patches times taps, group by group."""
    (x, w), inputs, rank = _operands(op)
    shape, groups = op.value(w).shape, int(op.value(op.arg("groups")))
    sizes = (("g", groups), ("i", int(shape[1])), ("o", int(shape[0]) // groups))
    why = "it pads with zeros, so that the border differs" if is_padded(op) else ""
    return Form((x, w), (inputs, ("go", "i", *"uvw"[:rank])), sizes, out="go", why=why)


@form(*_TRANSPOSED)
def conv_transpose_form(op: TaintedOp) -> Form | None:
    """Positions times taps, group by group."""
    (x, w), inputs, rank = _operands(op)
    groups = int(op.value(op.arg("groups")))
    sizes = (("g", groups), ("i", int(op.value(w).shape[0]) // groups))
    why = "it is a transposed convolution, whose kernels overlap unevenly"
    return Form((x, w), (inputs, ("gi", "o", *"uvw"[:rank])), sizes, why=why)


def _operands(op: TaintedOp) -> tuple[tuple[Any, Any], tuple[str, ...], int]:
    """(input and weight, letters of the input, number of spatial dimensions)."""
    x, w = op.arg("input"), op.arg("weight")
    rank = op.value(w).ndim - 2
    batch = op.value(x).ndim - rank - 1
    return (x, w), (*"B"[:batch], "gi", *"pqr"[:rank]), rank


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
        """The channel dimension, from the end."""
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
            patches = _windows(x, call)
        else:
            patches = self._spread(x, call, kernel)
        columns = patches.reshape(len(x), groups, channels // groups * kernel.numel(), -1)
        # Positions last in memory: rows of patches are copied as they lie.
        turned = columns.permute(1, 2, 0, 3).flatten(2)
        return turned.transpose(1, 2)

    def reads(self, nodes: Call, call: Call) -> tuple[Hashable, ...] | None:
        """The activations, the sizes of the kernel and all that says where it lies."""
        names = ["stride", "padding", "dilation", "groups"] + ["output_padding"] * self.transposed
        return (
            "patches",
            self,
            nodes["input"],
            call["weight"].shape[2:],
            *(str(call[n]) for n in names),
        )

    def _spread(self, x: torch.Tensor, call: Call, kernel: torch.Size) -> torch.Tensor:
        """(batch, in * taps, positions): patches by a convolution with one-hot kernels."""
        taps = torch.eye(kernel.numel(), dtype=x.dtype, device=x.device)
        channels = x.shape[1]
        names = ["stride", "padding", "dilation"] + ["output_padding"] * self.transposed
        options: dict[str, Any] = {k: call[k] for k in names}
        if self.transposed:
            weight = taps.reshape(1, -1, *kernel).repeat(channels, 1, *[1] * self.rank)
            spread = _TRANSPOSED_FUNCTIONS[self.rank](x, weight, groups=channels, **options)
        else:
            weight = taps.reshape(-1, 1, *kernel).repeat(channels, 1, *[1] * self.rank)
            spread = _FUNCTIONS[self.rank](x, weight, groups=channels, **options)
        return spread.flatten(2)

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
        """Write W of shape (groups, out, in / groups * taps) into the parameter."""
        blocks = self._grouped(call)
        solved = matrix.reshape(blocks.shape)
        if self.transposed:
            solved = solved.transpose(1, 2)
        call["weight"].copy_(solved.reshape(call["weight"].shape))


def _windows(x: torch.Tensor, call: Call) -> torch.Tensor:
    """(batch, in * taps, positions) as `functional.unfold` has them, positions of a batch together.

    Tap by tap, since neighbouring positions then lie side by side in what is copied.
    """
    (down, right), (top, left), steps = (
        (v, v) if isinstance(v, int) else v * 2 if len(v) == 1 else v
        for v in (call["dilation"], call["padding"], call["stride"])
    )
    rows, columns = call["weight"].shape[2:]
    padded = functional.pad(x, (left, left, top, top)) if top or left else x
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(padded.shape[2:], (down, right), (rows, columns), steps, strict=True)
    ]
    out = x.new_empty(x.shape[1], rows, columns, len(x), *sizes)
    for i in range(rows):
        for j in range(columns):
            high, wide = (
                slice(at, at + s * (n - 1) + 1, s)
                for at, s, n in zip((i * down, j * right), steps, sizes, strict=True)
            )
            out[:, i, j] = padded[:, :, high, wide].transpose(0, 1)
    return out.flatten(4).flatten(0, 2).permute(1, 0, 2)


@site(*_CONV)
def conv_sites(op: ContractionOp) -> list[Site]:
    """Weight (out, in / groups, *kernel)."""
    name, biases = op.parameter(op.arg("weight")), op.biases(op.arg("bias"))
    if name is None or biases is None:
        return []
    weight = op.dims("weight")
    family = Patches(len(weight) - 2, transposed=False)
    return [Site(op.node, (name,), biases, (tuple(weight[1:]),), weight[0], family)]


@site(*_TRANSPOSED)
def conv_transpose_sites(op: ContractionOp) -> list[Site]:
    """Weight (in, out, *kernel); with groups, columns would be a part of the first dimension."""
    name, biases = op.parameter(op.arg("weight")), op.biases(op.arg("bias"))
    if name is None or biases is None or op.arg("groups") != 1:
        return []
    weight = op.dims("weight")
    family = Patches(len(weight) - 2, transposed=True)
    return [Site(op.node, (name,), biases, ((weight[0], *weight[2:]),), weight[1], family)]
