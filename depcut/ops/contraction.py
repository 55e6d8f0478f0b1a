"""Matrix products: contracted dimensions unify, batch dimensions unify, the rest passes through."""

from __future__ import annotations

from torch import fx

from depcut import axes
from depcut.axes import Term
from depcut.ops.registry import Op, Output, rule


@rule("aten.linear")
def linear(op: Op) -> Output:
    """y = x W^T + b, W of shape (out, in)."""
    x, weight = op.dims("input"), op.dims("weight")
    op.unify(x[-1], weight[-1])
    op.contract("weight", len(weight) - 1, against=("input", -1))
    out = (*x[:-1], *weight[:-1])
    if op.arg("bias") is not None:
        op.unify(op.dims("bias")[0], weight[0])
    op.macs(*out, weight[-1])
    return out


def product_of(op: Op, a: fx.Node, b: fx.Node) -> tuple[Term, ...]:
    """torch.matmul of two nodes, with its rules for vectors and batches."""
    x, y = op.dims(a), op.dims(b)
    contracted = len(y) - 2 if len(y) > 1 else 0
    op.unify(x[-1], y[contracted])
    op.contract(b, contracted)
    op.contract(a, len(x) - 1)
    rows, columns = x[-2:-1], y[-1:] if len(y) > 1 else ()
    batch = op.broadcast(x[:-2], y[:-2])
    out = (*batch, *rows, *columns)
    op.macs(*out, x[-1])
    return out


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot")
def matmul(op: Op) -> Output:
    """Product of matrices, vectors or batches of matrices."""
    a, b = op.node.args[:2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return product_of(op, a, b)


@rule("aten.inner")
def inner(op: Op) -> Output:
    """Sums over the last dimension of both; the other dimensions of both remain."""
    x, y = op.dims("self"), op.dims("other")
    if not x or not y:
        return (*x, *y)
    op.unify(x[-1], y[-1])
    op.contract("other", -1)
    op.contract("self", -1)
    out = (*x[:-1], *y[:-1])
    op.macs(*out, x[-1])
    return out


@rule("aten.addmm", "aten.baddbmm", "aten.addmv", "aten.addmm_", "aten.baddbmm_")
def addmm(op: Op) -> Output:
    """bias + a @ b."""
    bias, a, b = op.node.args[:3]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    out = product_of(op, a, b)
    op.broadcast(out, op.dims(bias))
    return out


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(op: Op) -> Output:
    """Rows sorted by expert times that expert's matrix: (T, K) x (experts, K, N)."""
    rows, weights = op.node.args[:2]
    assert isinstance(weights, fx.Node)
    x, w = op.dims(rows), op.dims(weights)
    for node in op.node.all_input_nodes[2:]:
        for term in op.dims(node):
            op.freeze(term, "boundaries between experts")
    op.freeze(w[0], "experts: rows are routed to them by number")
    op.unify(x[-1], w[-2])
    op.contract(weights, -2)
    op.macs(*x, w[-1])
    return (*x[:-1], w[-1])


@rule("aten.outer", "aten.ger")
def outer(op: Op) -> Output:
    """Outer product of two vectors."""
    a, b = op.node.args[:2]
    return (*op.dims(a), *op.dims(b))


@rule("aten.bilinear")
def bilinear(op: Op) -> Output:
    """y_o = x1_i W_oij x2_j + b_o."""
    x, y, weight = op.dims("input1"), op.dims("input2"), op.dims("weight")
    op.unify(x[-1], weight[1])
    op.unify(y[-1], weight[2])
    op.contract("weight", 1)
    op.contract("weight", 2)
    out = (*op.broadcast(x[:-1], y[:-1]), weight[0])
    if op.arg("bias") is not None:
        op.unify(op.dims("bias")[0], weight[0])
    op.macs(*out, weight[1], weight[2])
    return out


@rule("aten.einsum")
def einsum(op: Op) -> Output:
    """Any product of tensors in Einstein's notation: equal letters unify."""
    equation = op.arg("equation").replace(" ", "")
    operands = list(op.arg("tensors"))
    inputs, arrow, output = equation.partition("->")
    shapes = [op.dims(n) for n in operands]
    labels = [labels_of(spec, len(s)) for spec, s in zip(inputs.split(","), shapes, strict=True)]
    if not arrow:
        flat = [c for spec in labels for c in spec]
        output = "".join(sorted(c for c in set(flat) if flat.count(c) == 1 and c.isalpha()))
        wanted = sorted({c for c in flat if not c.isalpha()}, reverse=True) + list(output)
    else:
        dots = max((sum(not c.isalpha() for c in spec) for spec in labels), default=0)
        wanted = labels_of(output, len(output.replace("...", "")) + dots)
    terms: dict[str, Term] = {}
    for spec, shape in zip(labels, shapes, strict=True):
        for label, term in zip(spec, shape, strict=True):
            if label not in terms or terms[label].size == 1:
                terms[label] = term
            elif term.size != 1:
                op.unify(terms[label], term)
    for node, spec in zip(operands, labels, strict=True):
        for i, label in enumerate(spec):
            if label not in wanted:
                op.contract(node, i)
    flat = [label for spec in labels for label in spec] + wanted
    # A label that no other operand and not the output has is summed beforehand.
    shared = [[label for label in spec if flat.count(label) > 1] for spec in labels]
    done = shared[0]
    for i, spec in enumerate(shared[1:], 1):
        # From left to right, two operands at a time; what nobody needs any more is summed.
        both = list(dict.fromkeys([*done, *spec]))
        op.macs(*(terms[label] for label in both))
        needed = {c for later in shared[i + 1 :] for c in later} | set(wanted)
        done = [label for label in both if label in needed]
    return tuple(axes.resolve(terms[label]) for label in wanted)


def labels_of(spec: str, ndim: int) -> list[str]:
    """The labels of an operand; the dimensions under "..." are numbered from the right."""
    left, dots, right = spec.partition("...")
    if not dots:
        return list(spec)
    hidden = ndim - len(left) - len(right)
    return [*left, *(str(i) for i in range(hidden - 1, -1, -1)), *right]
