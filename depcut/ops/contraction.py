"""Matrix products: contracted dimensions unify, batch dimensions unify, the rest passes through."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import fx

from depcut.axes import Term
from depcut.graph.arguments import Call, schema
from depcut.graph.operators import base_name
from depcut.ops.form import Form, form, leading
from depcut.ops.kinds import MATRIX_PRODUCTS, PRODUCTS
from depcut.ops.registry import Op, Output, aten, rule
from depcut.ops.site import ContractionOp, Site, site
from depcut.ops.taint import TaintedOp, multilinear, taints, varying

_MATMULS = aten("matmul mm bmm mv dot vdot")
_ADDED = aten("addmm baddbmm addmv")
# Rows of matrices begin at multiples of 16 bytes, in half precision as well, or the kernel raises
# (pytorch/aten/src/ATen/native/GroupedMMUtils.h).
_GROUPED_MULTIPLE = 8

MATRIX_PRODUCTS.add(*aten("matmul mm bmm baddbmm"))
PRODUCTS.add(*aten("matmul mm bmm mv dot inner bilinear outer"))


@dataclass(frozen=True)
class MatrixProduct:
    """x W^T, W a matrix that may be stored transposed.

    Attributes:
        source: Argument that holds the activations.
        features: Its contracted dimension, from the end.
        weight: Argument that holds the matrix.
        dim: Its contracted dimension.
    """

    source: str
    features: int
    weight: str
    dim: int

    @property
    def result(self) -> int:
        """Dimension of the result that W produces, from the end."""
        return self.features

    def inputs(self, call: Call) -> torch.Tensor:
        """(1, vectors, in): all leading dimensions flattened."""
        x: torch.Tensor = call[self.source]
        return x.movedim(self.features, -1).reshape(1, -1, x.shape[self.features])

    def reads(self, nodes: Call, call: Call) -> tuple[Hashable, ...] | None:  # noqa: ARG002  (of a family)
        """The activations and the dimension that is contracted."""
        return ("features", nodes[self.source], self.features)

    def matrix(self, call: Call) -> torch.Tensor:
        """(1, out, in): the parameter with its contracted dimension last."""
        weight: torch.Tensor = call[self.weight]
        return weight.movedim(self.dim, -1)[None]

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Write W of shape (1, out, in) into the parameter."""
        call[self.weight].movedim(self.dim, -1).copy_(matrix[0])


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


@taints("aten.linear")
def linear_taint(op: TaintedOp) -> Any:
    """y = x W^T + b."""
    out = multilinear(op, ("input", "weight"), added="bias")
    bias = op.taint(op.arg("bias"))
    return out if isinstance(bias, float) else torch.maximum(out, bias)


@form("aten.linear")
def linear_form(op: TaintedOp) -> Form | None:
    """Features of the input times rows of the weight."""
    x, w = op.arg("input"), op.arg("weight")
    if op.value(w).ndim != 2:
        return None
    return Form((x, w), ((*leading(op.value(x).ndim - 1), "i"), ("o", "i")), out="o")


@site("aten.linear")
def linear_sites(op: ContractionOp) -> list[Site]:
    """y = x W^T + b."""
    return matrix_sites(op, "input", -1, ("weight", 1), op.biases(op.arg("bias")))


def matrix_sites(
    op: ContractionOp,
    source: str,
    features: int,
    weight: tuple[str, int],
    biases: tuple[str, ...] | None,
) -> list[Site]:
    """The site of a matrix product with a parameter; none where the matrix is something else.

    Args:
        op: The product.
        source: Name of the argument that holds the activations.
        features: Its contracted dimension, from the end.
        weight: Name of the argument that holds the matrix, and its contracted dimension.
        biases: What is added; None: what is no parameter.
    """
    place = op.matrix(op.arg(weight[0]), weight[1])
    if place is None or biases is None or len(op.dims(source)) < 2:
        return []
    name, dim = place
    dims = op.stored[name]
    family = MatrixProduct(source, features, *weight)
    return [Site(op.node, (name,), biases, ((dims[dim],),), dims[1 - dim], family)]


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


