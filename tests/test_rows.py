"""Other units in each row of an outer axis: heads, groups of a convolution; and refusals.

The oracle knows nothing of depcut but the terms. A choice row by row must be a relabelling: where
the kept units of every row are moved to the front of the dense model's own tensors, element by
element, the dense model computes what it did, and cutting the same units off all rows of that model
gives, bit for bit, what the plan gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from nets import NETS, Head, attend, conv, image, integers, normal, seeded, sequence
from oracle import (
    all_tensors,
    assert_close,
    assert_untouched,
    by_row,
    check_use,
    outputs,
    reads,
    snapshot,
)
from selection import analysis_of, sampled
from torch import Tensor, nn

import depcut
from depcut.allocate.choose import best_units
from depcut.axes import Axis, Concat, Product, Term
from depcut.coupling.groups import Group
from depcut.errors import PlanError
from depcut.scores import score
from depcut.scores.rows import unit_sums

Digits = list[tuple[Axis, int]]


# Plans --------------------------------------------------------------------------------------------


def with_rows(analysis: Any) -> dict[str, str]:
    """The group that is the outer axis of each group that has one."""
    names = {g.axis: g.name for g in analysis.groups}
    return {g.name: names.get(g.row_axis, "output") for g in analysis.groups if g.row_axis}


def sizes(analysis: Any) -> list[tuple[int, int]]:
    """(size, rows) of each group that may choose row by row."""
    return sorted((g.size, g.rows) for g in analysis.groups if g.row_axis)


# The oracle ---------------------------------------------------------------------------------------


def digits(term: Term, index: int) -> Digits:
    """The index of every axis that one index of a term stands for."""
    if isinstance(term, Axis):
        return [(term, index)]
    if isinstance(term, Concat):
        for part in term.parts:
            if index < part.size:
                return digits(part, index)
            index -= part.size
    assert isinstance(term, Product)
    out: Digits = []
    for factor in reversed(term.factors):
        index, digit = divmod(index, factor.size)
        out = digits(factor, digit) + out
    return out


def moved(term: Term, index: int, new: Callable[[Axis, int], int]) -> int:
    """The index of a term in which every axis has another index."""
    if isinstance(term, Axis):
        return new(term, index)
    if isinstance(term, Concat):
        start = 0
        for part in term.parts:
            if index < start + part.size:
                return start + moved(part, index - start, new)
            start += part.size
    assert isinstance(term, Product)
    out, rest = 0, index
    for i, factor in enumerate(term.factors):
        size = int(np.prod([f.size for f in term.factors[i + 1 :]]))
        digit, rest = divmod(rest, size)
        out = out * factor.size + moved(factor, digit, new)
    return out


def row_of(outer: Axis, dim: int, places: list[Digits]) -> int:
    """The row that an element is in: in the dimension itself, or in the only other one with it."""
    own = [i for axis, i in places[dim] if axis is outer]
    others = [i for j, d in enumerate(places) if j != dim for axis, i in d if axis is outer]
    [row] = own or others
    return row


def elements(tensor: Tensor, dims: tuple[Term, ...]) -> Iterator[tuple[Any, list[Digits]]]:
    table = [[digits(term, i) for i in range(term.size)] for term in dims]
    for at in itertools.product(*map(range, tensor.shape)):
        yield at, [table[d][i] for d, i in enumerate(at)]


@torch.no_grad()
def relabelled(analysis: Any, model: nn.Module, keep: dict[str, Any]) -> nn.Module:
    """The dense model with the kept units of every row at the front."""
    model = deepcopy(model)
    order = {
        g.axis: (g.row_axis, [[*row, *sorted({*range(g.size)} - {*row})] for row in keep[g.name]])
        for g in analysis.groups
        if g.row_axis is not None and g.name in keep
    }
    done: set[int] = set()
    for name, tensor in all_tensors(model).items():
        dims = analysis.coupling.dims.get(name)
        leaves = {a for t in dims or () for i in range(t.size) for a, _ in digits(t, i)}
        if id(tensor) in done or not leaves & {*order}:
            continue
        done.add(id(tensor))
        dense = tensor.detach().clone()
        for at, places in elements(dense, dims):
            source = []
            for dim, (term, index) in enumerate(zip(dims, at, strict=True)):

                def new(axis: Axis, i: int, dim: int = dim, places: Any = places) -> int:
                    if axis not in order:
                        return i
                    outer, rows = order[axis]
                    return rows[row_of(outer, dim, places)][i]

                source.append(moved(term, index, new))
            tensor[at] = dense[tuple(source)]
    return model


def check_rows(model: nn.Module, make: Any, seeds: Any = (0,), tolerance: float = 1e-5) -> Any:
    """Compare plans row by row with the relabelled model, cut alike in all rows."""
    before = snapshot(model)
    analysis = depcut.analyze(model, make(2))
    assert with_rows(analysis)
    for seed in seeds:
        keep = by_row(analysis, np.random.default_rng(seed))
        slim = analysis.plan_keeping(keep).apply(model)
        twin = relabelled(analysis, model, keep)
        assert_close(outputs(twin, make(3)), outputs(model, make(3)), tolerance, keep)
        front = {
            n: list(range(len(k[0]))) if isinstance(k[0], list) else k for n, k in keep.items()
        }
        other = depcut.analyze(twin, make(2)).plan_keeping(front).apply(twin)
        expected = all_tensors(other)
        for name, tensor in all_tensors(slim).items():
            torch.testing.assert_close(
                tensor.detach(),
                expected[name].detach(),
                rtol=1e-6,
                atol=1e-7,
                msg=name,
            )
        for batch in (2, 3):
            assert_close(outputs(slim, make(batch)), outputs(other, make(batch)), tolerance, keep)
        if seed == seeds[0]:
            check_use(slim, model, make)
    assert_untouched(model, before)
    return analysis


@torch.no_grad()
def zeroed(analysis: Any, model: nn.Module, keep: dict[str, Any]) -> nn.Module:
    """The dense model with zeros where removed units are read.

    What no parameter reads (queries and keys, which read each other) is zeroed where it is made.
    """
    model, tensors = deepcopy(model), None
    tensors = all_tensors(model)
    for group in analysis.groups:
        if group.name not in keep:
            continue
        kept = keep[group.name]
        for member in reads(group) or group.members:
            dims = analysis.coupling.dims[member.tensor]
            tensor = tensors[member.tensor]
            for at, places in elements(tensor, dims):
                for axis, i in places[member.dim]:
                    if axis is group.axis:
                        row = row_of(group.row_axis, member.dim, places) if group.row_axis else 0
                        if i not in (kept[row] if group.row_axis else kept):
                            tensor[at] = 0.0
    return model


# Nets ---------------------------------------------------------------------------------------------

ROWS = {
    "attention_fused": [(4, 3)],
    "attention_chunked": [(4, 3), (4, 3)],
    "attention_separate": [(4, 3), (5, 3)],
    "attention_typed_heads": [(4, 3), (4, 3)],
    "attention_width_over_heads": [(5, 2)],
    "attention_gqa_expand": [(3, 2), (4, 2), (4, 2)],
    "attention_gqa_repeat": [(3, 2), (4, 2), (4, 2)],
    "attention_gqa_sdpa": [(3, 2), (4, 2), (4, 2)],
    "attention_einsum": [(4, 3), (5, 3)],
    "attention_native": [(5, 2)],
    "attention_native_cross": [(5, 2), (5, 2)],
    "attention_rotary_halves": [(4, 2)],
    "attention_rotary_interleaved": [(4, 2)],
    "attention_after_flatten": [(4, 3), (5, 3)],
    "vision_transformer": [(4, 3)],
    "window_attention": [(5, 3)],
    "causal_decoder": [(4, 3), (4, 3)],
    "transformer_decoder": [(6, 2), (6, 2)],
    "transformer_encoder": [(6, 2), (6, 2)],
    "grouped": [(4, 3), (6, 3)],
    "grouped_bottleneck": [(3, 4), (3, 4)],
    "depthwise_multiplier": [(2, 6)],
    "group_norm": [(4, 3)],
    "transposed_grouped": [(4, 3)],
}


@pytest.mark.parametrize("name", sampled(ROWS.keys(), list(ROWS)[::4]))
def test_rows_of_heads_and_groups(name: str) -> None:
    net = NETS[name]
    analysis = check_rows(net.build(), net.inputs, tolerance=net.tolerance)
    assert sizes(analysis) == ROWS[name]


@pytest.mark.parametrize("name", ["attention_separate", "attention_gqa_sdpa", "attention_einsum"])
def test_rows_of_attention_against_zeros(name: str) -> None:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    whole = {g.name for g in analysis.groups if g.row_axis is None}
    for seed in range(3):
        keep = by_row(analysis, np.random.default_rng(seed))
        keep = {n: k for n, k in keep.items() if n not in whole}
        slim = analysis.plan_keeping(keep).apply(model)
        masked = zeroed(analysis, model, keep)
        for batch in (2, 3):
            made, expected = outputs(slim, net.inputs(batch)), outputs(masked, net.inputs(batch))
            assert_close(made, expected, 1e-5, keep)


@pytest.mark.parametrize("name", ["grouped", "grouped_bottleneck", "depthwise_multiplier"])
def test_rows_of_convolutions_against_zeros(name: str) -> None:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    for seed in range(3):
        keep = by_row(analysis, np.random.default_rng(seed))
        slim = analysis.plan_keeping(keep).apply(model)
        masked = zeroed(analysis, model, keep)
        for batch in (2, 3):
            made, expected = outputs(slim, net.inputs(batch)), outputs(masked, net.inputs(batch))
            assert_close(made, expected, 1e-5, keep)


class NormedGroups(nn.Module):
    """Grouped convolutions with a group norm, a gate and pooling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = conv(3, 12), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.norm, self.second = nn.GroupNorm(3, 12), nn.Conv2d(12, 18, 3, groups=3)
        self.squeeze, self.excite = nn.Conv2d(18, 5, 1), nn.Conv2d(5, 18, 1)
        self.last, self.head = conv(18, 7, 1), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.first(self.stem(x))).relu(), 2)
        x = self.second(x)
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.last(x * gate))


