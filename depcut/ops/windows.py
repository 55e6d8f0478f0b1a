"""What slides over positions, or resamples them: pooling, interpolation, unfolding."""

from __future__ import annotations

from typing import Any

import torch

from depcut import axes
from depcut.axes import Dims
from depcut.graph.operators import base_name
from depcut.ops.registry import Op, Output, aten, rule
from depcut.ops.taint import TaintedOp, moved, taints


def slid_over(op: Op, x: Dims, pointwise: bool) -> Dims:
    """Output terms of the positions that windows slide over, which must all stay.

    Args:
        op: The operator.
        x: Terms of the positions.
        pointwise: Whether windows have one tap, so that each index passes.
    """
    sizes = op.out_sizes[len(op.out_sizes) - len(x) :] if x else ()
    if pointwise and all(t.size == n for t, n in zip(x, sizes, strict=True)):
        return x
    for term in x:
        op.freeze(term, "a kernel slides over it")
    return tuple(op.frozen(n, "spatial: positions of a sliding kernel") for n in sizes)


def is_padded(op: TaintedOp) -> bool:
    """Whether a window operator reads zeros beyond the border, so that constants differ there."""
    padding = op.arg("padding")
    if isinstance(padding, str):
        taps = op.value(op.arg("weight")).shape[2:]
        return padding == "same" and any(n > 1 for n in taps)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


_POOLS = """
aten.max_pool1d aten.max_pool2d aten.max_pool3d aten.avg_pool1d aten.avg_pool2d aten.avg_pool3d
aten.adaptive_avg_pool1d aten.adaptive_avg_pool2d aten.adaptive_avg_pool3d
aten.adaptive_max_pool1d aten.adaptive_max_pool2d aten.adaptive_max_pool3d
aten.max_pool2d_with_indices aten.max_pool1d_with_indices aten.max_pool3d_with_indices
aten.upsample_nearest1d aten.upsample_nearest2d aten.upsample_nearest3d
aten._upsample_nearest_exact1d aten._upsample_nearest_exact2d
aten.upsample_bilinear2d aten.upsample_bicubic2d aten.upsample_linear1d aten.upsample_trilinear3d
aten._upsample_bilinear2d_aa aten._upsample_bicubic2d_aa
aten.reflection_pad1d aten.reflection_pad2d aten.reflection_pad3d
aten.replication_pad1d aten.replication_pad2d aten.replication_pad3d
aten.fractional_max_pool2d aten.max_unpool2d
""".split()

_SPATIAL_RANK = {"1d": 1, "2d": 2, "3d": 3}


@rule(*_POOLS)
def pool(op: Op) -> Output:
    """Pooling and resampling: the trailing dimensions are positions, the others pass."""
    rank = next(r for key, r in _SPATIAL_RANK.items() if key in op.name)
    x = op.dims(op.node.args[0])
    sizes = op.sizes[op.node]
    kept, spatial = x[:-rank], x[-rank:]
    for other in op.tensors()[1:]:
        # Indices of an unpooling, random samples of a fractional pooling: the same channels.
        op.broadcast(kept, op.dims(other)[: len(kept)])
    out = (*kept, *slid_over(op, spatial, False))
    return [out] * len(sizes) if isinstance(sizes[0], tuple) else out


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(op: Op) -> Output:
    """Samples positions; batch and channels pass."""
    x, grid = op.dims("input"), op.dims("grid")
    for term in (*x[2:], *grid[1:]):
        op.freeze(term, "sampled by position")
    op.broadcast(x[:1], grid[:1])
    return (*x[:2], *slid_over(op, x[2:], False))


@rule("aten.im2col")
def im2col(op: Op) -> Output:
    """(..., C, H, W) to (..., C x taps, positions)."""
    *batch, channels, height, width = op.dims("self")
    for term in (height, width):
        op.freeze(term, "a kernel slides over it")
    taps = op.frozen(op.out_sizes[-2] // channels.size, "kernel: taps of an unfold")
    return (*batch, axes.product(channels, taps), op.frozen(op.out_sizes[-1], "spatial: positions"))


@rule("aten.col2im")
def col2im(op: Op) -> Output:
    """(..., C x taps, positions) to (..., C, H, W)."""
    *batch, columns, positions = op.dims("self")
    channels = axes.axis(op.out_sizes[-3])
    taps = op.frozen(columns.size // channels.size, "kernel: taps of a fold")
    op.unify(columns, axes.product(channels, taps))
    op.freeze(positions, "spatial: positions")
    spatial = (op.frozen(n, "spatial: positions") for n in op.out_sizes[-2:])
    return (*batch, axes.resolve(channels), *spatial)


taints(
    *aten(
        """upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        """
    )
)(moved)


@taints(
    *aten(
        """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d im2col
        col2im"""
    )
)
def window(op: TaintedOp) -> Any:
    """Averages over a window; where zeros pad the border, a constant other than 0 is tainted."""
    bare = is_padded(op) or base_name(op.node) == "col2im"
    return op.run(op.nonzero if bare else op.taint)


@taints(
    *aten(
        """max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d"""
    )
)
def extremum(op: TaintedOp) -> Any:
    """Maximum over a window; padding is never the maximum."""
    return op.run(op.taint)


@taints(*aten("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"))
def extremum_with_position(op: TaintedOp) -> Any:
    """Maximum over a window, and its position, which is tainted throughout."""
    largest, positions = op.run(op.taint)
    return [largest, torch.ones_like(positions, dtype=torch.float32)]
