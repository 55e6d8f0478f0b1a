"""Pointwise operators: dimensions unify one by one, a size of 1 broadcasts."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from depcut import axes
from depcut.axes import Dims
from depcut.ops.kinds import PRODUCTS, SCALINGS
from depcut.ops.registry import Op, Output, aten, rule
from depcut.ops.taint import ALL, NOTHING, TaintedOp, moved, tainted, taints

PRODUCTS.add("aten.mul")
SCALINGS.add("aten.mul.Tensor", "aten.mul_.Tensor")

# Pointwise in effect, but not tagged so by torch because they copy, cast, draw or return a view.
_UNTAGGED = """
aten.real aten.imag
aten.to aten.contiguous aten.clone aten.alias aten.detach aten.detach_ aten.dropout
aten.dropout_ aten.feature_dropout aten.feature_dropout_ aten.feature_alpha_dropout
aten.alpha_dropout aten.alpha_dropout_
aten.lift_fresh_copy aten.lift_fresh aten.zeros_like aten.ones_like aten.full_like
aten.empty_like aten.rand_like aten.randn_like aten.where aten.masked_fill aten.masked_fill_
aten.fill_ aten.fill aten.zero_ aten.copy_ aten.copy aten.bernoulli aten.bernoulli_
aten.silu aten.silu_ aten.celu aten.celu_ aten.selu aten.selu_
aten.hardswish aten.hardswish_ aten.hardsigmoid aten.hardsigmoid_ aten.hardtanh aten.hardtanh_
aten.relu6 aten.relu6_ aten.leaky_relu aten.leaky_relu_ aten.log_sigmoid aten.mish aten.mish_
aten.softplus aten.rrelu aten.rrelu_ aten.hardshrink aten.softshrink aten.gelu aten.gelu_
aten.elu aten.elu_ aten.clip aten.clip_ aten.square aten.square_ aten.divide aten.multiply
aten.subtract aten.true_divide aten.floor_divide aten.nan_to_num aten.nan_to_num_ aten.uniform_
aten.normal_ aten.requires_grad_ aten.pin_memory aten._to_copy aten.threshold
aten.threshold_ aten.positive aten.negative aten.absolute aten.fix aten.isfinite aten.isinf
aten.isnan aten.resolve_conj aten.resolve_neg aten.special_expit aten.exponential_ aten.random_
aten.min.other aten.max.other aten.native_dropout
aten.complex aten.polar aten.float_power aten.logical_and
aten.logical_or aten.logical_not aten.greater aten.less aten.__and__ aten.__or__ aten.__xor__
aten.eq_ aten.quantize_per_tensor aten.fake_quantize_per_tensor_affine aten.lerp aten.lerp_
""".split()


@rule("pointwise", *_UNTAGGED)
def pointwise(op: Op) -> Output:
    """Unify all tensor arguments; the outputs have the broadcast dimensions."""
    out = op.broadcast(*(op.dims(n) for n in op.tensors()))
    sizes = op.sizes[op.node]
    if sizes and isinstance(sizes[0], tuple):
        return [fit(op, out, s) for s in sizes]
    return fit(op, out, op.out_sizes)


def fit(op: Op, out: Dims, sizes: tuple[int, ...]) -> Dims:
    """Leading dimensions of size 1 that broadcasting added or dropped."""
    if len(out) > len(sizes):
        out = out[len(out) - len(sizes) :]
    return (axes.UNIT,) * (len(sizes) - len(out)) + tuple(map(axes.resolve, out))


@taints("pointwise")
def pointwise_taint(op: TaintedOp) -> Any:
    """Tainted where an operand is."""
    operand_taints = [op.taint(n) for n in op.inputs]
    operand_taints = [t for t in operand_taints if tainted(t)]
    if not all(isinstance(t, Tensor) for t in operand_taints):
        return None
    return reduce(torch.maximum, operand_taints) if operand_taints else NOTHING


@taints("aten.mul", "aten.multiply")
def product_taint(op: TaintedOp) -> Any:
    """Not tainted where a factor is an untainted zero."""
    out = pointwise_taint(op)
    for factor in op.node.args[:2]:
        out = None if out is None else out * op.nonzero(factor)
    return out


@taints("aten.where")
def where(op: TaintedOp) -> Any:
    """A known condition says which operand counts."""
    condition, *rest = op.node.args
    if len(rest) != 2 or tainted(op.taint(condition)):
        return None
    first, second = (torch.as_tensor(op.taint(n), dtype=torch.float32) for n in rest)
    return torch.where(op.value(condition), *(t.to(first.device) for t in (first, second)))


@taints("aten.masked_fill")
def masked_fill(op: TaintedOp) -> Any:
    """A known mask takes taint away."""
    source, mask, value = op.node.args
    if tainted(op.taint(mask)) or tainted(op.taint(value)):
        return None
    return op.taint(source) * (~op.value(mask)).float()


@taints(*aten("dropout feature_dropout alpha_dropout feature_alpha_dropout"))
def dropout(op: TaintedOp) -> Any:
    """The identity in eval mode; random in training."""
    return None if op.arg("train") else op.taint(op.node.args[0])


@taints("aten.copy")
def copied(op: TaintedOp) -> Any:
    """Taint of the source, which overwrites all of the target."""
    return op.taint(op.arg("src"))


taints(*aten("contiguous clone alias detach lift_fresh lift_fresh_copy"))(moved)


@rule("aten.type_as", "aten.to.other")
def like_another(op: Op) -> Output:
    """A cast to the type of another tensor, whose shape does not matter."""
    return op.dims("self")


@taints("aten.type_as", "aten.to")
def cast(op: TaintedOp) -> Any:
    """A cast keeps which elements are tainted."""
    return op.taint(op.node.args[0])


@rule("aten.view_as_real", "aten.view_as_complex")
def complex_pairs(op: Op) -> Output:
    """The last dimension of size 2 is the real and the imaginary part."""
    x = op.dims("self")
    if op.name == "view_as_real":
        return (*x, op.frozen(2, "real and imaginary part"))
    op.freeze(x[-1], "real and imaginary part")
    return x[:-1]


taints("aten.view_as_real", "aten.view_as_complex")(moved)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(op: Op) -> Output:
    """One slope for all, or one a channel (dimension 1)."""
    dims, weight = op.dims("self"), op.dims("weight")
    channel = 1 if len(dims) > 1 else 0
    slopes = [t for t in weight if t.size > 1]
    if slopes:
        op.unify(dims[channel], slopes[0])
    return dims


@rule("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")
def nothing(op: Op) -> Output:
    """Checks that return nothing."""
    return None


@rule(
    "aten.sym_constrain_range_for_size",
    "aten.sym_constrain_range",
    "aten.sym_size",
    "aten.sym_numel",
    "aten.sym_stride",
    "aten.sym_storage_offset",
)
def number(op: Op) -> Output:
    """Sizes of tensors as numbers: they adapt by themselves."""
    return None


@taints(*aten("sym_size sym_numel sym_stride"))
def number_taint(_: TaintedOp) -> Any:
    """Sizes follow those of the inputs."""
    return ALL


@rule("aten.glu")
def glu(op: Op) -> Output:
    """First half times the gate of the second: the halves are one axis."""
    dims = list(op.dims("self"))
    dim = op.arg("dim") % len(dims)
    half = dims[dim].size // 2
    first, second = axes.pieces(dims[dim], [half, half])
    op.unify(first, second)
    dims[dim] = axes.resolve(first)
    return tuple(dims)


@taints("aten.glu")
def glu_taint(op: TaintedOp) -> Any:
    """First half times the sigmoid of the second."""
    x, dim = op.arg("self"), op.arg("dim")
    first, second = op.taint(x).chunk(2, dim)
    return torch.maximum(first, second) * op.nonzero(x).chunk(2, dim)[0]
