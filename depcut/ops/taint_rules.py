"""Which elements of an operator's result depend on the model's inputs: one rule a family."""

from __future__ import annotations

import os
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from depcut.ops.registry import dims_of, rule_for
from depcut.ops.taint import RULES, Step, base_name, tainted, taints

_POINTWISE = rule_for("pointwise")


def is_padded(step: Step) -> bool:
    """Whether a window operator reads zeros beyond the border, so that constants differ there."""
    padding = step.arg("padding")
    if isinstance(padding, str):
        taps = step.value(step.arg("weight")).shape[2:]
        return padding == "same" and any(n > 1 for n in taps)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


@taints(
    *"""view reshape _unsafe_view view_as reshape_as flatten ravel unflatten permute transpose
    swapaxes swapdims t mT mH numpy_T adjoint matrix_H movedim moveaxis squeeze unsqueeze expand
    expand_as broadcast_to broadcast_tensors repeat tile repeat_interleave pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle unfold cat concat concatenate hstack
    vstack row_stack stack unbind split chunk unsafe_split unsafe_chunk split_with_sizes
    unsafe_split_with_sizes tensor_split slice narrow select slice_scatter select_scatter flip roll
    tril triu contiguous clone alias detach lift_fresh lift_fresh_copy view_as_real view_as_complex
    diagonal upsample_nearest1d upsample_nearest2d upsample_nearest3d reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    """.split()
)
def moved(step: Step) -> Any:
    """Every element of the result is an element of an operand, or a zero."""
    return step.run(step.taint)


@taints("pad", "constant_pad_nd")
def padded(step: Step) -> Any:
    """Elements move; what is put around them is a constant."""
    return step.run(step.taint, {"value": 0})


@taints("index", "_unsafe_index", "index_select", "gather", "take_along_dim", "embedding")
def looked_up(step: Step) -> Any:
    """Elements move to known places; by unknown numbers one gets a constant only if all are."""
    source = step.node.args[0]
    if any(tainted(step.taint(n)) for n in step.inputs if n is not source):
        if base_name(step.node) != "embedding":
            return None
        table = step.value(source)
        column = step.taint(source).amax(0).maximum((table != table[0]).any(0).float())
        shape = step.value(step.arg("indices")).shape
        return column.expand(*shape, len(column)).clone()
    return step.run(lambda n: step.taint(n) if n is source else step.values[n])


@taints(
    *"""avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d im2col
    col2im""".split()
)
def window(step: Step) -> Any:
    """Averages of a window; with zeros at the border a constant is not one any more."""
    bare = is_padded(step) or base_name(step.node) == "col2im"
    return step.run(step.nonzero if bare else step.taint)


@taints(
    *"""max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d""".split()
)
def extremum(step: Step) -> Any:
    """The largest of a window; the border never is."""
    return step.run(step.taint)


