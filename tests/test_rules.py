"""Every operator rule, judged by brute force: slicing before the operator equals slicing after it.

Each case is a function whose operands are all parameters, so that every dimension is free to go.
The sum of its results is the model's output: it fixes no dimension. For kept sets of every group,
the captured graph runs twice, dense (with the consumer-side slices zeroed) and on sliced operands
with rewritten literals; every node's sliced value must be the slice of its dense value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from oracle import some_units
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils import _pytree as pytree

import depcut
from depcut import axes
from depcut.capture.capture import capture
from depcut.coupling.groups import Coupling
from depcut.coupling.infer import infer_coupling
from depcut.errors import RuleError
from depcut.ops.registry import RULES, Op, Output, rule_for, unregister
from depcut.plan.keep import Keep
from depcut.reference.run import Reference

# The harness --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    Attributes:
        run: The call, on tensors.
        operands: Shapes of parameters, or the values of buffers.
        groups: Sizes of the groups that the rule must leave free, ascending.
        noise: The values are random (or undefined): only shapes can be compared.
    """

    run: Callable[..., Any]
    operands: tuple[tuple[int, ...] | Tensor, ...]
    groups: tuple[int, ...]
    noise: bool = False


BATCH = torch.zeros(2, dtype=torch.float64)
CASES: dict[str, Case] = {}


def case(
    name: str,
    run: Callable[..., Any],
    *operands: tuple[int, ...] | Tensor,
    groups: tuple[int, ...],
    noise: bool = False,
) -> None:
    assert name not in CASES, name
    CASES[name] = Case(run, operands, groups, noise)