@rule(*_MATMULS)
def matmul(op: Op) -> Output:
    """Product of matrices, vectors or batches of matrices."""
    a, b = op.node.args[:2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return product_of(op, a, b)


def sums_to_one(node: Any) -> bool:
    """Whether the last dimension of a node is the result of a softmax."""
    while isinstance(node, fx.Node):
        name = base_name(node)
        source: Any = node.args[0] if node.args else None
        if name in ("softmax", "_softmax"):
            dim = node.args[1]
            return bool(dim == -1 or dim == node.meta["val"].ndim - 1)
        if name in ("view", "reshape", "_unsafe_view", "expand"):
            if node.meta["val"].shape[-1] != source.meta["val"].shape[-1]:
                return False
        elif name not in ("to", "clone", "contiguous", "alias", "type_as") and not (
            name == "dropout" and node.args[-1] is False
        ):
            return False
        node = source
    return False


@taints(*_MATMULS)
def matmul_taint(op: TaintedOp) -> Any:
    """A sum of products; an average by a softmax adds no taint to rows that are all the same."""
    a, b = op.node.args[:2]
    names = list(schema(op.node.target))
    out = multilinear(op, names[:2])
    if sums_to_one(a) and op.value(b).ndim > 1:
        out = torch.minimum(out, varying(op, b))
    return out


@form(*_MATMULS)
def matmul_form(op: TaintedOp) -> Form | None:
    """Columns of the first times rows of the second."""
    first, second = op.node.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return _product_form(op, first, second)


def _product_form(op: TaintedOp, a: fx.Node, b: fx.Node, out: str = "") -> Form:
    ranks = op.value(a).ndim, op.value(b).ndim
    left = (*leading(ranks[0] - 2), *("m" * (ranks[0] > 1)), "k")
    right = (*leading(ranks[1] - 2), "k", *("n" * (ranks[1] > 1)))
    return Form((a, b), (left, right), out=out)


@site(*aten("matmul mm bmm"))
def matmul_sites(op: ContractionOp) -> list[Site]:
    """x @ W or W @ x."""
    left, right = list(schema(op.node.target))[:2]
    return matrix_sites(op, left, -1, (right, 0), ()) or matrix_sites(op, right, -2, (left, 1), ())


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


@taints("aten.inner")
def inner_taint(op: TaintedOp) -> Any:
    """A matrix product with the second operand transposed."""
    return multilinear(op, ("self", "other"))


@form("aten.inner")
def inner_form(op: TaintedOp) -> Form | None:
    """Rows of the first times rows of the second."""
    a, b = op.arg("self"), op.arg("other")
    if not op.value(a).ndim or not op.value(b).ndim:
        return None
    rows = ascii_lowercase[: op.value(b).ndim - 1]
    return Form((a, b), ((*leading(op.value(a).ndim - 1), "z"), (*rows, "z")))


@site("aten.inner")
def inner_sites(op: ContractionOp) -> list[Site]:
    """x W^T."""
    return matrix_sites(op, "self", -1, ("other", 1), ())


@rule(*_ADDED)
def addmm(op: Op) -> Output:
    """bias + a @ b."""
    bias, a, b = op.node.args[:3]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    out = product_of(op, a, b)
    op.broadcast(out, op.dims(bias))
    return out


@taints(*_ADDED)
def addmm_taint(op: TaintedOp) -> Any:
    """bias + a @ b."""
    bias, a, b = op.node.args[:3]
    first, second = op.taint(a), op.taint(b)
    total = first @ op.nonzero(b) + op.nonzero(a) @ second
    return torch.maximum((total > 0.5).float(), op.taint(bias))


@form(*_ADDED)
def addmm_form(op: TaintedOp) -> Form | None:
    """The product alone; a vector that is added to it has the columns of the second."""
    _, first, second = op.node.args[:3]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return _product_form(op, first, second, out="n" if base_name(op.node) == "addmm" else "")


@site(*aten("addmm baddbmm"))
def addmm_sites(op: ContractionOp) -> list[Site]:
    """x @ W or W @ x, with a vector added."""
    _, left, right = list(schema(op.node.target))[:3]
    plain = op.arg("beta") == op.arg("alpha") == 1
    biases = op.biases(op.arg("self")) if plain else None
    # A vector that is added there runs along the columns of the result, not along its features:
    # W @ x has no site.
    return matrix_sites(op, left, -1, (right, 0), biases)


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
    for term in w[1:]:
        op.multiple_of(_GROUPED_MULTIPLE, term)
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


@taints("aten.bilinear")
def bilinear_taint(op: TaintedOp) -> Any:
    """A product of three."""
    out = multilinear(op, ("input1", "input2", "weight"), added="bias")
    bias = op.taint(op.arg("bias"))
    return out if isinstance(bias, float) else torch.maximum(out, bias)


@form("aten.bilinear")
def bilinear_form(op: TaintedOp) -> Form | None:
    """Features of both inputs times the weight."""
    x, y, w = (op.arg(name) for name in ("input1", "input2", "weight"))
    batch = leading(op.value(x).ndim - 1)
    return Form((x, y, w), ((*batch, "i"), (*batch, "j"), ("o", "i", "j")))
