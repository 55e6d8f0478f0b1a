"""Reductions: the reduced dimensions go, the others pass."""

from __future__ import annotations

from typing import Any

from depcut import axes
from depcut.axes import Term
from depcut.graph.operators import base_name
from depcut.ops.kinds import SOFTMAXES
from depcut.ops.registry import Op, Output, aten, dim_of, dims_of, rule
from depcut.ops.taint import TaintedOp, moved, taints

_SOFTMAXES = aten("softmax log_softmax _softmax _log_softmax")

SOFTMAXES.add(*_SOFTMAXES)


def _reduce(op: Op) -> tuple[list[int], Output]:
    """The dimensions reduced, and the output terms."""
    source = op.node.args[0]
    x = op.dims(source)
    reduced = dims_of(op.arg("dim") if op.has("dim") else None, len(x))
    keep = bool(op.has("keepdim") and op.arg("keepdim"))
    out: list[Term] = []
    for i, term in enumerate(x):
        if i not in reduced:
            out.append(term)
        elif keep:
            out.append(axes.UNIT)
    sizes = op.sizes[op.node]
    if sizes and isinstance(sizes[0], tuple):
        return reduced, [tuple(out)] * len(sizes)
    return reduced, tuple(out)


@rule("aten.sum", "aten.nansum", "aten.linalg_vector_norm", "aten.norm", "aten.count_nonzero")
def total(op: Op) -> Output:
    """Sums and vector norms: a removed index is as good as zero."""
    reduced, out = _reduce(op)
    order = next((op.arg(name) for name in ("ord", "p") if op.has(name)), None)
    for dim in reduced:
        if isinstance(order, int | float) and order < 0:
            op.statistic(op.dims(op.node.args[0])[dim])  # the smallest decides, not a zero
        else:
            op.contract(op.node.args[0], dim)  # type: ignore[arg-type]
    return out


@rule(
    *"""aten.mean aten.nanmean aten.var aten.std aten.var_mean aten.std_mean aten.amax aten.amin
    aten.max.dim aten.min.dim aten.max.default aten.min.default aten.logsumexp aten.median
    aten.any aten.all aten.aminmax aten.prod""".split()
)
def statistic(op: Op) -> Output:
    """Means, extrema and the like: their value depends on which indices there are."""
    reduced, out = _reduce(op)
    x = op.dims(op.node.args[0])
    returns_positions = isinstance(out, list)
    for dim in reduced:
        if returns_positions and op.name not in ("var_mean", "std_mean"):
            op.freeze(x[dim], "its positions are returned by an extremum")
        else:
            op.statistic(x[dim])
    return out


@taints(
    *aten(
        """sum nansum mean nanmean var std amax amin logsumexp prod any all linalg_vector_norm
        norm count_nonzero"""
    )
)
def reduction_taint(op: TaintedOp) -> Any:
    """Tainted where anything reduced is."""
    taint = op.taint(op.node.args[0])
    dims = dims_of(op.arg("dim"), taint.ndim)
    return taint.amax(dims, keepdim=bool(op.arg("keepdim"))) if dims else taint


@rule("aten.argmax", "aten.argmin")
def position(op: Op) -> Output:
    """The position of an extremum: the positions must stay what they are."""
    reduced, out = _reduce(op)
    for dim in reduced:
        op.freeze(op.dims("self")[dim], "positions along it are returned")
    return out


@rule(
    *"""aten.softmax aten.log_softmax aten._softmax aten._log_softmax aten.cumsum aten.cumsum_
    aten.cumprod aten.logcumsumexp aten.sort aten.argsort aten.flip aten.cummax aten.cummin
    aten.diff aten.fft_fft aten.fft_ifft aten.fft_rfft aten.fft_irfft aten.fft_hfft
    aten.fft_fft2 aten.fft_ifft2 aten.fft_rfft2 aten.fft_irfft2 aten.fft_fftn aten.fft_ifftn
    aten.fft_rfftn aten.fft_irfftn aten.fft_fftshift aten.fft_ifftshift""".split()
)
def along(op: Op) -> Output:
    """Operators along a dimension whose every value depends on all indices or on their order."""
    name = op.name.strip("_")
    source = op.node.args[0]
    x = list(op.dims(source))
    dims = op.arg("dims") if op.has("dims") else op.arg("dim")
    sizes = op.sizes[op.node]
    along_dims = [] if name == "flip" and not dims else dims_of(dims, len(x))
    for other in op.tensors()[1:]:
        # What diff prepends or appends: the other dimensions are those of the first argument.
        for i, (a, b) in enumerate(zip(x, op.dims(other), strict=False)):
            if i in along_dims:
                op.freeze(b, f"{name} runs along it")
            else:
                op.broadcast((a,), (b,))
    for dim in along_dims:
        op.freeze(x[dim], f"{name} runs along it")
        if op.out_sizes[dim] != x[dim].size:
            x[dim] = op.frozen(op.out_sizes[dim], f"{name} changes its length")
    x = [axes.resolve(t) for t in x]
    return [tuple(x)] * len(sizes) if isinstance(sizes[0], tuple) else tuple(x)


@taints(*_SOFTMAXES, *aten("cumsum sort argsort"))
def along_taint(op: TaintedOp) -> Any:
    """Every value depends on all along the dimension."""
    taint = op.taint(op.node.args[0])
    out = taint.amax(op.arg("dim"), keepdim=True).expand_as(taint)
    return [out, out] if base_name(op.node) == "sort" else out


taints("aten.flip", "aten.tril", "aten.triu")(moved)


@rule("aten.histc", "aten.bincount")
def histogram(op: Op) -> Output:
    """Counts of values."""
    for node in op.tensors():
        for term in op.dims(node):
            op.freeze(term, "counted by value")
    return tuple(op.frozen(n, "bins of a histogram") for n in op.out_sizes)


@rule("aten.topk", "aten.kthvalue", "aten.mode")
def topk(op: Op) -> Output:
    """Chooses positions along a dimension."""
    x = list(op.dims("self"))
    dim = dim_of(op.arg("dim"), len(x))
    op.freeze(x[dim], "positions along it are chosen by value")
    if len(op.out_sizes) < len(x):
        out = (*x[:dim], *x[dim + 1 :])
    else:
        out = (*x[:dim], op.frozen(op.out_sizes[dim], "chosen by value"), *x[dim + 1 :])
    return [out] * len(op.sizes[op.node])


@rule("aten.tril", "aten.triu", "aten.tril_", "aten.triu_")
def triangle(op: Op) -> Output:
    """Keeps a triangle of the last two dimensions."""
    x = op.dims("self")
    for term in x[-2:]:
        op.freeze(term, "a triangle of it is kept by position")
    return x


@rule("aten.cosine_similarity")
def cosine(op: Op) -> Output:
    """Normalised dot product along a dimension."""
    x = op.broadcast(op.dims("x1"), op.dims("x2"))
    dim = dim_of(op.arg("dim"), len(x))
    for name in ("x1", "x2"):
        operand = op.dims(name)
        if len(operand) < len(x) - dim or operand[dim - len(x)].size != x[dim].size:
            op.freeze(x[dim], "compared with a vector that is broadcast along it")
        else:
            op.contract(name, dim - len(x))
    return tuple(t for i, t in enumerate(x) if i != dim)