@taints("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def extremum_with_position(step: Step) -> Any:
    """The largest of a window, and where it was, which says nothing of a constant."""
    found, positions = step.run(step.taint)
    return [found, torch.ones_like(positions, dtype=torch.float32)]


def pointwise(step: Step) -> Any:
    """Tainted where an operand is."""
    found = [step.taint(n) for n in step.inputs]
    found = [t for t in found if tainted(t)]
    if not all(isinstance(t, Tensor) for t in found):
        return None
    return reduce(torch.maximum, found) if found else 0.0


@taints("mul", "multiply")
def product(step: Step) -> Any:
    """Not tainted where a factor is an untainted zero."""
    out = pointwise(step)
    for factor in step.node.args[:2]:
        out = None if out is None else out * step.nonzero(factor)
    return out


@taints("where")
def where(step: Step) -> Any:
    """A known condition says which operand counts."""
    condition, *rest = step.node.args
    if len(rest) != 2 or tainted(step.taint(condition)):
        return None
    first, second = (torch.as_tensor(step.taint(n), dtype=torch.float32) for n in rest)
    return torch.where(step.value(condition), *(t.to(first.device) for t in (first, second)))


@taints("masked_fill")
def masked_fill(step: Step) -> Any:
    """A known mask takes taint away."""
    source, mask, value = step.node.args
    if tainted(step.taint(mask)) or tainted(step.taint(value)):
        return None
    return step.taint(source) * (~step.value(mask)).float()


@taints("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(step: Step) -> Any:
    """Nothing happens in eval mode."""
    return None if step.arg("train") else step.taint(step.node.args[0])


@taints("type_as", "to")
def cast(step: Step) -> Any:
    """Values stay."""
    return step.taint(step.node.args[0])


@taints("glu")
def glu(step: Step) -> Any:
    """First half times the sigmoid of the second."""
    x, dim = step.arg("self"), step.arg("dim")
    first, second = step.taint(x).chunk(2, dim)
    return torch.maximum(first, second) * step.nonzero(x).chunk(2, dim)[0]


@taints("fill", "full_like", "new_full")
def filled(step: Step) -> Any:
    """What was there before does not matter."""
    value = step.arg("value") if step.arg("value") is not None else step.arg("fill_value")
    return None if tainted(step.taint(value)) else 0.0


@taints("zero", "zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones")
def constant(_: Step) -> Any:
    """The same number everywhere, however many there are."""
    return 0.0


@taints("copy")
def copied(step: Step) -> Any:
    """The source overwrites."""
    return step.taint(step.arg("src"))


@taints("empty", "empty_like", "new_empty", "empty_strided")
def uninitialised(_: Step) -> Any:
    """Whatever memory holds."""
    return None


def _multilinear(step: Step, names: tuple[str, str], additive: str | None, bare: bool) -> Any:
    """Count the tainted products of every sum by running the operator on ones and zeros."""
    a, b = (step.arg(name) for name in names)
    changes = {} if additive is None or step.arg(additive) is None else {additive: None}

    def count(x: Any, y: Any) -> Any:
        return step.run(step.taint, {names[0]: x, names[1]: y, **changes})

    if bare:
        total = count(step.nonzero(a), step.nonzero(b))
    else:
        total = count(step.taint(a), step.nonzero(b))
        if tainted(step.taint(b)):
            total = total + count(step.nonzero(a), step.taint(b))
    # The sums are whole numbers; fast algorithms of convolution return them rounded.
    return (total > 0.5).float()


@taints("linear")
def linear(step: Step) -> Any:
    """y = x W^T + b."""
    out = _multilinear(step, ("input", "weight"), "bias", bare=False)
    bias = step.taint(step.arg("bias"))
    return out if isinstance(bias, float) else torch.maximum(out, bias)


@taints("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(step: Step) -> Any:
    """Only zeros stay constant across a border, or where kernels overlap unevenly."""
    bare = is_padded(step) or "transpose" in base_name(step.node)
    out = _multilinear(step, ("input", "weight"), "bias", bare)
    return None if tainted(step.taint(step.arg("bias"))) else out


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


@taints("matmul", "mm", "bmm", "mv")
def matmul(step: Step) -> Any:
    """Averages by a softmax leave what is the same at all positions as it is."""
    a, b = step.node.args[:2]
    names = [argument.name for argument in step.node.target._schema.arguments[:2]]  # type: ignore[union-attr]
    out = _multilinear(step, (names[0], names[1]), None, bare=False)
    if sums_to_one(a) and step.value(b).ndim > 1:
        out = torch.minimum(out, _varying(step, b))
    return out


@taints("addmm", "baddbmm")
def addmm(step: Step) -> Any:
    """bias + a @ b."""
    bias, a, b = step.node.args[:3]
    first, second = step.taint(a), step.taint(b)
    total = first @ step.nonzero(b) + step.nonzero(a) @ second
    return torch.maximum((total > 0.5).float(), step.taint(bias))


def _varying(step: Step, node: Any) -> Any:
    """1 where a column is tainted or differs from row to row; of one row for all of them."""
    value, taint = step.value(node), step.taint(node)
    same = torch.isclose(value, value[..., :1, :], rtol=resolution(value), atol=0)
    return torch.maximum(taint, (~same).float()).amax(-2, keepdim=True)


def resolution(value: Tensor) -> float:
    """The relative difference that two computations of one number may show."""
    return 16 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0


@taints("einsum")
def einsum(step: Step) -> Any:
    """Any product of tensors."""
    nodes = step.arg("tensors")
    total = torch.zeros(())
    for k, node in enumerate(nodes):
        if tainted(step.taint(node)):
            operands = [step.taint(n) if i == k else step.nonzero(n) for i, n in enumerate(nodes)]
            counted = step.node.target(step.arg("equation"), operands)  # type: ignore[operator]
            total = total.to(counted.device) + counted
    return (total > 0.5).float()


@taints("scaled_dot_product_attention")
def attention(step: Step) -> Any:
    """Rows of attention sum to one: values that are the same at all positions pass."""
    value, mask = step.arg("value"), step.arg("attn_mask")
    if step.arg("dropout_p"):
        return None
    out = step.nonzero(value).amax(-2, keepdim=True) if mask is not None else _varying(step, value)
    *batch, rows, _ = step.value(step.arg("query")).shape
    if step.arg("enable_gqa"):
        out = out.repeat_interleave(batch[-1] // out.shape[-3], -3)
    return out.expand(*torch.broadcast_shapes(batch, out.shape[:-2]), rows, out.shape[-1])


def _scaled(step: Step, out: Any, dim: int) -> Any:
    """Taint of what is normalised already, times a weight and plus a bias along a dimension."""
    for name in ("weight", "bias"):
        if tainted(step.taint(step.arg(name))):
            return None
    if step.arg("weight") is None:
        return out
    used = (step.value(step.arg("weight")) != 0).float()
    return out * (used if dim < 0 else used.reshape(-1, *[1] * (out.ndim - dim - 1)))


@taints("batch_norm")
def batch_norm(step: Step) -> Any:
    """An affine map a channel in eval mode."""
    if step.arg("training") or step.arg("running_mean") is None:
        return None
    if any(tainted(step.taint(step.arg(n))) for n in ("running_mean", "running_var")):
        return None
    return _scaled(step, step.taint(step.arg("input")), 1)


@taints("layer_norm", "rms_norm")
def layer_norm(step: Step) -> Any:
    """Statistics over the trailing dimensions."""
    taint = step.taint(step.arg("input"))
    dims = tuple(range(-len(step.arg("normalized_shape")), 0))
    return _scaled(step, taint.amax(dims, keepdim=True).expand_as(taint), -1)


@taints("group_norm")
def group_norm(step: Step) -> Any:
    """Statistics over a group of channels and all positions."""
    taint = step.taint(step.arg("input"))
    rows = taint.reshape(taint.shape[0], step.arg("num_groups"), -1)
    return _scaled(step, rows.amax(-1, keepdim=True).expand_as(rows).reshape(taint.shape), 1)


@taints(
    *"""sum nansum mean nanmean var std amax amin logsumexp prod any all linalg_vector_norm norm
    count_nonzero""".split()
)
def reduction(step: Step) -> Any:
    """Tainted where anything reduced is."""
    taint = step.taint(step.node.args[0])
    dims = dims_of(step.arg("dim"), taint.ndim)
    return taint.amax(dims, keepdim=bool(step.arg("keepdim"))) if dims else taint


@taints("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "sort", "argsort")
def along(step: Step) -> Any:
    """Every value depends on all along the dimension."""
    taint = step.taint(step.node.args[0])
    out = taint.amax(step.arg("dim"), keepdim=True).expand_as(taint)
    return [out, out] if base_name(step.node) == "sort" else out


@taints("sym_size", "sym_numel", "sym_stride")
def number(_: Step) -> Any:
    """Sizes follow those of the inputs."""
    return 1.0


def derived(step: Step) -> Any:
    """Taint of an operator's result as its rule has it: None for all of it, 0.0 for nothing."""
    name, tags = base_name(step.node), getattr(step.node.target, "tags", ())
    rule = RULES.get(name)
    if rule is None and torch.Tag.nondeterministic_seeded in tags:
        return None
    if rule is None and hasattr(step.node.target, "_schema"):
        rule = pointwise if rule_for(step.node.target) is _POINTWISE else None
    found = None
    if rule is not None:
        try:
            found = rule(step)
        except Exception:  # a form of the operator that the rule does not know
            if os.environ.get("DEPCUT_STRICT"):
                raise
    drawn = torch.Tag.nondeterministic_seeded in tags or rule is uninitialised
    clean = not drawn and not any(tainted(step.taint(n)) for n in step.inputs)
    return 0.0 if found is None and clean else found


def is_view(node: fx.Node) -> bool:
    """Whether the taint of an operator's result may be a view of its operand's, as its value is."""
    return RULES.get(base_name(node)) is moved