class GroupedStream(nn.Module):
    """A residual stream in groups: in-channels and out-channels of one weight are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = conv(3, 12), nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.norm, self.b = nn.GroupNorm(4, 12), nn.Conv2d(12, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        return self.head(x + self.b(self.norm(x)))


class HeadNorm(nn.Module):
    """Attention whose queries and keys are normalised, with scales of each head or of all."""

    def __init__(self, shared: bool, statistics: str = "own") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 15)
        shape = (4,) if shared else (3, 1, 4)
        self.scale = nn.Parameter(torch.rand(shape) + 0.5)
        self.out, self.statistics = nn.Linear(15, 5), statistics

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        dim = {"own": -1, "heads": 1}[self.statistics]
        q, k = ((t - t.mean(dim, keepdim=True)) * self.scale for t in (q, k))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2)).mean(1)


class ReturnsWeights(nn.Module):
    """The heads are an output; what is in them is not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 15)
        self.out = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (3, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class TwoDimensions(nn.Module):
    """Parameters in which heads and what is in them are dimensions of their own, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 5, 4))
        self.scale = nn.Parameter(torch.randn(5, 4))
        self.last = nn.Parameter(torch.randn(4, 7, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bi,ihd->bhd", x, self.first) * self.scale
        return torch.einsum("bdh,doh->bo", x.relu().transpose(1, 2), self.last)


EXTRA: dict[str, tuple[Callable[[], nn.Module], Any, list[tuple[int, int]]]] = {
    "normed_groups": (NormedGroups, image(), [(4, 3), (4, 3), (6, 3)]),
    "grouped_stream": (GroupedStream, image(), [(3, 4)]),
    "own_scales": (lambda: HeadNorm(False), sequence(), [(4, 3), (5, 3)]),
    "returns_weights": (ReturnsWeights, sequence(), [(4, 3), (5, 3)]),
    "two_dimensions": (TwoDimensions, lambda b: normal(b, 6), [(4, 5)]),
}


@pytest.mark.parametrize("name", sampled(EXTRA.keys(), list(EXTRA)[::3]))
def test_rows_of_other_structures(name: str) -> None:
    build, make, expected = EXTRA[name]
    analysis = check_rows(seeded(build, 3), make)
    assert sizes(analysis) == expected


# Public architectures -----------------------------------------------------------------------------

TINY = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20}
IMAGE = {"image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": 30, "max_position_embeddings": 16}


def public(kind: str, options: dict[str, Any]) -> nn.Module:
    model_class = getattr(zoo.libraries()["transformers"], kind)
    config = model_class.config_class(**options)
    config.use_cache = False
    return seeded(lambda: model_class(config), 0)


def words(batch: int) -> dict[str, Tensor]:
    return {"input_ids": integers(25, batch, 5) + 5}


PUBLIC = {
    "vit": (
        "ViTForImageClassification",
        {**TINY, **IMAGE, "num_attention_heads": 3},
        lambda batch: {"pixel_values": normal(batch, 3, 8, 8)},
        [(8, 3)] * 4,
    ),
    "bert": (
        "BertForSequenceClassification",
        {**TINY, **TEXT, "num_attention_heads": 3},
        words,
        [(8, 3)] * 4,
    ),
    # Queries and keys are turned by the angles of all heads; query heads are rows of key heads.
    "llama": (
        "LlamaForCausalLM",
        {**TINY, **TEXT, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
        words,
        [(3, 2), (3, 2), (4, 2), (4, 2)],
    ),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", sampled(PUBLIC.keys(), ["llama"]))
def test_rows_of_public_architectures(name: str) -> None:
    pytest.importorskip("transformers")
    kind, options, make, expected = PUBLIC[name]
    analysis = check_rows(public(kind, options), make)
    assert sizes(analysis) == expected
    if name == "llama":
        turned = {g.name for g in analysis.groups if g.size == 2 and "q_proj" in g.name}
        assert not turned & {*with_rows(analysis)}


# Refusals -----------------------------------------------------------------------------------------


def group(analysis: Any, tensor: str, size: int) -> Group:
    return next(
        g for g in analysis.groups if g.size == size and tensor in {m.tensor for m in g.members}
    )


@pytest.mark.parametrize("name", ["attention_rotary_halves", "attention_rotary_interleaved"])
def test_angles_of_all_heads_bind_queries_and_keys(name: str) -> None:
    analysis = depcut.analyze(NETS[name].build(), NETS[name].inputs(2))
    halves = group(analysis, "attention.q.weight", 3)
    assert halves.row_axis is None
    assert "without 'attention.q[0]'" in halves.alone


def test_a_scale_of_all_heads_binds_them() -> None:
    analysis = depcut.analyze(seeded(lambda: HeadNorm(True), 0), sequence()(2))
    inside = group(analysis, "q.weight", 4)
    assert inside.row_axis is None
    assert inside.alone == "no other axis goes with it in scale"
    assert group(analysis, "v.weight", 5).row_axis is not None


def test_a_mean_over_heads_binds_them() -> None:
    analysis = depcut.analyze(seeded(lambda: HeadNorm(False, "heads"), 0), sequence()(2))
    inside = group(analysis, "q.weight", 4)
    assert inside.row_axis is None
    assert "holds it without 'scale'" in inside.alone  # the heads, which are named after it, too
    assert "mean" in inside.alone


class MixedHeads(nn.Module):
    """A linear layer over the heads, position by position within them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(6, 12), nn.Linear(3, 3), nn.Linear(12, 5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).unflatten(-1, (3, 4))
        if self.how == "linear":
            x = x + self.mix(x.transpose(-2, -1)).transpose(-2, -1)
        elif self.how == "norm":
            y = x.transpose(-2, -1)
            x = nn.functional.layer_norm(y, y.shape[-1:]).transpose(-2, -1)
        elif self.how == "gram":
            x = x + (x @ x.transpose(-2, -1)).sum(-1, keepdim=True)
        elif self.how == "softmax":
            x = x.softmax(-2)
        elif self.how == "flip":
            x = x.flip(-2)
        elif self.how == "cumsum":
            x = x.cumsum(-2)
        elif self.how == "roll":
            x = x.roll(1, -2)
        elif self.how == "maximum":
            x = x - x.amax(-2, keepdim=True)
        return self.down(x.relu().flatten(-2))


@pytest.mark.parametrize(
    "how", ["linear", "norm", "gram", "softmax", "flip", "cumsum", "roll", "maximum"]
)
def test_what_mixes_the_rows_binds_them(how: str) -> None:
    model = seeded(lambda: MixedHeads(how), 1)
    analysis = depcut.analyze(model, normal(2, 6))
    assert {g.size for g in analysis.groups} >= {4}
    for found in analysis.groups:
        if found.size == 4:
            assert found.row_axis is None
            assert found.alone


def test_without_mixing_the_rows_are_free() -> None:
    analysis = check_rows(seeded(lambda: MixedHeads("not at all"), 1), lambda b: normal(b, 6))
    assert sizes(analysis) == [(4, 3)]


@pytest.mark.parametrize(
    "name", ["channel_shuffle", "channel_shuffle_grouped", "channel_shuffle_in_a_row", "lstm"]
)
def test_shuffled_channels_and_gates_have_no_rows(name: str) -> None:
    analysis = depcut.analyze(NETS[name].build(), NETS[name].inputs(2))
    assert not with_rows(analysis)


def test_every_group_says_why_it_has_no_outer_axis() -> None:
    for name in ("plain", "dense_block", "attention_fused", "lstm", "grouped"):
        analysis = depcut.analyze(NETS[name].build(), NETS[name].inputs(2))
        assert all(bool(g.alone) == (g.row_axis is None) for g in analysis.groups)
        assert all(g.rows == (g.row_axis.size if g.row_axis else 1) for g in analysis.groups)


# Plans as files and their mistakes ----------------------------------------------------------------


def fused() -> tuple[Any, nn.Module, Any]:
    net = NETS["attention_fused"]
    model = net.build()
    return depcut.analyze(model, net.inputs(2)), model, net.inputs


def test_a_plan_by_row_is_saved_loaded_and_applied(tmp_path: Any) -> None:
    analysis, model, make = fused()
    plan = analysis.plan_keeping({"attention.qkv[1]": [[3, 0], [1, 2], [2, 3]], "embed": [0, 4, 7]})
    assert plan.kept["attention.qkv[1]"].tolist() == [[0, 3], [1, 2], [2, 3]]
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert loaded.kept["attention.qkv[1]"].tolist() == [[0, 3], [1, 2], [2, 3]]
    assert loaded.digest == plan.digest
    assert "attention.qkv[1]: 2 of 4 in each of 3 rows" in str(plan)
    assert "embed: 3 of 10\n" in str(plan) + "\n"
    first, second = plan.apply(model), loaded.apply(model)
    assert torch.equal(outputs(first, make(2))[0], outputs(second, make(2))[0])
    assert loaded.bind(model).macs == plan.macs < analysis.macs


def test_indices_of_one_dimension_stay_a_list() -> None:
    analysis, _, _ = fused()
    rows = [[0, 3], [1, 2], [2, 3]]
    indices = analysis.plan_keeping({"attention.qkv[1]": rows}).tensor_indices()
    flat = [4 * h + i for h, row in enumerate(rows) for i in row]
    assert indices["attention.proj.weight"][1].tolist() == flat
    assert indices["attention.qkv.weight"][0].tolist() == [
        12 * part + i for part in range(3) for i in flat
    ]
    assert indices["attention.proj.weight"][0] is None


def test_indices_that_vary_along_another_dimension_are_an_open_mesh() -> None:
    net = NETS["grouped"]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    inner = group(analysis, "1.0.weight", 4)
    rows = [[0, 1], [1, 3], [2, 3]]
    plan = analysis.plan_keeping({inner.name: rows})
    outs, ins, *kernel = plan.tensor_indices()["1.0.weight"]
    assert outs is None
    assert kernel == [None, None]
    assert ins.shape == (18, 2, 1, 1)
    assert ins[:, :, 0, 0].tolist() == [rows[o // 6] for o in range(18)]
    weight = model.get_parameter("1.0.weight").detach()
    cut = np.take_along_axis(weight.numpy(), ins, axis=1)
    made = plan.apply(model).get_parameter("1.0.weight").detach().numpy()
    assert np.array_equal(cut, made)


def test_a_removed_row_decides_nothing() -> None:
    analysis, model, make = fused()
    heads = {"attention.qkv[0]": [0, 2]}
    first, second = (
        analysis.plan_keeping({**heads, "attention.qkv[1]": [[0, 1], middle, [2, 3]]}).apply(model)
        for middle in ([0, 1], [1, 3])
    )
    assert torch.equal(outputs(first, make(2))[0], outputs(second, make(2))[0])


def test_the_optimizer_follows_row_by_row() -> None:
    net = NETS["grouped"]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(net.inputs(2)).sum().backward()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    keep = by_row(analysis, np.random.default_rng(0))
    plan = analysis.plan_keeping(keep)
    slim = plan.apply(model, optimizer=optimizer)
    indices = plan.tensor_indices()
    assert moments.keys() == {name for name, _ in slim.named_parameters()}
    for name, parameter in slim.named_parameters():
        expected = moments[name].numpy()
        mesh = [
            np.arange(n) if k is None else k
            for n, k in zip(expected.shape, indices[name], strict=True)
        ]
        shapes = [
            k if k.ndim > 1 else k.reshape([-1 if i == d else 1 for i in range(len(mesh))])
            for d, k in enumerate(mesh)
        ]
        assert np.array_equal(optimizer.state[parameter]["exp_avg"], expected[tuple(shapes)])


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([[0, 1], [1], [2, 3]], "row 0 keeps 2 units and row 1 keeps 1"),
        ([[0, 1], [1, 2]], "2 rows of units are kept, and there are 3 rows: the units of"),
        ([[0, 4], [1, 2], [2, 3]], "4 is out of range"),
        ([[0, 1], [2, 2], [2, 3]], "2 occurs 2 times"),
        ([[], [], []], "none are kept"),
        ([[0.5, 1], [1, 2], [0, 1]], "not integers"),
        ([[[0]], [[1]], [[2]]], "no flat list, nor one for each row"),
    ],
)
def test_impossible_rows_are_refused(kept: Any, words: str) -> None:
    analysis, _, _ = fused()
    with pytest.raises(PlanError, match=words) as caught:
        analysis.plan_keeping({"attention.qkv[1]": kept})
    assert "attention.qkv[1]" in str(caught.value)
    assert caught.value.remedy


def test_rows_of_a_group_without_an_outer_axis_say_what_forbids_them() -> None:
    analysis = depcut.analyze(seeded(lambda: HeadNorm(True), 0), sequence()(2))
    inside = group(analysis, "q.weight", 4)
    with pytest.raises(PlanError) as caught:
        analysis.plan_keeping({inside.name: [[0, 1], [1, 2], [0, 3]]})
    message = str(caught.value)
    assert "no other axis goes with it in scale" in message
    assert inside.name in message
    assert "one list" in message


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled([*ROWS, *EXTRA], [*list(ROWS)[1::2], *EXTRA]))
def test_sums_of_rows_against_loops(name: str) -> None:
    if name in NETS:
        analysis = analysis_of(name)
    else:
        analysis = depcut.analyze(seeded(EXTRA[name][0], 3), EXTRA[name][1](2))
    model = analysis.model
    assert analysis.groups
    for found in analysis.groups:
        for tensor, dims in analysis.coupling.dims.items():
            if tensor not in analysis.program.parameters:
                continue
            values = model.get_parameter(tensor).detach().double().square()
            expected = np.zeros((found.rows, found.size))
            for at, places in elements(values, dims):
                for dim, place in enumerate(places):
                    for axis, i in place:
                        if axis is found.axis:
                            row = row_of(found.row_axis, dim, places) if found.row_axis else 0
                            expected[row, i] += float(values[at])
            sums = unit_sums(values, dims, found)
            assert sums.shape == (expected.shape if found.row_axis else (found.size,))
            np.testing.assert_allclose(np.atleast_2d(sums), expected, rtol=1e-9, atol=1e-12)


