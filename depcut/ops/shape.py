"""Views: dimensions are regrouped, reordered, added, dropped or repeated."""

from __future__ import annotations

from collections.abc import Sequence

from depcut import axes
from depcut.axes import Term
from depcut.ops.registry import Op, Output, aten, dim_of, dims_of, rule
from depcut.ops.taint import moved, taints


def _regroup(op: Op, terms: Sequence[Term], sizes: Sequence[int]) -> list[Term]:
    return axes.regroup(list(terms), list(sizes), op.node.name)


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def view(op: Op) -> Output:
    """Row-major reshape to the sizes given."""
    out = _regroup(op, op.dims(op.node.args[0]), op.out_sizes)
    op.literals("shape" if op.has("shape") else "size", out)
    return tuple(out)


@rule("aten.view_as", "aten.reshape_as")
def view_as(op: Op) -> Output:
    """Row-major reshape to the sizes of another tensor, whose dimensions must shrink alike."""
    out = _regroup(op, op.dims("self"), op.out_sizes)
    return op.broadcast(tuple(out), op.dims("other"))


@rule("aten.flatten", "aten.ravel")
def flatten(op: Op) -> Output:
    """Merge the dimensions from start to end."""
    x = op.dims("self")
    if not x:
        return (axes.UNIT,)
    start = dim_of(op.arg("start_dim"), len(x)) if op.has("start_dim") else 0
    end = dim_of(op.arg("end_dim"), len(x)) if op.has("end_dim") else len(x) - 1
    return (*x[:start], axes.product(*x[start : end + 1]), *x[end + 1 :])


@rule("aten.unflatten")
def unflatten(op: Op) -> Output:
    """Cut one dimension into several."""
    x = op.dims("self")
    dim, count = dim_of(op.arg("dim"), len(x)), len(op.arg("sizes"))
    out = _regroup(op, x[dim : dim + 1], op.out_sizes[dim : dim + count])
    op.literals("sizes", out)
    return (*x[:dim], *out, *x[dim + 1 :])


@rule("aten.permute")
def permute(op: Op) -> Output:
    """Reorder dimensions."""
    x = op.dims("self")
    return tuple(x[d] for d in op.arg("dims"))


@rule("aten.transpose", "aten.transpose_", "aten.swapaxes", "aten.swapdims")
def transpose(op: Op) -> Output:
    """Swap two dimensions."""
    first, second = op.node.args[1:3]
    x = list(op.dims(op.node.args[0]))
    i, j = dim_of(first, len(x)), dim_of(second, len(x))  # type: ignore[arg-type]
    x[i], x[j] = x[j], x[i]
    return tuple(x)


@rule("aten.t", "aten.t_", "aten.mT", "aten.mH", "aten.numpy_T", "aten.adjoint", "aten.matrix_H")
def transposed(op: Op) -> Output:
    """Swap the last two dimensions, or reverse all."""
    x = op.dims(op.node.args[0])
    if op.name == "numpy_T" or len(x) < 2:
        return tuple(reversed(x))
    return (*x[:-2], x[-1], x[-2])


@rule("aten.movedim", "aten.moveaxis")
def movedim(op: Op) -> Output:
    """Move dimensions to other places, the rest keeping their order."""
    x = op.dims("self")
    source = dims_of(op.arg("source"), len(x))
    target = dims_of(op.arg("destination"), len(x))
    rest = iter([t for i, t in enumerate(x) if i not in source])
    moved = dict(zip(target, source, strict=True))
    return tuple(x[moved[i]] if i in moved else next(rest) for i in range(len(x)))


@rule("aten.squeeze", "aten.squeeze_")
def squeeze(op: Op) -> Output:
    """Drop dimensions of size 1."""
    x = op.dims("self")
    dims = dims_of(op.arg("dim"), len(x)) if op.has("dim") else list(range(len(x)))
    for i in dims:
        if x[i].size > 1:
            op.at_least(2, x[i])  # one index alone would be squeezed away
    return tuple(t for i, t in enumerate(x) if i not in dims or t.size != 1)


@rule("aten.unsqueeze", "aten.unsqueeze_")
def unsqueeze(op: Op) -> Output:
    """Add a dimension of size 1."""
    x = op.dims("self")
    dim = dim_of(op.arg("dim"), len(x) + 1)
    return (*x[:dim], axes.UNIT, *x[dim:])


