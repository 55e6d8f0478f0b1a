"""Scaled dot-product attention: heads couple, head_dim is contracted, the scale stays."""

from __future__ import annotations

import math

from torch import fx

from depcut import axes
from depcut.ops.registry import Op, Output, rule


@rule("aten.scaled_dot_product_attention")
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