def test_the_best_of_each_row_stay() -> None:
    values = np.array([[1.0, 5.0, 3.0], [9.0, 8.0, 10.0]])
    assert best_units(values, 2).tolist() == [[1, 2], [0, 2]]
    assert best_units(values[0], 2).tolist() == [1, 2]
    assert best_units(np.ones((2, 3)), 2).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("name", ["attention_separate", "grouped", "attention_gqa_sdpa"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_plans_keep_the_best_units_of_each_row(name: str, allocation: str) -> None:
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    scores = score("magnitude", analysis.coupling, model, 0)
    plan = analysis.plan(0.5, of="params", align=1, allocation=allocation)
    seen = 0
    for found, values in zip(analysis.groups, scores, strict=True):
        assert values.shape == ((found.rows, found.size) if found.row_axis else (found.size,))
        if found.row_axis and found.name in plan.kept:
            kept, seen = plan.kept[found.name], seen + 1
            for row, units in zip(values, kept, strict=True):
                gone = np.setdiff1d(np.arange(found.size), units)
                assert row[units].min() >= row[gone].max()
    assert seen
    plan.apply(model)


def test_a_criterion_may_score_units_alike_in_all_rows() -> None:
    analysis, model, _ = fused()
    plan = analysis.plan(0.5, score=lambda c, m, s: [np.arange(g.size) for g in c.groups], align=1)
    assert all(kept.ndim == 1 for kept in plan.kept.values())
    plan.apply(model)


def test_rows_lose_less_of_the_score_than_one_choice_for_all() -> None:
    analysis, model, _ = fused()
    inside = next(g for g in analysis.groups if g.row_axis)
    values = score("l1", analysis.coupling, model, 0)[inside.index]
    apart = values[np.arange(inside.rows)[:, None], best_units(values, 2)].sum()
    together = values[:, best_units(values.mean(axis=0), 2)].sum()
    assert apart > together
