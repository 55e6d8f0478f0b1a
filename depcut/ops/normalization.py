"""Normalisations: per-channel parameters unify; statistics run over what is left of an axis."""

from __future__ import annotations

from torch import fx

from depcut import axes
from depcut.ops.registry import Op, Output, rule


def _couple(op: Op, channels: axes.Term, *names: str) -> None:
    for name in names:
        if op.has(name) and op.arg(name) is not None:
            op.unify(op.dims(name)[0], channels)


@rule("aten.batch_norm", "aten.instance_norm", "aten._batch_norm_with_update")
def batch_norm(op: Op) -> Output:
    """Statistics per channel (dimension 1)."""
    x = op.dims("input")
    channels = x[1] if len(x) > 1 else x[0]
    _couple(op, channels, "weight", "bias", "running_mean", "running_var")
    if "instance_norm" in str(op.node.target) and len(x) < 3:
        op.freeze(channels, "instance norm without a spatial dimension")
    flag = "use_input_stats" if op.has("use_input_stats") else "training"
    if op.has(flag) and op.arg(flag):
        op.statistic(*x[:1], *x[2:])
    out = tuple(map(axes.resolve, x))
    sizes = op.sizes[op.node]
    if sizes and isinstance(sizes[0], tuple):
        return [out] + [
            (channels,) if len(s) == 1 else (op.frozen(s[0], "aux"),) for s in sizes[1:]
        ]
    return out


@rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(op: Op) -> Output:
    """Statistics over the trailing dimensions, which `normalized_shape` repeats."""
    x = op.dims("input")
    normalized = x[len(x) - len(op.arg("normalized_shape")) :]
    op.literals("normalized_shape", normalized)
    for name in ("weight", "bias"):
        if op.has(name) and op.arg(name) is not None:
            op.broadcast(normalized, op.dims(name))
    op.statistic(*normalized)
    out = tuple(map(axes.resolve, x))
    if not isinstance(op.sizes[op.node][0], tuple):
        return out
    reduced = (*out[: len(out) - len(normalized)], *([axes.UNIT] * len(normalized)))
    return [out] + [reduced] * (len(op.sizes[op.node]) - 1)


@rule("aten.group_norm")
def group_norm(op: Op) -> Output:
    """Channels = groups x c; statistics over c and the positions."""
    x, groups = op.dims("input"), axes.axis(op.arg("num_groups"))
    inner = axes.axis(x[1].size // groups.size)
    op.unify(x[1], axes.product(groups, inner))
    op.literal("num_groups", term=groups)
    _couple(op, x[1], "weight", "bias")
    op.statistic(inner, *x[2:])
    return tuple(map(axes.resolve, x))


@rule("aten._weight_norm", "aten._weight_norm_interface", "aten.norm_except_dim")
def weight_norm(op: Op) -> Output:
    """w = g v / |v|, the norm taken over all dimensions but `dim`.

    The magnitudes g are rescaled when inputs leave, so that the kept part of w stays what it was.
    """
    if "norm_except_dim" in str(op.node.target):
        v = op.dims("v")
        dim = op.arg("dim") % len(v)
        op.statistic(*v)
        return tuple(t if i == dim else axes.UNIT for i, t in enumerate(v))
    v, g = op.dims("v"), op.dims("g")
    # -1 stands for one norm over everything.
    dim = op.arg("dim")
    if dim >= 0 and len(g) == len(v):
        op.broadcast((v[dim],), (g[dim],))
    v_node, g_node = op.arg("v"), op.arg("g")
    assert isinstance(v_node, fx.Node)
    assert isinstance(g_node, fx.Node)
    op.effects.rescales.append((g_node, v_node, dim))
    out = tuple(map(axes.resolve, v))
    return [out, tuple(map(axes.resolve, g))] if isinstance(op.sizes[op.node][0], tuple) else out
