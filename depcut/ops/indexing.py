"""Look-ups and constants: what is indexed by value keeps its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from depcut import axes
from depcut.axes import Term
from depcut.graph.operators import base_name
from depcut.ops.registry import Op, Output, aten, dim_of, rule
from depcut.ops.taint import ALL, NOTHING, TaintedOp, tainted, taints


@rule("aten.embedding")
def embedding(op: Op) -> Output:
    """Rows of a table by number."""
    weight = op.dims("weight")
    op.freeze(weight[0], "vocabulary: rows are looked up by number")
    return (*op.dims("indices"), weight[1])


@rule("aten.one_hot")
def one_hot(op: Op) -> Output:
    """Numbers to indicator vectors."""
    return (*op.dims("self"), op.frozen(op.out_sizes[-1], "classes of a one-hot vector"))


@rule("aten.index", "aten._unsafe_index")
def index(op: Op) -> Output:
    """Advanced indexing with tensors; None stands for a whole dimension."""
    x, where = op.dims("self"), op.arg("indices")
    used = [i for i, node in enumerate(where) if node is not None]
    masks = any(_is_mask(where[i]) for i in used)
    if masks:
        for term in x:
            op.freeze(term, "indexed by a mask")
        return tuple(op.frozen(n, "indexed by a mask") for n in op.out_sizes)
    for i in used:
        op.freeze(x[i], "looked up by number")
    looked_up = op.broadcast(*(op.dims(where[i]) for i in used))
    rest = [t for i, t in enumerate(x) if i not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    return (*rest[:at], *looked_up, *rest[at:])


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put")
def index_put(op: Op) -> Output:
    """Write values at looked-up positions."""
    x, where = op.dims("self"), op.arg("indices")
    used = [i for i, node in enumerate(where) if node is not None]
    masks = any(_is_mask(where[i]) for i in used)
    for i, term in enumerate(x):
        if i in used or masks:
            op.freeze(term, "written by number")
    values = op.dims("values")
    if masks:
        for term in values:
            op.freeze(term, "written by number")
        return x
    rest = [t for i, t in enumerate(x) if i not in used]
    looked_up = op.broadcast(*(op.dims(where[i]) for i in used)) if used else ()
    for term in looked_up:
        op.freeze(term, "written by number")
    adjacent = bool(used) and used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    op.broadcast((*rest[:at], *looked_up, *rest[at:]), values)
    return tuple(map(axes.resolve, x))


@rule("aten.index_select")
def index_select(op: Op) -> Output:
    """Rows by number along one dimension."""
    x = list(op.dims("self"))
    dim = dim_of(op.arg("dim"), len(x))
    op.freeze(x[dim], "looked up by number")
    x[dim] = op.frozen(op.out_sizes[dim], "looked up by number")
    return tuple(x)


@rule("aten.gather", "aten.take_along_dim")
def gather(op: Op) -> Output:
    """Values by number along one dimension; the other dimensions go with the index's."""
    x = op.dims("self")
    where = op.dims("index" if op.has("index") else "indices")
    if op.arg("dim") is None:
        for term in x:
            op.freeze(term, "looked up by number")
        return where
    dim = dim_of(op.arg("dim"), len(x))
    out = []
    for i, (a, b) in enumerate(zip(x, where, strict=True)):
        if i == dim:
            op.freeze(a, "looked up by number")
            op.freeze(b, "number of look-ups")
        elif a.size == b.size:
            op.unify(a, b)
        else:
            op.freeze(a, "looked up by number")
            op.freeze(b, "looked up by number")
        out.append(axes.resolve(b if b.size >= a.size or i == dim or op.has("index") else a))
    return tuple(out)


@rule(
    *"""aten.scatter aten.scatter_ aten.scatter_add aten.scatter_add_ aten.scatter_reduce
    aten.scatter_reduce_ aten.index_add aten.index_add_ aten.index_copy aten.index_copy_
    aten.index_fill aten.index_fill_ aten.index_reduce""".split()
)
def scatter(op: Op) -> Output:
    """Writes by number along one dimension; the other dimensions go together."""
    x = op.dims("self")
    dim = dim_of(op.arg("dim"), len(x))
    op.freeze(x[dim], "written by number")
    for node in op.tensors()[1:]:
        other = op.dims(node)
        if len(other) != len(x):
            continue
        for i, (a, b) in enumerate(zip(x, other, strict=True)):
            if i == dim or a.size != b.size:
                op.freeze(b, "written by number")
                op.freeze(a, "written by number")
            else:
                op.unify(a, b)
    return tuple(map(axes.resolve, x))


@rule(
    *"""aten.zeros aten.ones aten.full aten.empty aten.rand aten.randn aten.new_zeros aten.new_ones
    aten.new_full aten.new_empty aten.normal.float_float""".split()
)
def constant(op: Op) -> Output:
    """The same value (or noise) everywhere: its dimensions are free axes, without a parameter."""
    out: list[Term] = [axes.axis(n) for n in op.out_sizes]
    op.literals("size", out)
    return tuple(out)


@rule(
    *"""aten.arange aten.linspace aten.logspace aten.eye aten.tril_indices aten.triu_indices
    aten.randperm aten.scalar_tensor aten.hann_window aten.hamming_window aten.randint""".split()
)
def positions(op: Op) -> Output:
    """Values that depend on the position: every position stays."""
    return tuple(op.frozen(n, "its values depend on the position") for n in op.out_sizes)


@rule("aten.meshgrid")
def meshgrid(op: Op) -> Output:
    """Coordinates: every position stays."""
    for node in op.arg("tensors"):
        for term in op.dims(node):
            op.freeze(term, "coordinates of a grid")
    sizes = op.sizes[op.node]
    return [tuple(op.frozen(n, "coordinates of a grid") for n in s) for s in sizes]


@taints(*aten("index _unsafe_index index_select gather take_along_dim embedding"))
def looked_up(op: TaintedOp) -> Any:
    """Elements move to known places; by unknown numbers one gets a constant only if all are."""
    source = op.node.args[0]
    if any(tainted(op.taint(n)) for n in op.inputs if n is not source):
        if base_name(op.node) != "embedding":
            return None
        table = op.value(source)
        column = op.taint(source).amax(0).maximum((table != table[0]).any(0).float())
        shape = op.value(op.arg("indices")).shape
        return column.expand(*shape, len(column)).clone()
    return op.run(lambda n: op.taint(n) if n is source else op.values[n])


@taints(*aten("new_full full_like fill"))
def filled(op: TaintedOp) -> Any:
    """Taint of the value that fills the tensor; what it replaces is dropped."""
    value = op.arg("value") if op.arg("value") is not None else op.arg("fill_value")
    return None if tainted(op.taint(value)) else NOTHING


@taints(*aten("zero_ zeros ones zeros_like ones_like new_zeros new_ones"))
def constant_taint(_: TaintedOp) -> Any:
    """The same number everywhere, however many there are."""
    return NOTHING


@taints(*aten("empty empty_like new_empty empty_strided"))
def uninitialised(_: TaintedOp) -> Any:
    """Tainted throughout: the values are whatever the memory holds."""
    return ALL
