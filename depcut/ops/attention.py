"""Scaled dot-product attention: heads couple, head_dim is contracted, the scale stays."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from depcut import axes
from depcut.ops.form import Form, form, leading
from depcut.ops.kinds import MATRIX_PRODUCTS
from depcut.ops.registry import Op, Output, rule
from depcut.ops.taint import TaintedOp, taints, varying

_FUSED = "aten.scaled_dot_product_attention"

MATRIX_PRODUCTS.add(_FUSED)


@rule(_FUSED)
def sdpa(op: Op) -> Output:
    """q (..., L, E), k (..., S, E), v (..., S, Ev), mask broadcast to (..., L, S)."""
    q, k, v = op.dims("query"), op.dims("key"), op.dims("value")
    if op.arg("enable_gqa") and q[-3].size != k[-3].size:
        op.unify(q[-3], axes.product(k[-3], axes.axis(q[-3].size // k[-3].size)))
        op.unify(k[-3], v[-3])
        batch = (*op.broadcast(q[:-3], k[:-3], v[:-3]), axes.resolve(q[-3]))
    else:
        batch = op.broadcast(q[:-2], k[:-2], v[:-2])
    op.unify(q[-1], k[-1])
    op.unify(k[-2], v[-2])
    for term in (q[-2], k[-2]):
        op.freeze(term, "tokens: softmax runs over the positions")
    op.contract("key", -1)
    op.contract("query", -1)
    mask = op.arg("attn_mask")
    if isinstance(mask, fx.Node):
        op.broadcast((*batch, q[-2], k[-2]), op.dims(mask))
    if op.arg("scale") is None:
        op.pin("scale", 1.0 / math.sqrt(q[-1].size))
    out = (*batch, q[-2], v[-1])
    op.macs(*batch, q[-2], k[-2], q[-1])
    op.macs(*batch, q[-2], k[-2], v[-1])
    return tuple(map(axes.resolve, out))


@taints(_FUSED)
def sdpa_taint(op: TaintedOp) -> Any:
    """Rows of attention sum to one: values that are the same at all positions pass."""
    value, mask = op.arg("value"), op.arg("attn_mask")
    if op.arg("dropout_p"):
        return None
    out = op.nonzero(value).amax(-2, keepdim=True) if mask is not None else varying(op, value)
    *batch, rows, _ = op.value(op.arg("query")).shape
    if op.arg("enable_gqa"):
        out = out.repeat_interleave(batch[-1] // out.shape[-3], -3)
    return out.expand(*torch.broadcast_shapes(batch, out.shape[:-2]), rows, out.shape[-1])


@form(_FUSED)
def sdpa_form(op: TaintedOp) -> Form | None:
    """Queries times keys; where heads share keys, the head dimension has no common letter."""
    if op.arg("enable_gqa"):
        return None
    q, k = op.arg("query"), op.arg("key")
    labels = [(*leading(op.value(n).ndim - 2), c, "e") for n, c in ((q, "l"), (k, "s"))]
    return Form((q, k), tuple(labels))
