"""Normalisations: per-channel parameters unify; statistics run over what is left of an axis."""

from __future__ import annotations

from typing import Any

from torch import fx

from depcut import axes
from depcut.capture.program import Program
from depcut.graph.ancestry import is_shared
from depcut.graph.arguments import argument
from depcut.graph.operators import is_aten
from depcut.ops.kinds import NORMS
from depcut.ops.registry import Op, Output, aten, rule
from depcut.ops.taint import TaintedOp, tainted, taints

_BY_CHANNEL = aten("batch_norm instance_norm _batch_norm_with_update")
_TRAILING = aten("layer_norm rms_norm native_layer_norm _fused_rms_norm")

NORMS.add(*_BY_CHANNEL, *_TRAILING, "aten.group_norm")


def _couple(op: Op, channels: axes.Term, *names: str) -> None:
    for name in names:
        if op.has(name) and op.arg(name) is not None:
            op.unify(op.dims(name)[0], channels)


@rule(*_BY_CHANNEL)
def batch_norm(op: Op) -> Output:
    """Statistics per channel (dimension 1)."""
    x = op.dims("input")
    channels = x[1] if len(x) > 1 else x[0]
    _couple(op, channels, "weight", "bias", "running_mean", "running_var")
    if op.name == "instance_norm" and len(x) < 3:
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


def _scaled(op: TaintedOp, out: Any, dim: int) -> Any:
    """Taint of what is normalised already, times a weight and plus a bias along a dimension."""
    for name in ("weight", "bias"):
        if tainted(op.taint(op.arg(name))):
            return None
    if op.arg("weight") is None:
        return out
    used = (op.value(op.arg("weight")) != 0).float()
    return out * (used if dim < 0 else used.reshape(-1, *[1] * (out.ndim - dim - 1)))


@taints("aten.batch_norm")
def batch_norm_taint(op: TaintedOp) -> Any:
    """An affine map a channel in eval mode."""
    if op.arg("training") or op.arg("running_mean") is None:
        return None
    if any(tainted(op.taint(op.arg(n))) for n in ("running_mean", "running_var")):
        return None
    return _scaled(op, op.taint(op.arg("input")), 1)


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm of any rank."""
    return is_aten(node, "batch_norm")


def shared_statistics(norm: fx.Node, program: Program) -> str | None:
    """A running statistic of a batch norm that something else reads too, None if there is none.

    Args:
        norm: A batch norm.
        program: The captured model.
    """
    for name in ("running_mean", "running_var"):
        source = argument(norm, name)
        tensor = program.tensors.get(source) if isinstance(source, fx.Node) else None
        if tensor is not None and is_shared(tensor, program):
            return tensor
    return None


@rule(*_TRAILING)
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


@taints("aten.layer_norm", "aten.rms_norm")
def layer_norm_taint(op: TaintedOp) -> Any:
    """Statistics over the trailing dimensions."""
    taint = op.taint(op.arg("input"))
    dims = tuple(range(-len(op.arg("normalized_shape")), 0))
    return _scaled(op, taint.amax(dims, keepdim=True).expand_as(taint), -1)


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


@taints("aten.group_norm")
def group_norm_taint(op: TaintedOp) -> Any:
    """Statistics over a group of channels and all positions."""
    taint = op.taint(op.arg("input"))
    rows = taint.reshape(taint.shape[0], op.arg("num_groups"), -1)
    return _scaled(op, rows.amax(-1, keepdim=True).expand_as(rows).reshape(taint.shape), 1)


@rule("aten._weight_norm", "aten._weight_norm_interface", "aten.norm_except_dim")
def weight_norm(op: Op) -> Output:
    """w = g v / |v|, the norm taken over all dimensions but `dim`.

    The magnitudes g are rescaled when inputs leave, so that the kept part of w stays what it was.
    """
    if op.name == "norm_except_dim":
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
