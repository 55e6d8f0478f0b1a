"""Convolutions: channels contract, groups are an outer factor, what a kernel slides over stays."""

from __future__ import annotations

from depcut import axes
from depcut.axes import Dims, Term
from depcut.ops.registry import Op, Output, rule


def _spatial(op: Op, x: Dims, pointwise: bool) -> Dims:
    """Sliding windows fix every index; a kernel of one tap lets each pass."""
    sizes = op.out_sizes[len(op.out_sizes) - len(x) :] if x else ()
    if pointwise and all(t.size == n for t, n in zip(x, sizes, strict=True)):
        return x
    for term in x:
        op.freeze(term, "a kernel slides over it")
    return tuple(op.frozen(n, "spatial: positions of a sliding kernel") for n in sizes)


def _grouped(op: Op, groups: int) -> Term:
    """The group axis, whose count is the operator's `groups` argument."""
    return axes.axis(groups)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
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
    result = (*batch, weight[0], *_spatial(op, spatial, taps))
    op.macs(*result, *weight[1:])
    return result


def _is_plain(op: Op) -> bool:
    """No stride and no padding: positions map one to one."""
    stride, padding = op.arg("stride"), op.arg("padding")
    stride = [stride] if isinstance(stride, int) else stride
    return all(s == 1 for s in stride) and (
        isinstance(padding, str) or not any([padding] if isinstance(padding, int) else padding)
    )


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
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
    return (*batch, axes.resolve(out), *_spatial(op, spatial, False))


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
    name = str(op.node.target)
    rank = next(r for key, r in _SPATIAL_RANK.items() if key in name)
    x = op.dims(op.node.args[0])
    sizes = op.sizes[op.node]
    kept, spatial = x[:-rank], x[-rank:]
    for other in op.tensors()[1:]:
        # Indices of an unpooling, random samples of a fractional pooling: the same channels.
        op.broadcast(kept, op.dims(other)[: len(kept)])
    out = (*kept, *_spatial(op, spatial, False))
    return [out] * len(sizes) if isinstance(sizes[0], tuple) else out


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def grid_sample(op: Op) -> Output:
    """Samples positions; batch and channels pass."""
    x, grid = op.dims("input"), op.dims("grid")
    for term in (*x[2:], *grid[1:]):
        op.freeze(term, "sampled by position")
    op.broadcast(x[:1], grid[:1])
    return (*x[:2], *_spatial(op, x[2:], False))
