"""Joining and cutting: cat, stack, split, slices, padding, rolling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from depcut import axes
from depcut.axes import Term
from depcut.ops.registry import Op, Output, aten, dim_of, dims_of, rule
from depcut.ops.taint import TaintedOp, moved, taints


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(op: Op) -> Output:
    """Lay tensors end to end along one dimension."""
    shapes = [op.dims(n) for n in op.arg("tensors")]
    shapes = [s for s in shapes if len(s) != 1 or s[0].size] or shapes[:1]
    dim = dim_of(op.arg("dim"), len(shapes[0]))
    out: list[Term] = []
    for i in range(len(shapes[0])):
        if i == dim:
            out.append(axes.concat(*(s[i] for s in shapes)))
            continue
        for other in shapes[1:]:
            op.unify(shapes[0][i], other[i])
        out.append(axes.resolve(shapes[0][i]))
    return tuple(out)


@rule("aten.hstack", "aten.vstack", "aten.row_stack")
def stacked_rows(op: Op) -> Output:
    """Concatenation along the first or second dimension; vectors count as rows of vstack."""
    shapes = [op.dims(n) for n in op.arg("tensors")]
    if op.name != "hstack":
        shapes = [s if len(s) > 1 else (axes.UNIT, *s) for s in shapes]
    dim = 1 if op.name == "hstack" and len(shapes[0]) > 1 else 0
    for shape in shapes[1:]:
        for i, (a, b) in enumerate(zip(shapes[0], shape, strict=True)):
            if i != dim:
                op.unify(a, b)
    joined = axes.concat(*(s[dim] for s in shapes))
    return (*shapes[0][:dim], joined, *shapes[0][dim + 1 :])


@rule("aten.stack")
def stack(op: Op) -> Output:
    """Lay tensors along a new dimension."""
    nodes = op.arg("tensors")
    x = op.dims(nodes[0])
    for node in nodes[1:]:
        for a, b in zip(x, op.dims(node), strict=True):
            op.unify(a, b)
    dim = dim_of(op.arg("dim"), len(x) + 1)
    return (*x[:dim], op.frozen(len(nodes), "tensors stacked one by one"), *x[dim:])


@rule("aten.unbind")
def unbind(op: Op) -> Output:
    """One tensor an index: the dimension must stay."""
    x = op.dims("self")
    dim = dim_of(op.arg("dim"), len(x))
    op.freeze(x[dim], "unbound into one tensor an index")
    return [(*x[:dim], *x[dim + 1 :])] * x[dim].size


def _split(op: Op, dim: int, sizes: list[int]) -> list[Term]:
    return axes.pieces(op.dims("self")[dim], sizes)


def _outputs(op: Op, dim: int, parts: Sequence[Term]) -> Output:
    x = op.dims("self")
    return [(*x[:dim], part, *x[dim + 1 :]) for part in parts]


@rule("aten.split.Tensor", "aten.chunk", "aten.unsafe_split.Tensor", "aten.unsafe_chunk")
def split(op: Op) -> Output:
    """Pieces of one size: they must keep equally many indices, as the code cuts evenly."""
    dim = dim_of(op.arg("dim"), len(op.dims("self")))
    sizes = [s[dim] for s in op.sizes[op.node]]
    parts = _split(op, dim, sizes)
    if len(set(sizes)) > 1:
        for part in parts:
            op.freeze(part, "cut into pieces of unequal sizes by one number")
    op.tie(parts)
    if op.has("split_size"):
        op.literal("split_size", term=parts[0])
    return _outputs(op, dim, parts)


@rule("aten.split_with_sizes", "aten.split.sizes", "aten.unsafe_split_with_sizes")
def split_with_sizes(op: Op) -> Output:
    """Pieces of given sizes."""
    dim = dim_of(op.arg("dim"), len(op.dims("self")))
    parts = _split(op, dim, [s[dim] for s in op.sizes[op.node]])
    op.literals("split_sizes" if op.has("split_sizes") else "split_size", parts)
    return _outputs(op, dim, parts)


@rule("aten.tensor_split.sections")
def tensor_split(op: Op) -> Output:
    """Nearly equal pieces."""
    dim = dim_of(op.arg("dim"), len(op.dims("self")))
    sizes = [s[dim] for s in op.sizes[op.node]]
    parts = _split(op, dim, sizes)
    if len(set(sizes)) > 1:
        for part in parts:
            op.freeze(part, "cut into pieces of unequal sizes by one number")
    op.tie(parts)
    return _outputs(op, dim, parts)


@rule("aten.tensor_split.indices")
def tensor_split_at(op: Op) -> Output:
    """Pieces between given positions."""
    x = op.dims("self")
    dim = dim_of(op.arg("dim"), len(x))
    parts = _split(op, dim, [s[dim] for s in op.sizes[op.node]])
    for i in range(len(op.arg("indices"))):
        op.literal("indices", i, term=axes.concat(*parts[: i + 1]))
    return _outputs(op, dim, parts)


def _bound(op: Op, name: str, term: Term, at: int) -> None:
    """Record a cut position: counted from the front, or from the back where it is negative."""
    value = op.arg(name)
    if isinstance(value, int) and value != 0 and abs(value) <= term.size:
        head, tail = axes.pieces(term, [at, term.size - at])
        if value < 0:
            op.literal(name, term=tail, sign=-1)
        elif value < term.size:
            op.literal(name, term=head)


@rule("aten.slice", "aten.narrow", "aten.slice_scatter")
def slice_(op: Op) -> Output:
    """A range of one dimension."""
    x = list(op.dims(op.node.args[0]))
    dim = dim_of(op.arg("dim"), len(x))
    term, scatter = x[dim], op.name == "slice_scatter"
    size = op.dims("src")[dim].size if scatter else op.out_sizes[dim]
    start = op.arg("start")
    end = op.arg("end") if op.has("end") else None
    step = op.arg("step") if op.has("step") else 1
    if size == term.size:
        part = term
    elif step != 1 or isinstance(start, fx.Node) or isinstance(end, fx.Node):
        part = _stepped(op, term, start, size, step)
    else:
        first = min(max(start + term.size if (start or 0) < 0 else start or 0, 0), term.size)
        part = axes.pieces(term, [first, size, term.size - first - size])[1]
        _bound(op, "start", term, first)
        if op.has("end") and end is not None:
            _bound(op, "end", term, first + size)
        elif op.has("length"):
            op.literal("length", term=part)
    if scatter:
        op.broadcast((*x[:dim], axes.resolve(part), *x[dim + 1 :]), op.dims("src"))
        return tuple(map(axes.resolve, x))
    x[dim] = axes.resolve(part)
    return tuple(x)


def _stepped(op: Op, term: Term, start: object, size: int, step: object) -> Term:
    """Every step-th index: the step is an inner factor, of which one index is taken."""
    from_front = isinstance(start, int | None) and (start or 0) >= 0
    if isinstance(step, int) and from_front and term.size == size * step:
        outer = axes.axis(size)
        op.unify(term, axes.product(outer, op.frozen(step, "stepped over by a slice")))
        return axes.resolve(outer)
    op.freeze(term, "sliced at positions that do not follow its width")
    return op.frozen(size, "sliced at positions that do not follow its width")


@rule("aten.select", "aten.select_scatter")
def select(op: Op) -> Output:
    """One index of a dimension."""
    x, index = op.dims("self"), op.arg("index")
    dim = dim_of(op.arg("dim"), len(x))
    if index in (0, -1) and op.for_shape():
        pass  # either end is there at every width
    elif not isinstance(index, int):
        op.freeze(x[dim], "indexed by a value")
    else:
        at = index % x[dim].size
        axes.pieces(x[dim], [at, 1, x[dim].size - at - 1])
        _bound(op, "index", axes.resolve(x[dim]), at)
    rest = (*x[:dim], *x[dim + 1 :])
    if op.has("src"):
        op.broadcast(rest, op.dims("src"))
        return tuple(map(axes.resolve, x))
    return rest


@rule("aten.pad", "aten.constant_pad_nd")
def pad(op: Op) -> Output:
    """Constants before and after: each end is a free axis, which owns no parameter."""
    x, amounts = list(op.dims("self")), op.arg("pad")
    constant = not op.has("mode") or op.arg("mode") == "constant"
    for i in range(len(amounts) // 2):
        dim, (before, after) = len(x) - 1 - i, amounts[2 * i : 2 * i + 2]
        if before == 0 and after == 0:
            continue
        if not constant or isinstance(before, fx.Node) or before < 0 or after < 0:
            op.freeze(x[dim], "padded by position")
            x[dim] = op.frozen(op.out_sizes[dim], "padded by position")
            continue
        ends = axes.axis(before) if before else None, axes.axis(after) if after else None
        for j, end in enumerate(ends):
            if end is not None:
                op.literal("pad", 2 * i + j, term=end)
        x[dim] = axes.concat(*(t for t in (ends[0], x[dim], ends[1]) if t is not None))
    return tuple(x)


@rule("aten.roll")
def roll(op: Op) -> Output:
    """Rotate a dimension: the ends change places."""
    x = list(op.dims("self"))
    shifts, dims = op.arg("shifts"), op.arg("dims")
    if not dims or any(not isinstance(s, int) for s in shifts):
        for term in x:
            op.freeze(term, "rolled")
        return tuple(x)
    for i, (shift, dim) in enumerate(zip(shifts, dims_of(dims, len(x)), strict=True)):
        term = x[dim]
        if axes.is_frozen(term) or shift == 0:
            continue
        if shift % term.size == 0:
            op.literal("shifts", i, term=term, sign=shift // term.size)
            continue
        at = -shift % term.size
        head, tail = axes.pieces(term, [at, term.size - at])
        negative = shift < 0
        op.literal("shifts", i, term=head if negative else tail, sign=-1 if negative else 1)
        x[dim] = axes.concat(tail, head)
    return tuple(x)


taints(
    *aten(
        """cat concat concatenate hstack vstack row_stack stack unbind split chunk unsafe_split
        unsafe_chunk split_with_sizes unsafe_split_with_sizes tensor_split slice narrow select
        slice_scatter select_scatter roll"""
    )
)(moved)


@taints("aten.pad", "aten.constant_pad_nd")
def padded(op: TaintedOp) -> Any:
    """Elements move; what is put around them is a constant."""
    return op.run(op.taint, {"value": 0})