@rule("aten.expand", "aten.expand_copy", "aten.broadcast_to")
def expand(op: Op) -> Output:
    """Repeat dimensions of size 1 without copying: the new ones are free axes."""
    x, sizes = op.dims("self"), op.out_sizes
    x = (axes.UNIT,) * (len(sizes) - len(x)) + x
    out = [t if t.size == n else axes.axis(n) for t, n in zip(x, sizes, strict=True)]
    op.literals("size", out)
    return tuple(out)


@rule("aten.expand_as")
def expand_as(op: Op) -> Output:
    """Repeat dimensions of size 1 to those of another tensor."""
    return op.broadcast(op.dims("self"), op.dims("other"))


@rule("aten.broadcast_tensors")
def broadcast_tensors(op: Op) -> Output:
    """All tensors expanded to their common shape."""
    nodes = op.arg("tensors")
    return [op.broadcast(*(op.dims(n) for n in nodes))] * len(nodes)


@rule("aten.repeat", "aten.tile")
def repeat(op: Op) -> Output:
    """Lay copies end to end: the number of copies is an outer factor."""
    x = op.dims("self")
    name = "repeats" if op.has("repeats") else "dims"
    times = op.arg(name)
    x = (axes.UNIT,) * (len(times) - len(x)) + x
    skipped = len(x) - len(times)
    out = list(x)
    for i, size in enumerate(op.out_sizes):
        if i >= skipped and x[i].size:
            copies = axes.axis(size // x[i].size)
            out[i] = axes.product(copies, x[i])
            op.literal(name, i - skipped, term=copies)
    return tuple(out)


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(op: Op) -> Output:
    """Repeat each index: the number of copies is an inner factor."""
    x, dim = list(op.dims("self")), op.arg("dim")
    if dim is None:
        x, dim = [axes.product(*x)], 0
    dim = dim_of(dim, len(x))
    copies = axes.axis(op.out_sizes[dim] // x[dim].size)
    x[dim] = axes.product(x[dim], copies)
    op.literal("repeats", term=copies)
    return tuple(x)


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(op: Op) -> Output:
    """Move blocks of r x r between positions and channels: the blocks are an inner factor."""
    x = op.dims("self")
    *batch, channels, height, width = x
    if op.has("upscale_factor"):
        square = int(op.arg("upscale_factor")) ** 2
        kept = axes.axis(channels.size // square)
        block = op.frozen(square, "pixel shuffle moves it into positions")
        op.unify(channels, axes.product(kept, block))
        out = kept
    else:
        square = int(op.arg("downscale_factor")) ** 2
        block = op.frozen(square, "pixel unshuffle moves it from positions")
        out = axes.product(channels, block)
    for term in (height, width):
        op.freeze(term, "spatial: positions")
    sizes = op.out_sizes[-2:]
    return (*batch, axes.resolve(out), *(op.frozen(n, "spatial: positions") for n in sizes))


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(op: Op) -> Output:
    """(groups, c) channels become (c, groups)."""
    x = list(op.dims("self"))
    groups = op.frozen(op.arg("groups"), "groups of a channel shuffle")
    inner = axes.axis(x[1].size // groups.size)
    op.unify(x[1], axes.product(groups, inner))
    x[1] = axes.product(axes.resolve(inner), axes.resolve(groups))
    return tuple(x)


@rule("aten.unfold")
def unfold(op: Op) -> Output:
    """Sliding windows over one dimension, their content in a new last one."""
    x = list(op.dims("self"))
    dim = dim_of(op.arg("dimension"), len(x))
    op.freeze(x[dim], "a window slides over it")
    x[dim] = op.frozen(op.out_sizes[dim], "windows of an unfold")
    return (*x, op.frozen(op.out_sizes[-1], "content of a window"))


taints(
    "aten.view.default",
    *aten(
        """reshape _unsafe_view view_as reshape_as flatten ravel unflatten permute transpose
        swapaxes swapdims t mT mH numpy_T adjoint matrix_H movedim moveaxis squeeze unsqueeze
        expand expand_copy expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal"""
    ),
)(moved)