class Operands(nn.Module):
    """Calls a function on its own parameters and buffers; returns the sum of all results."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.run, self.names = case.run, []
        generator = torch.Generator().manual_seed(0)
        for i, operand in enumerate(case.operands):
            self.names.append(f"t{i}")
            if isinstance(operand, Tensor):
                self.register_buffer(f"t{i}", operand.clone())
            else:
                values = torch.randn(operand, generator=generator, dtype=torch.float64)
                self.register_parameter(f"t{i}", nn.Parameter(values))

    def forward(self, x: Tensor) -> Tensor:
        made = self.run(*(getattr(self, name) for name in self.names))
        leaves = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        return x + sum(leaf.to(torch.float64).sum() for leaf in leaves)


def kept_sets(coupling: Coupling, seed: int = 0) -> Iterator[Keep]:
    """Each family of tied groups alone, at several counts, and all of them together at random."""
    rng = np.random.default_rng(seed)
    families: dict[Any, list[Any]] = defaultdict(list)
    for group in coupling.groups:
        families[("free", group.index) if group.tied is None else group.tied].append(group)

    def units(family: list[Any], count: int) -> dict[int, np.ndarray]:
        return {g.index: np.array(some_units(g.size, count, rng)) for g in family}

    for family in families.values():
        size, floor = family[0].size, max(g.floor for g in family)
        for count in sorted({floor, (size + 1) // 2, size - 1}):
            yield Keep(coupling, units(family, count))
    for _ in range(4 if families else 0):
        picked: dict[int, np.ndarray] = {}
        for family in families.values():
            picked |= units(family, int(rng.integers(family[0].floor, family[0].size + 1)))
        yield Keep(coupling, picked)


def sliced(value: Tensor, keep: Keep, dims: Any) -> Tensor:
    assert value.shape == tuple(term.size for term in dims)
    for dim, term in enumerate(dims):
        kept = keep.indices(term)
        if kept is not None:
            value = value.index_select(dim, torch.from_numpy(kept))
    return value


def check(model: nn.Module, keep: Keep, noise: bool = False) -> None:
    """Compare every node of the graph run on slices with the slices of the dense graph."""
    coupling = keep.coupling
    nodes = [n for n in coupling.program.graph.graph.nodes if n.op == "call_function"]
    with torch.no_grad():
        _, dense = Reference(keep, model).run([BATCH], watch=set(nodes))
        _, small = Reference(keep, model, sliced=True).run([BATCH], watch=set(nodes))
    for node in nodes:
        output = coupling.env[node]
        if isinstance(output, tuple) and node.users:  # results of lists come as nodes of their own
            compare(node, sliced(dense[node], keep, output), small[node], keep, noise)


def compare(node: fx.Node, expected: Tensor, made: Tensor, keep: Keep, noise: bool) -> None:
    units = {keep.coupling.groups[i].name: list(kept) for i, kept in keep.units.items()}
    assert made.shape == expected.shape, f"{node.format_node()}: {units}"
    if not noise:
        torch.testing.assert_close(
            made,
            expected,
            rtol=1e-9,
            atol=1e-9,
            equal_nan=True,
            msg=lambda text: f"{node.format_node()}\nkept: {units}\n{text}",
        )


def judge(case: Case) -> Coupling:
    """Infer the coupling of a case and check it for many kept sets."""
    model = Operands(case).eval()
    coupling = infer_coupling(capture(model, BATCH))
    for keep in kept_sets(coupling):
        check(model, keep, case.noise)
    return coupling


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPCUT_STRICT", "1")


def sizes_of(coupling: Coupling) -> tuple[int, ...]:
    return tuple(sorted(group.size for group in coupling.groups))


# Operands that are not parameters -----------------------------------------------------------------

MASK = torch.arange(24).reshape(4, 6) % 3 == 0
ROWS = torch.tensor([3, 0, 2])
COLUMNS = torch.tensor([5, 1])


def numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


# Pointwise ----------------------------------------------------------------------------------------

case("add", torch.add, (4, 6), (4, 6), groups=(4, 6))
case("add_row", torch.add, (4, 6), (6,), groups=(4, 6))
case("add_column", torch.add, (4, 1), (3, 1, 6), groups=(3, 4, 6))
case("add_scalar_tensor", lambda x, s: x + 2 * s, (4, 6), (), groups=(4, 6))
case("sub_alpha", lambda x, y: torch.sub(x, y, alpha=3), (4, 6), (4, 6), groups=(4, 6))
case("div_floor", lambda x: torch.div(x, 0.3, rounding_mode="floor"), (4, 6), groups=(4, 6))
case("power", lambda x: x**2 + 2**x + torch.float_power(x, 2), (4, 6), groups=(4, 6))
case("where", torch.where, MASK, (4, 6), (6,), groups=(4, 6))
case("where_scalar", lambda m, x: torch.where(m, 0.5, x), MASK, (4, 6), groups=(4, 6))
case("to_other", lambda x, y: x.to(y.float()), (4, 6), (5,), groups=(4, 5, 6))
case("where_broadcast", torch.where, MASK[:1], (4, 1), (6,), groups=(4, 6))
case("masked_fill", lambda x, m: x.masked_fill(m, -9.0), (4, 6), MASK, groups=(4, 6))
case("masked_fill_row", lambda x, m: x.masked_fill(m, 1.5), (4, 6), MASK[0], groups=(4, 6))
case("lerp", torch.lerp, (4, 6), (4, 6), (6,), groups=(4, 6))
case("addcmul", torch.addcmul, (6,), (4, 6), (4, 1), groups=(4, 6))
case("clamp_tensor", lambda x, lo: torch.clamp(x, min=lo), (4, 6), (6,), groups=(4, 6))
case("clip", lambda x: x.clip(-0.5, 0.5).clamp_min(-0.2), (4, 6), groups=(4, 6))
case("maximum", lambda x, y: torch.maximum(x, y) + torch.max(x, y), (4, 6), (6,), groups=(4, 6))
case("minimum", lambda x, y: torch.minimum(x, y) + torch.min(x, y), (4, 1), (6,), groups=(4, 6))
case("compare", lambda x, y: (x > y) & (x != 0) | ~(y <= 0.1), (4, 6), (6,), groups=(4, 6))
case("isfinite", lambda x: x.log().isnan() | x.isfinite() | x.isinf(), (4, 6), groups=(4, 6))
case("nan_to_num", lambda x: x.log().nan_to_num(7.0), (4, 6), groups=(4, 6))
case("casts", lambda x: x.float().half().double().to(torch.int64), (4, 6), groups=(4, 6))
case("cast_like", lambda x, y: x.type_as(y.float()) * y.float(), (4, 6), (6,), groups=(4, 6))
case("type_as_elsewhere", lambda x, y: x.type_as(y), (4, 6), (5, 3), groups=(3, 4, 5, 6))
case("clone", lambda x: x.clone().contiguous().detach(), (4, 6), groups=(4, 6))
case("likes", lambda x: (torch.zeros_like(x) + 1) * torch.full_like(x, 2.0), (4, 6), groups=(4, 6))
case(
    "rand_like",
    lambda x: torch.rand_like(x) + torch.empty_like(x),
    (4, 6),
    groups=(4, 6),
    noise=True,
)
case("bernoulli", lambda x: torch.bernoulli(x.sigmoid()), (4, 6), groups=(4, 6), noise=True)
case("frexp", torch.frexp, (4, 6), groups=(4, 6))
case("inplace", lambda x, y: (x + 0).add_(y).relu_().mul_(2), (4, 6), (6,), groups=(4, 6))
case("fill", lambda x: (x + 0).fill_(3.0) + (x * 1).zero_(), (4, 6), groups=(4, 6))
case("copy", lambda x, y: (x + 0).copy_(y), (4, 6), (6,), groups=(4, 6))

ACTIVATIONS = [
    F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.celu, F.selu, F.leaky_relu, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.hardshrink, F.softshrink, F.tanhshrink, F.softplus, F.softsign,
    F.logsigmoid, F.rrelu, torch.sigmoid, torch.tanh, torch.erf,
]  # fmt: skip
for activation in ACTIVATIONS:
    case(f"activation_{activation.__name__}", activation, (4, 6), groups=(4, 6))
case("threshold", lambda x: F.threshold(x, 0.1, 20.0), (4, 6), groups=(4, 6))
case("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), (4, 6), groups=(4, 6))

case("dropout", lambda x: F.dropout(x, 0.5, False), (4, 6), groups=(4, 6))
case("dropout_training", lambda x: F.dropout(x, 0.5, True), (4, 6), groups=(4, 6), noise=True)
case("dropout_2d", lambda x: F.dropout2d(x, 0.5, False), (4, 6, 3, 3), groups=(3, 3, 4, 6))
case("dropout_alpha", lambda x: F.alpha_dropout(x, 0.5, False), (4, 6), groups=(4, 6))
case("dropout_feature_alpha", lambda x: F.feature_alpha_dropout(x, 0.5), (4, 6), groups=(4, 6))

case("glu", lambda x: F.glu(x, -1), (4, 10), groups=(4, 5))
case("glu_first", lambda x: F.glu(x, 0), (6, 5), groups=(3, 5))
case("prelu_channels", F.prelu, (4, 6, 3), (6,), groups=(3, 4, 6))
case("prelu_one", F.prelu, (4, 6), (1,), groups=(4, 6))
case(
    "prelu_kernel",
    lambda x, w: torch._prelu_kernel(x, w[:, None]),
    (4, 6, 3),
    (6,),
    groups=(3, 4, 6),
)
case("prelu_vector", F.prelu, (6,), (1,), groups=(6,))
case("logit_of_mask", lambda m, x: m.to(x.dtype) * x, MASK, (4, 6), groups=(4, 6))

# Contractions -------------------------------------------------------------------------------------

case("linear", F.linear, (4, 6), (5, 6), (5,), groups=(4, 5, 6))
case("linear_vector", F.linear, (6,), (5, 6), groups=(5, 6))
case("linear_batched", F.linear, (2, 3, 6), (5, 6), groups=(2, 3, 5, 6))
case("linear_one_row", F.linear, (4, 6), (6,), groups=(4, 6))
case("mm", torch.mm, (4, 6), (6, 5), groups=(4, 5, 6))
case("bmm", torch.bmm, (3, 4, 6), (3, 6, 5), groups=(3, 4, 5, 6))
case("mv", torch.mv, (4, 6), (6,), groups=(4, 6))
case("dot", torch.dot, (6,), (6,), groups=(6,))
case("vdot", torch.vdot, (6,), (6,), groups=(6,))
case("inner", torch.inner, (4, 6), (5, 6), groups=(4, 5, 6))
case("inner_square", torch.inner, (4, 6), (6, 6), groups=(4, 6, 6))
case("inner_vectors", torch.inner, (6,), (6,), groups=(6,))
case("inner_batched", torch.inner, (2, 4, 6), (3, 5, 6), groups=(2, 3, 4, 5, 6))
case("outer", torch.outer, (4,), (6,), groups=(4, 6))
case("matmul_vectors", torch.matmul, (6,), (6,), groups=(6,))
case("matmul_vector_matrix", torch.matmul, (6,), (6, 5), groups=(5, 6))
case("matmul_matrix_vector", torch.matmul, (4, 6), (6,), groups=(4, 6))
case("matmul_batch_vector", torch.matmul, (2, 4, 6), (6,), groups=(2, 4, 6))
case("matmul_vector_batch", torch.matmul, (6,), (2, 6, 5), groups=(2, 5, 6))
case("matmul_batch_matrix", torch.matmul, (2, 4, 6), (6, 5), groups=(2, 4, 5, 6))
case("matmul_matrix_batch", torch.matmul, (4, 6), (2, 6, 5), groups=(2, 4, 5, 6))
case("matmul_broadcast", torch.matmul, (3, 1, 4, 6), (2, 6, 5), groups=(2, 3, 4, 5, 6))
case("matmul_batches", torch.matmul, (3, 2, 4, 6), (3, 2, 6, 5), groups=(2, 3, 4, 5, 6))
case("matmul_itself", lambda x: x @ x.mT, (3, 4, 6), groups=(3, 4, 6))
case("addmm", torch.addmm, (5,), (4, 6), (6, 5), groups=(4, 5, 6))
case(
    "addmm_scaled",
    lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2),
    (4, 1),
    (4, 6),
    (6, 5),
    groups=(4, 5, 6),
)
case("baddbmm", torch.baddbmm, (3, 1, 5), (3, 4, 6), (3, 6, 5), groups=(3, 4, 5, 6))
case("addmv", torch.addmv, (4,), (4, 6), (6,), groups=(4, 6))
case("bilinear", F.bilinear, (4, 6), (4, 7), (5, 6, 7), (5,), groups=(4, 5, 6, 7))
case("bilinear_batched", F.bilinear, (2, 4, 6), (2, 4, 7), (5, 6, 7), groups=(2, 4, 5, 6, 7))

EINSUMS: list[tuple[str, list[tuple[int, ...]], tuple[int, ...]]] = [
    ("ij,jk->ik", [(4, 6), (6, 5)], (4, 5, 6)),
    ("ij,jk", [(4, 6), (6, 5)], (4, 5, 6)),
    ("ba", [(4, 6)], (4, 6)),
    ("bA , A b", [(4, 6), (6, 4)], (4, 6)),
    ("zY,Yx", [(4, 6), (6, 5)], (4, 5, 6)),
    ("ii->i", [(6, 6)], (6,)),
    ("ii", [(6, 6)], (6,)),
    ("iij->ji", [(4, 4, 6)], (4, 6)),
    ("...ij,...jk->...ik", [(2, 3, 4, 6), (3, 6, 5)], (2, 3, 4, 5, 6)),
    ("...ij,...jk", [(2, 3, 4, 6), (1, 6, 5)], (2, 3, 4, 5, 6)),
    ("b...,b...->...", [(4, 3, 6), (4, 3, 6)], (3, 4, 6)),
    ("i...->...i", [(4, 3, 6)], (3, 4, 6)),
    ("...i,i->...", [(4, 3, 6), (6,)], (3, 4, 6)),
    ("i,j->ij", [(4,), (6,)], (4, 6)),
    ("ij,ij->", [(4, 6), (4, 6)], (4, 6)),
    ("ij,ij->i", [(4, 6), (1, 6)], (4, 6)),
    ("ij->", [(4, 6)], (4, 6)),
    ("bhqd,bhkd->bhqk", [(2, 3, 4, 6), (2, 3, 5, 6)], (2, 3, 4, 5, 6)),
    ("ab,bc,cd->ad", [(3, 4), (4, 5), (5, 6)], (3, 4, 5, 6)),
]
for equation, shapes, free in EINSUMS:
    case(f"einsum_{equation}", lambda *ts, e=equation: torch.einsum(e, *ts), *shapes, groups=free)

# Convolutions -------------------------------------------------------------------------------------

case("conv1d", F.conv1d, (2, 6, 7), (5, 6, 3), (5,), groups=(2, 5, 6))
case("conv2d", F.conv2d, (2, 6, 7, 7), (5, 6, 3, 3), (5,), groups=(2, 5, 6))
case("conv3d", F.conv3d, (2, 6, 4, 4, 4), (5, 6, 3, 3, 3), groups=(2, 5, 6))
case("conv2d_unbatched", F.conv2d, (6, 7, 7), (5, 6, 3, 3), (5,), groups=(5, 6))
case("conv1d_unbatched", F.conv1d, (6, 7), (5, 6, 3), groups=(5, 6))
case(
    "conv2d_strided",
    lambda x, w: F.conv2d(x, w, None, 2, 1, 2),
    (2, 6, 9, 9),
    (5, 6, 3, 3),
    groups=(2, 5, 6),
)
case(
    "conv2d_same",
    lambda x, w: F.conv2d(x, w, padding="same"),
    (2, 6, 5, 5),
    (5, 6, 3, 3),
    groups=(2, 5, 6),
)
case("conv2d_1x1", F.conv2d, (2, 6, 3, 4), (5, 6, 1, 1), (5,), groups=(2, 3, 4, 5, 6))
case(
    "conv2d_1x1_same",
    lambda x, w: F.conv2d(x, w, padding="same"),
    (2, 6, 3, 4),
    (5, 6, 1, 1),
    groups=(2, 3, 4, 5, 6),
)
case(
    "conv2d_1x1_strided",
    lambda x, w: F.conv2d(x, w, stride=2),
    (2, 6, 3, 4),
    (5, 6, 1, 1),
    groups=(2, 5, 6),
)
case(
    "conv1d_1_padded",
    lambda x, w: F.conv1d(x, w, padding=1),
    (2, 6, 3),
    (5, 6, 1),
    groups=(2, 5, 6),
)
case(
    "conv2d_grouped",
    lambda x, w, b: F.conv2d(x, w, b, groups=3),
    (2, 6, 4, 4),
    (12, 2, 3, 3),
    (12,),
    groups=(2, 2, 3, 4),
)
case(
    "conv2d_depthwise",
    lambda x, w, b: F.conv2d(x, w, b, groups=6),
    (2, 6, 4, 4),
    (6, 1, 3, 3),
    (6,),
    groups=(2, 6),
)
case(
    "conv1d_multiplied",
    lambda x, w: F.conv1d(x, w, groups=6),
    (2, 6, 5),
    (18, 1, 3),
    groups=(2, 3, 6),
)
case(
    "conv3d_grouped",
    lambda x, w: F.conv3d(x, w, groups=2),
    (2, 6, 3, 3, 3),
    (10, 3, 2, 2, 2),
    groups=(2, 2, 3, 5),
)
case(
    "conv2d_grouped_unbatched",
    lambda x, w: F.conv2d(x, w, groups=3),
    (6, 4, 4),
    (12, 2, 3, 3),
    groups=(2, 3, 4),
)
case("conv_transpose1d", F.conv_transpose1d, (2, 6, 5), (6, 4, 3), (4,), groups=(2, 4, 6))
case(
    "conv_transpose2d",
    lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1),
    (2, 6, 5, 5),
    (6, 4, 3, 3),
    groups=(2, 4, 6),
)
case("conv_transpose3d", F.conv_transpose3d, (2, 6, 3, 3, 3), (6, 4, 2, 2, 2), groups=(2, 4, 6))
case("conv_transpose2d_unbatched", F.conv_transpose2d, (6, 5, 5), (6, 4, 3, 3), groups=(4, 6))
case("conv_transpose2d_1x1", F.conv_transpose2d, (2, 6, 5, 5), (6, 4, 1, 1), groups=(2, 4, 6))
case(
    "conv_transpose2d_grouped",
    lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3),
    (2, 6, 4, 4),
    (6, 5, 3, 3),
    (15,),
    groups=(2, 2, 3, 5),
)
case(
    "conv_transpose1d_depthwise",
    lambda x, w: F.conv_transpose1d(x, w, groups=6),
    (2, 6, 4),
    (6, 1, 3),
    groups=(2, 6),
)
case(
    "conv_twice_grouped",
    lambda x, v, w: F.conv1d(F.conv1d(x, v, groups=2), w, groups=3),
    (2, 6, 5),
    (12, 3, 3),
    (6, 4, 1),
    groups=(2, 2, 2, 3),
)

case("max_pool1d", lambda x: F.max_pool1d(x, 2), (2, 6, 8), groups=(2, 6))
case("max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1), (2, 6, 8, 8), groups=(2, 6))
case("max_pool3d", lambda x: F.max_pool3d(x, 2), (2, 6, 4, 4, 4), groups=(2, 6))
case("max_pool2d_unbatched", lambda x: F.max_pool2d(x, 2), (6, 4, 4), groups=(6,))
case(
    "max_pool2d_indices",
    lambda x: F.max_pool2d(x, 2, return_indices=True),
    (2, 6, 4, 4),
    groups=(2, 6),
)
case(
    "max_pool1d_indices",
    lambda x: F.max_pool1d(x, 2, return_indices=True),
    (2, 6, 4),
    groups=(2, 6),
)
case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), (2, 6, 8), groups=(2, 6))
case("avg_pool2d", lambda x: F.avg_pool2d(x, 2, ceil_mode=True), (2, 6, 5, 5), groups=(2, 6))
case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), (2, 6, 4, 4, 4), groups=(2, 6))
case("lp_pool2d", lambda x: F.lp_pool2d(x, 2, 2), (2, 6, 4, 4), groups=(2, 6))
case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 1), (2, 6, 8), groups=(2, 6))
case(
    "adaptive_avg_pool2d",
    lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    (2, 6, 8, 5),
    groups=(2, 6),
)
case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 1), (2, 6, 4, 4, 4), groups=(2, 6))
case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), (2, 6, 5, 5), groups=(2, 6))
case("adaptive_max_pool1d_unbatched", lambda x: F.adaptive_max_pool1d(x, 2), (6, 5), groups=(6,))
case(
    "max_pool2d_with_indices",
    lambda x: torch.ops.aten.max_pool2d_with_indices(x, [2, 2]),
    (2, 6, 4, 4),
    groups=(2, 6),
)
case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), (2, 6, 3, 3, 3), groups=(2, 6))
case(
    "upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2), (2, 6, 2, 2, 2), groups=(2, 6)
)
case(
    "upsample_bicubic2d",
    lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    (2, 6, 3, 3),
    groups=(2, 6),
)
case(
    "max_unpool2d",
    lambda x, y: F.max_unpool2d(y, F.max_pool2d(x, 2, return_indices=True)[1], 2),
    (2, 6, 4, 4),
    (2, 6, 2, 2),
    groups=(2, 6),
)
case(
    "fractional_max_pool2d",
    lambda x, s: F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=s),
    (2, 6, 8, 8),
    torch.rand(2, 6, 2, dtype=torch.float64),
    groups=(2, 6),
)
case("upsample_nearest1d", lambda x: F.interpolate(x, scale_factor=2), (2, 6, 4), groups=(2, 6))
case("upsample_nearest2d", lambda x: F.interpolate(x, size=(5, 7)), (2, 6, 4, 4), groups=(2, 6))
case(
    "upsample_exact2d",
    lambda x: F.interpolate(x, size=5, mode="nearest-exact"),
    (2, 6, 4, 4),
    groups=(2, 6),
)
case(
    "upsample_bilinear2d",
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    (2, 6, 4, 4),
    groups=(2, 6),
)
case(
    "upsample_antialias",
    lambda x: F.interpolate(x, size=3, mode="bicubic", antialias=True),
    (2, 6, 4, 4),
    groups=(2, 6),
)
case(
    "upsample_linear1d",
    lambda x: F.interpolate(x, 7, mode="linear", align_corners=True),
    (2, 6, 4),
    groups=(2, 6),
)
case(
    "upsample_trilinear",
    lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    (2, 6, 2, 2, 2),
    groups=(2, 6),
)
case(
    "grid_sample",
    lambda x, g: F.grid_sample(x, g, align_corners=False),
    (2, 6, 4, 4),
    (2, 3, 5, 2),
    groups=(2, 6),
)
case(
    "grid_sample_3d",
    lambda x, g: F.grid_sample(x, g, align_corners=True),
    (2, 6, 3, 3, 3),
    (2, 3, 3, 3, 3),
    groups=(2, 6),
)

# Normalisations -----------------------------------------------------------------------------------

STATE = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
case("batch_norm", F.batch_norm, (4, 6), STATE, STATE**2, (6,), (6,), groups=(4, 6))
case("batch_norm_2d", F.batch_norm, (4, 6, 3, 3), STATE, STATE**2, groups=(3, 3, 4, 6))
case(
    "batch_norm_training",
    lambda x, w: F.batch_norm(x, None, None, w, training=True),
    (4, 6, 5),
    (6,),
    groups=(4, 5, 6),
)
case(
    "instance_norm",
    lambda x, w, b: F.instance_norm(x, None, None, w, b),
    (4, 6, 5),
    (6,),
    (6,),
    groups=(4, 5, 6),
)
case(
    "instance_norm_running",
    lambda x, m, v: F.instance_norm(x, m, v, use_input_stats=False),
    (4, 6, 5, 3),
    STATE,
    STATE**2,
    groups=(3, 4, 5, 6),
)
case("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b), (4, 6), (6,), (6,), groups=(4, 6))
case(
    "layer_norm_two_dims",
    lambda x, w: F.layer_norm(x, (5, 6), w),
    (4, 5, 6),
    (5, 6),
    groups=(4, 5, 6),
)
case("layer_norm_plain", lambda x: F.layer_norm(x, [6]), (4, 6), groups=(4, 6))
case("rms_norm", lambda x, w: F.rms_norm(x, (6,), w), (4, 6), (6,), groups=(4, 6))
case("rms_norm_two_dims", lambda x: F.rms_norm(x, (5, 6), eps=0.1), (4, 5, 6), groups=(4, 5, 6))
case(
    "group_norm",
    lambda x, w, b: F.group_norm(x, 3, w, b),
    (4, 12, 5),
    (12,),
    (12,),
    groups=(3, 4, 4, 5),
)
case("group_norm_one", lambda x: F.group_norm(x, 1), (4, 6, 5), groups=(4, 5, 6))
case("group_norm_each", lambda x, w: F.group_norm(x, 6, w), (4, 6, 5), (6,), groups=(4, 5, 6))
case("group_norm_flat", lambda x: F.group_norm(x, 2), (4, 6), groups=(2, 3, 4))
case(
    "native_layer_norm",
    lambda x, w: torch.native_layer_norm(x, [6], w, None, 1e-5),
    (4, 6),
    (6,),
    groups=(4, 6),
)
case("norm_except_dim", lambda x: torch.norm_except_dim(x, 2, 1), (4, 6), groups=(4, 6))
case("normalize", lambda x: F.normalize(x, dim=1), (4, 6, 5), groups=(4, 5, 6))
case("normalize_1", lambda x: F.normalize(x, p=1, dim=-1), (4, 6), groups=(4, 6))
case("local_response_norm", lambda x: F.local_response_norm(x, 2), (4, 6, 5, 3), groups=(4,))

# Reductions ---------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": torch.sum, "nansum": torch.nansum, "mean": torch.mean, "nanmean": torch.nanmean,
    "var": torch.var, "std": torch.std, "var_mean": torch.var_mean, "std_mean": torch.std_mean,
    "amax": torch.amax, "amin": torch.amin, "logsumexp": torch.logsumexp,
}  # fmt: skip
for name, function in REDUCTIONS.items():
    case(f"{name}_last", lambda x, f=function: f(x, dim=-1), (3, 4, 6), groups=(3, 4, 6))
    case(
        f"{name}_keepdim",
        lambda x, f=function: f(x, dim=1, keepdim=True),
        (3, 4, 6),
        groups=(3, 4, 6),
    )
    case(f"{name}_two", lambda x, f=function: f(x, dim=(-1, 0)), (3, 4, 6), groups=(3, 4, 6))
for name in ("sum", "mean", "var", "std", "amax", "prod", "any", "all", "median", "max", "min"):
    case(f"{name}_all", lambda x, n=name: getattr(torch, n)(x), (4, 6), groups=(4, 6))
case("sum_no_dims", lambda x: x.sum(dim=()), (4, 6), groups=(4, 6))
case("amax_no_dims", lambda x: x.amax(dim=()), (4, 6), groups=(4, 6))
case("sum_cast", lambda x: x.float().sum(0, dtype=torch.float64), (4, 6), groups=(4, 6))
case("prod_dim", lambda x: x.prod(1), (4, 6), groups=(4, 6))
case("any_dim", lambda x: (x > 0).any(-1, keepdim=True), (4, 6), groups=(4, 6))
case("all_dims", lambda x: (x > 0).all((0, 2)), (3, 4, 6), groups=(3, 4, 6))
case("count_nonzero", lambda x: torch.count_nonzero(x.relu(), 1), (4, 6), groups=(4, 6))
case("max_dim", lambda x: x.max(-1), (4, 6), groups=(4,))
case("min_dim", lambda x: x.min(0, keepdim=True), (4, 6), groups=(6,))
case("median_dim", lambda x: x.median(-1), (4, 6), groups=(4,))
case("aminmax", lambda x: tuple(torch.aminmax(x, dim=0)), (4, 6), groups=(6,))
case("argmax", lambda x: x.argmax(1), (4, 6), groups=(4,))
case("argmin_keepdim", lambda x: x.argmin(-2, keepdim=True), (4, 6), groups=(6,))
case("argmax_all", lambda x: x.argmax(), (4, 6), groups=())
for order in (0, 1, 2, 3, float("inf"), float("-inf"), -1):
    case(
        f"vector_norm_{order}",
        lambda x, p=order: torch.linalg.vector_norm(x, p, dim=1),
        (4, 6),
        groups=(4, 6),
    )
    case(
        f"norm_{order}",
        lambda x, p=order: torch.norm(x, p, dim=-1, keepdim=True),
        (4, 6),
        groups=(4, 6),
    )
case("norm_all", torch.norm, (4, 6), groups=(4, 6))
case("norm_fro", lambda x: torch.norm(x, dim=(1, 2)), (3, 4, 6), groups=(3, 4, 6))
ALONG = "softmax log_softmax cumsum cumprod logcumsumexp argsort sort cummax cummin".split()
for name in ALONG:
    case(name, lambda x, n=name: getattr(torch, n)(x, dim=-2), (3, 4, 6), groups=(3, 6))
case("softmin", lambda x: F.softmin(x, 0), (4, 6), groups=(6,))
case("flip", lambda x: x.flip(0, -1), (3, 4, 6), groups=(4,))
case("diff", lambda x: x.diff(dim=0), (4, 6), groups=(6,))
case("diff_prepend", lambda x, y: torch.diff(x, dim=1, prepend=y), (4, 6), (4, 2), groups=(4,))
case("topk", lambda x: tuple(x.topk(3)), (4, 6), groups=(4,))
case("topk_first", lambda x: tuple(x.topk(2, dim=0, largest=False)), (4, 6), groups=(6,))
case("kthvalue", lambda x: tuple(x.kthvalue(2, dim=0)), (4, 6), groups=(6,))
case("kthvalue_keepdim", lambda x: tuple(x.kthvalue(2, -1, True)), (4, 6), groups=(4,))
case("mode", lambda x: tuple(x.mode(1)), (4, 6), groups=(4,))
case("in_place", lambda x: (x + 0).cumsum_(1), (4, 6), groups=(4,))
case("sort_stable", lambda x: tuple(torch.sort(x, stable=True, dim=0)), (4, 6), groups=(6,))
case("var_biased", lambda x: x.var(0, correction=0) + x.std(0, keepdim=True), (4, 6), groups=(4, 6))
case("diff_twice", lambda x: x.diff(n=2), (4, 6), groups=(4,))
case("raw_softmax", lambda x: torch.ops.aten._softmax(x, 1, False), (4, 6), groups=(4,))
case("mode_first", lambda x: tuple(x.mode(0)), (4, 6), groups=(6,))
case("tril", lambda x: x.tril() + x.triu(1), (3, 4, 6), groups=(3,))
case("cosine_similarity", F.cosine_similarity, (4, 6), (4, 6), groups=(4, 6))
case(
    "cosine_similarity_last",
    lambda x, y: F.cosine_similarity(x, y, dim=-1),
    (3, 1, 6),
    (4, 6),
    groups=(3, 4, 6),
)
case("cosine_similarity_column", F.cosine_similarity, (4, 6), (4, 1), groups=(4,))

# Views --------------------------------------------------------------------------------------------

VIEWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "merge": ((4, 6), (24,), (4, 6)),
    "merge_two": ((2, 3, 4), (6, 4), (2, 3, 4)),
    "split": ((24,), (2, 3, 4), (2, 3, 4)),
    "infer": ((24,), (2, -1, 4), (2, 3, 4)),
    "regroup": ((4, 6), (2, 12), (2, 2, 6)),
    "regroup_inner": ((4, 6), (8, 3), (2, 3, 4)),
    "ones": ((4, 6), (1, 4, 1, 6, 1), (4, 6)),
    "no_ones": ((4, 1, 6), (4, 6), (4, 6)),
    "scalar": ((1, 1), (), ()),
    "same": ((4, 6), (4, 6), (4, 6)),
    "coprime": ((4, 6), (6, 4), (2, 2)),
    "coprime_inner": ((5, 4, 6), (5, 6, 4), (2, 2, 5)),
}
for name, (before, after, free) in VIEWS.items():
    case(f"view_{name}", lambda x, s=after: x.view(s), before, groups=free)
    case(
        f"reshape_{name}",
        lambda x, s=after: x.mT.reshape(s) if x.dim() > 5 else x.reshape(s),
        before,
        groups=free,
    )
case("reshape_transposed", lambda x: x.mT.reshape(3, 2, 2, 2), (4, 6), groups=(2, 2, 2, 3))
case("view_follows_shape", lambda x: x.view(2, x.shape[0] // 2, -1), (4, 6), groups=(2, 2, 6))
case(
    "view_twice",
    lambda x, y: x.view(2, 12) + y.view(4, 6).view(2, 12),
    (24,),
    (24,),
    groups=(2, 2, 6),
)
case("view_as", lambda x, y: x.view_as(y) * y, (24,), (4, 6), groups=(4, 6))
case("reshape_as", lambda x, y: x.reshape_as(y), (2, 12), (4, 6), groups=(2, 2, 6))
case("flatten", torch.flatten, (2, 3, 4), groups=(2, 3, 4))
case("flatten_tail", lambda x: x.flatten(1), (2, 3, 4), groups=(2, 3, 4))
case("flatten_middle", lambda x: x.flatten(-3, -2), (2, 3, 4, 5), groups=(2, 3, 4, 5))
case("flatten_scalar", lambda x: x.flatten(), (), groups=())
case("ravel", torch.ravel, (4, 6), groups=(4, 6))
case("unflatten", lambda x: x.unflatten(1, (2, 3)), (4, 6), groups=(2, 3, 4))
case("unflatten_inferred", lambda x: x.unflatten(-2, (-1, 2)), (3, 8, 5), groups=(2, 3, 4, 5))
case("permute", lambda x: x.permute(2, 0, 1), (3, 4, 6), groups=(3, 4, 6))
case("permute_negative", lambda x: x.permute(-1, 0, -2), (3, 4, 6), groups=(3, 4, 6))
case("transpose", lambda x: x.transpose(0, -1), (3, 4, 6), groups=(3, 4, 6))
case("swaps", lambda x: x.swapaxes(-1, 1).swapdims(0, 1), (3, 4, 6), groups=(3, 4, 6))
case("transposed", lambda x: (x.t(), x.T, x.mT, x.adjoint()), (4, 6), groups=(4, 6))
case("transposed_batches", lambda x: x.mT + x.adjoint(), (3, 4, 6), groups=(3, 4, 6))
case("mH", lambda x: x.mH, (3, 4, 6), groups=(3, 4, 6))
case("t_vector", lambda x: x.t(), (6,), groups=(6,))
case("movedim", lambda x: x.movedim(0, -1), (3, 4, 6), groups=(3, 4, 6))
case("movedim_two", lambda x: torch.moveaxis(x, (0, -1), (1, 0)), (3, 4, 5, 6), groups=(3, 4, 5, 6))
case("squeeze", torch.squeeze, (1, 4, 1, 6), groups=(4, 6))
case("squeeze_dim", lambda x: x.squeeze(-2).squeeze(1), (1, 4, 1, 6), groups=(4, 6))
case("squeeze_dims", lambda x: x.squeeze((0, -1)), (1, 4, 6, 1), groups=(4, 6))
case("unsqueeze", lambda x: x.unsqueeze(-1).unsqueeze(0), (4, 6), groups=(4, 6))
case("new_axis", lambda x: x[:, None, ..., None], (4, 6), groups=(4, 6))
case("expand", lambda x, y: x.expand(4, -1) * y, (1, 6), (4, 6), groups=(4, 6))
case(
    "expand_copy",
    lambda x, y: torch.ops.aten.expand_copy(x, (4, 6)) * y,
    (1, 6),
    (4, 6),
    groups=(4, 6),
)
case("expand_new", lambda x, y: x.expand(3, 4, 6) * y, (6,), (3, 4, 6), groups=(3, 4, 6))
case("broadcast_to", lambda x, y: x.broadcast_to(4, 6) @ y, (4, 1), (6, 5), groups=(4, 5, 6))
case("expand_as", lambda x, y: x.expand_as(y), (4, 1), (3, 4, 6), groups=(3, 4, 6))
case("broadcast_tensors", torch.broadcast_tensors, (4, 1), (6,), groups=(4, 6))
case(
    "expand_then_view",
    lambda x, y: x[:, :, None].expand(4, 3, 2).reshape(4, 6) * y,
    (4, 3),
    (4, 6),
    groups=(2, 3, 4),
)
case("repeat", lambda x, y: x.repeat(2, 3) * y, (4, 6), (8, 18), groups=(2, 3, 4, 6))
case("repeat_new", lambda x, y: x.repeat(3, 1, 2) * y, (4, 6), (3, 4, 12), groups=(2, 3, 4, 6))
case("tile", lambda x, y: x.tile(2) * y, (4, 6), (4, 12), groups=(2, 4, 6))
case("tile_more", lambda x, y: torch.tile(x, (3, 1, 1)) * y, (4, 6), (3, 4, 6), groups=(3, 4, 6))
case(
    "repeat_interleave",
    lambda x, y: x.repeat_interleave(2, dim=-1) * y,
    (4, 6),
    (4, 12),
    groups=(2, 4, 6),
)
case(
    "repeat_interleave_flat",
    lambda x, y: x.repeat_interleave(2) * y,
    (4, 6),
    (48,),
    groups=(2, 4, 6),
)
case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 5), groups=(2, 3))
case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 6), groups=(2, 3))
case("pixel_shuffle_unbatched", lambda x: F.pixel_shuffle(x, 2), (12, 3, 5), groups=(3,))
case(
    "channel_shuffle",
    lambda x, y: F.channel_shuffle(x, 3) * y,
    (2, 12, 2, 5),
    (12, 1, 1),
    groups=(2, 2, 4, 5),
)
case("im2col", lambda x: F.unfold(x, (2, 3), padding=1), (2, 6, 4, 4), groups=(2, 6))
case("im2col_unbatched", lambda x: F.unfold(x, 2), (6, 4, 4), groups=(6,))
case("col2im", lambda x: F.fold(x, (4, 4), 2, stride=2), (2, 24, 4), groups=(2, 6))
case(
    "fold_unfold",
    lambda x, w: F.fold(F.unfold(x, 2) * w, (4, 4), 2),
    (2, 6, 4, 4),
    (24, 1),
    groups=(2, 6),
)
case("unfold", lambda x: x.unfold(1, 3, 2), (4, 7, 6), groups=(4, 6))
case("unfold_last", lambda x: x.unfold(-1, 2, 2), (4, 6), groups=(4,))

# Joining and cutting ------------------------------------------------------------------------------

case("cat", lambda x, y, z: torch.cat([x, y], 1) * z, (4, 2), (4, 3), (5,), groups=(2, 3, 4))
case("cat_negative", lambda x, y: torch.cat([x, y, x], -2), (4, 6), (3, 6), groups=(3, 4, 6))
case(
    "cat_empty",
    lambda x, y: torch.cat([torch.zeros(0, dtype=x.dtype), x, y]),
    (4, 6),
    (3, 6),
    groups=(3, 4, 6),
)
case("cat_itself", lambda x, y: torch.cat([x, x]) * y, (4, 6), (8, 1), groups=(4, 6))
case("stack", lambda x, y: torch.stack([x, y], -1), (4, 6), (4, 6), groups=(4, 6))
case("hstack", lambda x, y: torch.hstack([x, y]), (4, 6), (4, 5), groups=(4, 5, 6))
case("vstack", lambda x, y: torch.vstack([x, y]), (4, 6), (3, 6), groups=(3, 4, 6))
case("unbind", lambda x: x.unbind(1), (4, 3, 6), groups=(4, 6))
case("split", lambda x, w: [p @ w for p in x.split(2, 1)], (4, 6), (2, 5), groups=(2, 4, 5))
case("split_apart", lambda x: list(x.split(3, -1)), (4, 6), groups=(3, 3, 4))
case("split_uneven", lambda x: list(x.split(4)), (6, 5), groups=(5,))
case("split_sizes", lambda x: list(x.split([1, 2, 3], -1)), (4, 6), groups=(2, 3, 4))
case("split_with_sizes", lambda x: torch.split_with_sizes(x, [4, 2]), (6, 5), groups=(2, 4, 5))
case("chunk", lambda x: x.chunk(2, -1), (4, 6), groups=(3, 3, 4))
case("chunk_fewer", lambda x: x.chunk(4, 0), (6, 5), groups=(2, 2, 2, 5))
case("chunk_uneven", lambda x: x.chunk(3, 1), (4, 5), groups=(4,))
case("chunk_gate", lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), (4, 6), groups=(3, 4))
case("tensor_split", lambda x: x.tensor_split(2, 1), (4, 6), groups=(3, 3, 4))
case("tensor_split_uneven", lambda x: x.tensor_split(4, 1), (4, 6), groups=(4,))
case("narrow", lambda x: x.narrow(1, 2, 3), (4, 6), groups=(2, 3, 4))
case("narrow_negative", lambda x: x.narrow(-1, -4, 3), (4, 6), groups=(2, 3, 4))
case("select", lambda x: x.select(1, 2), (4, 6), groups=(2, 3, 4))
case("select_negative", lambda x: x[..., -3], (4, 6), groups=(2, 3, 4))
case("select_first", lambda x: x[0], (4, 6), groups=(3, 6))
case("select_last", lambda x: x[:, -1], (4, 6), groups=(4, 5))
case("select_scatter", lambda x, y: x.select_scatter(y, 1, 2), (4, 6), (4,), groups=(2, 3, 4))
case("slice_scatter", lambda x, y: x.slice_scatter(y, 1, 2, 5), (4, 6), (4, 3), groups=(2, 3, 4))
case(
    "slice_scatter_step", lambda x, y: x.slice_scatter(y, 1, 1, 6, 2), (4, 6), (4, 3), groups=(3, 4)
)

SLICES: dict[str, tuple[slice, tuple[int, ...]]] = {
    "head": (slice(None, 2), (2, 4, 4)),
    "tail": (slice(2, None), (2, 4, 4)),
    "last": (slice(-2, None), (2, 4, 4)),
    "but_last": (slice(None, -2), (2, 4, 4)),
    "middle": (slice(2, -2), (2, 2, 2, 4)),
    "middle_negative": (slice(-4, -2), (2, 2, 2, 4)),
    "past_the_end": (slice(2, 99), (2, 4, 4)),
    "before_the_start": (slice(-99, 4), (2, 4, 4)),
    "one": (slice(2, 3), (2, 3, 4)),
    "even": (slice(None, None, 2), (3, 4)),
    "odd": (slice(1, None, 2), (3, 4)),
    "odd_negative": (slice(-5, None, 2), (4,)),
    "even_bounded": (slice(0, 5, 2), (3, 4)),
    "even_bounded_negative": (slice(0, -1, 2), (3, 4)),
    "thirds": (slice(2, None, 3), (2, 4)),
    "uneven_step": (slice(None, None, 4), (4,)),
    "shifted_step": (slice(2, None, 2), (4,)),
}
for name, (bounds, free) in SLICES.items():
    case(f"slice_{name}", lambda x, s=bounds: x[:, s], (4, 6), groups=free)

case("pad", lambda x, y: F.pad(x, (1, 2)) * y, (4, 6), (9,), groups=(2, 4, 6))
case(
    "pad_two_dims",
    lambda x, y: F.pad(x, (0, 3, 2, 0), value=1.5) * y,
    (4, 6),
    (6, 9),
    groups=(2, 3, 4, 6),
)
case("pad_alone", lambda x: F.pad(x, (3, 3)), (4, 6), groups=(4, 6))
case("pad_negative", lambda x: F.pad(x, (-1, 2)), (4, 6), groups=(4,))
case("pad_nothing", lambda x: F.pad(x, (0, 0)), (4, 6), groups=(4, 6))
for mode in ("reflect", "replicate", "circular"):
    case(f"pad_{mode}", lambda x, m=mode: F.pad(x, (1, 1), mode=m), (2, 4, 6), groups=(2, 4))
    case(
        f"pad_{mode}_2d",
        lambda x, m=mode: F.pad(x, (1, 0, 0, 1), mode=m),
        (2, 4, 6, 6),
        groups=(2, 4),
    )
case("roll", lambda x, y: x.roll(2, 1) * y, (4, 6), (6,), groups=(2, 4, 4))
case("roll_negative", lambda x, y: x.roll(-2, -1) * y, (4, 6), (6,), groups=(2, 4, 4))
case("roll_two", lambda x: x.roll((1, -2), (0, 1)), (4, 6), groups=(2, 3, 4))
case("roll_past", lambda x: x.roll(8, 1), (4, 6), groups=(2, 4, 4))
case("roll_far_back", lambda x: x.roll(-10, 1), (4, 6), groups=(2, 4, 4))
case("roll_same_dim_twice", lambda x: x.roll((1, 2), (1, 1)), (4, 6), groups=(2, 3, 4))
case("roll_flat", lambda x: x.roll(2), (4, 6), groups=())
case("roll_full", lambda x: x.roll(6, 1), (4, 6), groups=(4, 6))
case("roll_onto_itself", lambda x: x * x.roll(2, 1), (4, 6), groups=(2, 4))

# Attention ----------------------------------------------------------------------------------------


def attend(**options: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    return call


QKV = ((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7))
case("sdpa", attend(), *QKV, groups=(2, 3, 6, 7))
case("sdpa_scale", attend(scale=0.3), *QKV, groups=(2, 3, 6, 7))
case("sdpa_causal", attend(is_causal=True), *QKV, groups=(2, 3, 6, 7))
case("sdpa_mask", attend(), *QKV, (4, 5), groups=(2, 3, 6, 7))
case("sdpa_mask_heads", attend(), *QKV, (3, 1, 5), groups=(2, 3, 6, 7))
case(
    "sdpa_mask_bool",
    attend(),
    *QKV,
    numbers(2, 2, 1, 4, 5) + numbers(2, 2, 1, 4, 5) < 2,
    groups=(2, 3, 6, 7),
)
case("sdpa_no_heads", attend(), (3, 4, 6), (3, 5, 6), (3, 5, 7), groups=(3, 6, 7))
case("sdpa_broadcast", attend(), (2, 3, 4, 6), (1, 3, 5, 6), (1, 1, 5, 7), groups=(2, 3, 6, 7))
GROUPED = ((2, 6, 4, 5), (2, 3, 7, 5), (2, 3, 7, 8))
case("sdpa_gqa", attend(enable_gqa=True), *GROUPED, groups=(2, 2, 3, 5, 8))
case("sdpa_gqa_mask", attend(enable_gqa=True), *GROUPED, (6, 4, 7), groups=(2, 2, 3, 5, 8))
case("sdpa_gqa_equal", attend(enable_gqa=True), *QKV, groups=(2, 3, 6, 7))
case(
    "sdpa_mqa",
    attend(enable_gqa=True),
    (2, 6, 4, 5),
    (2, 1, 7, 5),
    (2, 1, 7, 8),
    groups=(2, 5, 6, 8),
)

# Indexing -----------------------------------------------------------------------------------------

case("embedding", F.embedding, numbers(10, 3, 4), (10, 6), groups=(6,))
case("one_hot", lambda i, x: F.one_hot(i, 5) * x, numbers(5, 4), (4, 5), groups=(4,))
case("index", lambda x, i: x[i], (4, 6), ROWS, groups=(6,))
case("index_column", lambda x, i: x[:, i], (4, 6), COLUMNS, groups=(4,))
case("index_two", lambda x, i, j: x[i, j], (4, 6, 5), ROWS, COLUMNS[:1], groups=(5,))
case("index_apart", lambda x, i, j: x[i, :, j], (4, 6, 5), ROWS[:2], COLUMNS % 4, groups=(6,))
case("index_middle", lambda x, i: x[:, i], (4, 6, 5), COLUMNS[:, None], groups=(4, 5))
case("index_ellipsis", lambda x, i: x[..., i], (3, 4, 6), COLUMNS, groups=(3, 4))
case("index_scaled", lambda x, i, y: x[i] * y, (4, 6), ROWS, (3, 1), groups=(3, 6))
case("index_select", lambda x, i: x.index_select(-1, i), (4, 6), COLUMNS, groups=(4,))
case("gather", lambda x, i: x.gather(1, i), (4, 6), numbers(6, 4, 3), groups=(4,))
case("gather_smaller", lambda x, i: x.gather(0, i), (4, 6), numbers(4, 3, 2), groups=())
case("gather_negative", lambda x, i: x.gather(-2, i), (4, 6), numbers(4, 4, 6), groups=(6,))
case("take_along_dim", lambda x, i: x.take_along_dim(i, 1), (4, 6), numbers(6, 4, 3), groups=(4,))
case(
    "take_along_broadcast", lambda x, i: x.take_along_dim(i, 1), (4, 6), numbers(6, 1, 3), groups=()
)
case("take_along_all", lambda x, i: x.take_along_dim(i), (4, 6), numbers(24, 3), groups=())
SOURCE = (4, 3)
AT = torch.tensor([[0, 2, 5], [1, 3, 4], [5, 4, 3], [2, 0, 1]])
case("scatter", lambda x, i, y: x.scatter(1, i, y), (4, 6), AT, SOURCE, groups=(4,))
case("scatter_value", lambda x, i: x.scatter(-1, i, 2.0), (4, 6), AT, groups=(4,))
case("scatter_fewer", lambda x, i, y: x.scatter(1, i, y), (4, 6), AT[:2], SOURCE, groups=())
case("scatter_inplace", lambda x, i, y: (x + 0).scatter_(1, i, y), (4, 6), AT, SOURCE, groups=(4,))
case("scatter_add", lambda x, i, y: x.scatter_add(1, i, y), (4, 6), AT, SOURCE, groups=(4,))
case(
    "scatter_reduce",
    lambda x, i, y: x.scatter_reduce(1, i, y, "amax"),
    (4, 6),
    AT,
    SOURCE,
    groups=(4,),
)
case("index_add", lambda x, i, y: x.index_add(1, i, y), (4, 6), COLUMNS, (4, 2), groups=(4,))
case("index_add_vector", lambda x, i, y: x.index_add(0, i, y), (6,), COLUMNS, (2,), groups=())
case("index_copy", lambda x, i, y: x.index_copy(0, i, y), (4, 6), ROWS, (3, 6), groups=(6,))
case("index_fill", lambda x, i: x.index_fill(1, i, -1.0), (4, 6), COLUMNS, groups=(4,))
case(
    "index_reduce",
    lambda x, i, y: x.index_reduce(1, i, y, "prod"),
    (4, 6),
    COLUMNS,
    (4, 2),
    groups=(4,),
)
case("index_put", lambda x, i, y: x.index_put((i,), y), (4, 6), ROWS, (3, 6), groups=(6,))
case("index_put_row", lambda x, i, y: x.index_put((i,), y), (4, 6), ROWS, (6,), groups=(6,))
case("index_put_scalar", lambda x, i, y: x.index_put((i,), y), (4, 6), ROWS, (), groups=(6,))
case(
    "index_put_accumulate",
    lambda x, i, y: x.index_put((i,), y, accumulate=True),
    (4, 6),
    ROWS % 2,
    (3, 6),
    groups=(6,),
)
case(
    "index_put_both",
    lambda x, i, j, y: x.index_put((i, j), y),
    (4, 6, 5),
    ROWS[:2],
    COLUMNS,
    (2, 5),
    groups=(5,),
)
case(
    "index_put_mask",
    lambda x, m: x.index_put((m,), torch.tensor(2.0, dtype=x.dtype)),
    (4, 6),
    MASK,
    groups=(),
)


def assign(x: Tensor, i: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, i] = y
    return x


case("assign_columns", assign, (4, 6), COLUMNS, (4, 2), groups=(4,))
case("assign_columns_all_alike", assign, (4, 6), COLUMNS, (2,), groups=(4,))
case(
    "constants",
    lambda x: torch.zeros(4, 6, dtype=x.dtype) + x + x.new_full((6,), 2.0),
    (4, 6),
    groups=(4, 6),
)
case("constant_matmul", lambda x: x @ torch.ones(6, 5, dtype=x.dtype), (4, 6), groups=(4, 6))
case(
    "random_constants",
    lambda x: torch.rand(6, dtype=x.dtype) * x + x.new_empty(4, 1),
    (4, 6),
    groups=(4, 6),
    noise=True,
)
case("arange", lambda x: torch.arange(6) * x, (4, 6), groups=(4,))
case("arange_bounds", lambda x: torch.arange(4, 0, -1)[:, None] * x, (4, 6), groups=(6,))
case("linspace", lambda x: torch.linspace(0, 1, 6) * x, (4, 6), groups=(4,))
case("eye", lambda x: torch.eye(6, dtype=x.dtype) @ x, (6, 5), groups=(5,))
case("scalar_tensor", lambda x: torch.scalar_tensor(2.0) * x, (4, 6), groups=(4, 6))
case("meshgrid", lambda a, b: torch.meshgrid(a, b, indexing="ij"), (4,), (6,), groups=())
case(
    "meshgrid_xy",
    lambda a, b, c: torch.meshgrid(a, b, indexing="xy")[0] * c,
    (4,),
    (6,),
    (3, 1, 1),
    groups=(3,),
)

# Recurrent layers ---------------------------------------------------------------------------------


def cells(gates: int, inputs: int, hidden: int, layers: int, both: bool) -> list[tuple[int, ...]]:
    """Shapes of the parameters of all layers and directions."""
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        width = inputs if not layer else hidden * (1 + both)
        cell = [(gates * hidden, width), (gates * hidden, hidden), (gates * hidden,)]
        shapes += [*cell, cell[-1]] * (1 + both)
    return shapes


def recurrent(
    function: Callable[..., Any], states: int, layers: int, both: bool, first: bool
) -> Callable[..., Any]:
    def call(x: Tensor, *rest: Tensor) -> Any:
        given, params = rest[:states], list(rest[states:])
        hx = given[0] if function is not torch.lstm else given
        return function(x, hx, params, True, layers, 0.0, False, both, first)

    return call


KINDS = [(torch.lstm, 4, 2), (torch.gru, 3, 1), (torch.rnn_tanh, 1, 1), (torch.rnn_relu, 1, 1)]
STACKS = [(1, False, False), (1, True, True), (2, False, True), (2, True, False)]
for function, gates, states in KINDS:
    for layers, both, first in STACKS:
        name = function.__name__ + f"_{layers}" + both * "_both" + first * "_batch_first"
        given = [(layers * (1 + both), 3, 5)] * states
        shape = (3, 4, 6) if first else (4, 3, 6)
        params = cells(gates, 6, 5, layers, both)
        run = recurrent(function, states, layers, both, first)
        case(name, run, shape, *given, *params, groups=(3, 5, 6))


class Recurrent(nn.Module):
    """A recurrent layer whose input is a parameter and whose initial states are zeros."""

    def __init__(self, kind: str, final: bool = False, **options: Any) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(3, 4, 6, dtype=torch.float64))
        self.layer = getattr(nn, kind)(6, 5, batch_first=True, dtype=torch.float64, **options)
        self.final = final

    def forward(self, x: Tensor) -> Tensor:
        made, states = self.layer(self.x)
        leaves = [made, *(pytree.tree_leaves(states) if self.final else ())]
        return x + sum(leaf.sum() for leaf in leaves)


# Tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_slicing_before_equals_slicing_after(name: str) -> None:
    coupling = judge(CASES[name])
    assert not coupling.unknown
    assert sizes_of(coupling) == CASES[name].groups


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_modules(kind: str, options: dict[str, Any], final: bool) -> None:
    model = Recurrent(kind, final, **options).eval()
    coupling = infer_coupling(capture(model, BATCH))
    cells = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert sizes_of(coupling) == (3, *[5] * (1 if final else cells), 6)
    assert len({g.tied for g in coupling.groups if g.size == 5}) == 1
    for keep in kept_sets(coupling):
        check(model, keep)


def test_a_projected_recurrent_layer_is_frozen_with_a_reason() -> None:
    coupling = infer_coupling(capture(Recurrent("LSTM", proj_size=2).eval(), BATCH))
    assert not coupling.groups
    reasons = {f.reason for f in coupling.frozen if f.tensor == "layer.weight_hr_l0"}
    assert reasons == {"a recurrent layer with proj_size"}


class Normed(nn.Module):
    """Weight-normed layers in a chain: the middle one loses inputs and outputs."""

    def __init__(self, dim: int | None, convolution: bool) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.up = nn.Conv1d(6, 8, 1)
        middle = nn.ConvTranspose1d(8, 7, 3) if convolution else nn.Conv1d(8, 7, 1)
        self.middle = norm(middle, dim=dim)
        self.down = nn.Conv1d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_weight_norm_keeps_the_weights_that_stay(dim: int | None, convolution: bool) -> None:
    model = Normed(dim, convolution).eval()
    x = torch.randn(2, 6, 4)
    analysis = depcut.analyze(model, x)
    assert {group.size for group in analysis.groups} == {7, 8}
    keep = {g.name: [0, 2, 3, 6] if g.size == 7 else [1, 2, 5] for g in analysis.groups}
    slim = analysis.plan_keeping(keep).apply(model)
    dense = model.middle.weight.detach()
    kept = [[1, 2, 5], [0, 2, 3, 6]] if convolution else [[0, 2, 3, 6], [1, 2, 5]]
    torch.testing.assert_close(slim.middle.weight.detach(), dense[kept[0]][:, kept[1]])


WITH_LITERALS = """
view_split view_regroup reshape_merge unflatten expand_new broadcast_to repeat tile
repeat_interleave split_sizes split_with_sizes narrow select select_negative slice_head
slice_tail slice_last slice_middle slice_middle_negative pad roll roll_negative conv2d_grouped
conv2d_depthwise conv_transpose2d_grouped group_norm_flat layer_norm rms_norm_two_dims constants
slice_scatter select_scatter
""".split()


@pytest.mark.parametrize("name", WITH_LITERALS)
def test_the_harness_catches_a_missing_literal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "literal", lambda self, *args, **kwargs: None)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        judge(CASES[name])


# The table ----------------------------------------------------------------------------------------


def exists(target: str) -> bool:
    namespace, operator, *overload = target.split(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    return packet is not None and (not overload or overload[0] in packet.overloads())


def test_every_rule_is_for_an_operator_that_exists() -> None:
    targets = [t for t in RULES if t.startswith("aten.")]
    assert not [t for t in targets if not exists(t)]
    # Operators that other libraries register when they are imported.
    others = {"pointwise", "transformers.grouped_mm_fallback"}
    assert {t for t in RULES if t not in targets} <= others


def test_a_second_rule_for_an_operator_is_refused() -> None:
    before = dict(RULES)
    with pytest.raises(RuleError) as caught:
        depcut.rule("aten.linear")(lambda op: None)
    assert str(caught.value) == (
        "aten.linear has a rule already: depcut.ops.contraction.linear\n"
        "  to do: change that rule, or register the new one for another overload"
    )
    assert before == RULES


def test_a_rule_of_an_overload_goes_before_that_of_the_name() -> None:
    assert rule_for(torch.ops.aten.split.sizes) is RULES["aten.split.sizes"]
    assert rule_for(torch.ops.aten.linear.default) is RULES["aten.linear"]
    assert rule_for(torch.ops.aten.sin.default) is RULES["pointwise"]
    assert rule_for(torch.ops.aten.cdist.default) is None


# Operators of the user ----------------------------------------------------------------------------


@torch.library.custom_op("depcut_test::first", mutates_args=())
def first(x: Tensor, count: int, factor: float) -> Tensor:
    """The first columns, times a factor."""
    return x[:, :count] * factor


@first.register_fake
def _(x: Tensor, count: int, factor: float) -> Tensor:
    return x.new_empty(x.shape[0], count)


FIRST = "depcut_test.first"


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    unregister(FIRST)


def first_columns(op: Op) -> Output:
    rows, columns = op.dims("x")
    head, _ = axes.pieces(columns, [op.arg("count"), columns.size - op.arg("count")])
    op.literal("count", term=head)
    return (rows, head)


class UsesFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.middle = nn.Linear(9, 7)
        self.down = nn.Linear(4, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = first(self.middle(torch.relu(self.up(x))), 4, 0.5)
        return self.out(torch.relu(self.down(x)))


OWN = Case(lambda x: first(x, 4, 0.5), ((3, 7),), (3, 3, 4))


def test_a_rule_for_ones_own_operator(registered: None) -> None:
    assert depcut.rule(FIRST)(first_columns) is first_columns
    assert sizes_of(judge(OWN)) == OWN.groups


def test_a_model_with_ones_own_operator_shrinks(registered: None) -> None:
    depcut.rule(FIRST)(first_columns)
    model, x = UsesFirst().eval(), torch.randn(2, 6)
    analysis = depcut.analyze(model, x)
    assert {group.size for group in analysis.groups} == {3, 4, 8, 9}
    slim = analysis.plan(0.5, align=1).apply(model)
    assert slim(x).shape == (2, 5)


def as_if_pointwise(op: Op) -> Output:
    return op.dims("x")


def without_literal(op: Op) -> Output:
    rows, columns = op.dims("x")
    return (rows, axes.pieces(columns, [4, 3])[0])


def wrong_columns(op: Op) -> Output:
    rows, columns = op.dims("x")
    tail = axes.pieces(columns, [3, 4])[1]
    op.literal("count", term=tail)
    return (rows, tail)


@pytest.mark.parametrize("wrong", [as_if_pointwise, without_literal, wrong_columns])
def test_the_harness_catches_a_wrong_rule(wrong: Any, registered: None) -> None:
    depcut.rule(FIRST)(wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        judge(OWN)


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    analysis = depcut.analyze(UsesFirst().eval(), torch.randn(2, 6))
    assert {group.size for group in analysis.groups} == {8, 9}
    stuck = {(f.tensor, f.dim): f.reason for f in analysis.frozen}
    why = "no rule for depcut_test.first.default"
    assert stuck["middle.weight", 0] == stuck["middle.bias", 0] == stuck["down.weight", 1] == why
    assert ("middle.weight", 1) not in stuck
    assert "depcut_test.first.default at first" in str(analysis)


def test_a_rule_that_raises_or_does_not_fit_freezes_what_it_touches(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEPCUT_STRICT")
    model, x = UsesFirst().eval(), torch.randn(2, 6)
    depcut.rule(FIRST)(as_if_pointwise)
    reason = "the rule for depcut_test.first.default does not fit its result"
    assert reason in {f.reason for f in depcut.analyze(model, x).frozen}
    unregister(FIRST)
    depcut.rule(FIRST)(lambda op: 1 / 0)
    reasons = {f.reason for f in depcut.analyze(model, x).frozen}
    assert any("ZeroDivisionError" in why and FIRST in why for why in reasons)
