"""Narrowed `nn.MultiheadAttention`: every later call equals the dense one's with zeros inside.

The dense counterpart of a slim module holds the slim weights at the places that were kept, and
zeros elsewhere; its inputs are zero where the slim one has none.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import depcut
from depcut.errors import InputError
from depcut.rewrite.attention import SlimMultiheadAttention
from depcut.rewrite.generated import GeneratedModule

HEADS, SIZE = 4, 6
WIDTH = HEADS * SIZE

# Pairs of a slim module and the dense one with zeros ----------------------------------------------


class Around(nn.Module):
    """One attention between linear layers, so that its inputs' widths are free as well."""

    def __init__(self, same: str, kind: type[nn.MultiheadAttention], **options: Any) -> None:
        super().__init__()
        self.same = same
        widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
        self.stems = nn.ModuleList(nn.Linear(5, width) for width in widths)
        self.attention = kind(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = k = v = self.stems[0](x)
        if self.same != "qkv":
            k = v = self.stems[1](y)
        if self.same == "":
            v = self.stems[2](y)
        return self.head(self.attention(q, k, v, need_weights=False)[0])


KINDS: dict[str, dict[str, Any]] = {
    "self": {"same": "qkv", "batch_first": True},
    "sequence_first": {"same": "qkv", "bias": False},
    "cross": {"same": "kv", "batch_first": True, "add_bias_kv": True},
    "three": {"same": "", "add_zero_attn": True},
    "widths": {
        "same": "", "batch_first": True, "kdim": 10, "vdim": 14, "add_bias_kv": True,
        "add_zero_attn": True,
    },
}  # fmt: skip


def seeded_net(kind: type[nn.MultiheadAttention] = nn.MultiheadAttention, **options: Any) -> Around:
    torch.manual_seed(0)
    net = Around(kind=kind, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.6, 0.6)
    return net


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 7, 5, generator=generator), torch.randn(
        batch, 7, 5, generator=generator
    )


@dataclass(frozen=True)
class Pair:
    """A slim attention, the dense one with zeros, kept inputs of each, kept outputs and heads."""

    slim: nn.MultiheadAttention
    dense: nn.MultiheadAttention
    widths: tuple[np.ndarray, np.ndarray, np.ndarray]
    out: np.ndarray
    heads: list[int]

    def inputs(self, *shapes: tuple[int, ...], same: bool, dtype: Any = None) -> list[Any]:
        """Slim and dense (query, key, value) of given leading shapes; one tensor if `same`."""
        generator = torch.Generator().manual_seed(2)
        slim, dense = [], []
        for i, (shape, kept) in enumerate(zip(shapes, self.widths, strict=True)):
            if i and (same or (self.slim.in_proj_weight is not None and i == 2)):
                slim.append(slim[-1])
                dense.append(dense[-1])
                continue
            small = torch.randn(*shape, len(kept), generator=generator).to(dtype)
            full = torch.zeros(*shape, (WIDTH, self.dense.kdim, self.dense.vdim)[i]).to(dtype)
            full[..., kept] = small
            slim.append(small)
            dense.append(full)
        return [slim, dense]


def expanded(dense: nn.Module, slim: nn.Module, indices: dict[str, Any], prefix: str) -> nn.Module:
    """The dense module with the slim weights where they were kept, and zeros elsewhere."""
    full = copy.deepcopy(dense)
    small = dict(slim.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            kept = [
                np.arange(n) if i is None else i
                for n, i in zip(parameter.shape, indices[prefix + name], strict=True)
            ]
            parameter.zero_()
            parameter[np.ix_(*kept)] = small[name]
    return full


@functools.cache
def pair(name: str, dropout: float = 0.0) -> Pair:
    options = {**KINDS[name], "dropout": dropout}
    net = seeded_net(**options)
    analysis = depcut.analyze(net, inputs())
    rng = np.random.default_rng(3)
    counts = {HEADS: 3, SIZE: 4, WIDTH: 18, 10: 7, 14: 9}
    kept = {
        g.name: sorted(rng.permutation(g.size)[: counts[g.size]].tolist()) for g in analysis.groups
    }
    plan = analysis.plan_keeping(kept)
    slim = plan.apply(net)
    assert depcut.report(slim).generated == {}
    assert type(slim.attention) is SlimMultiheadAttention
    indices = plan.tensor_indices()
    dense = expanded(net.attention, slim.attention, indices, "attention.")
    packed = indices.get("attention.in_proj_weight")
    names = [f"attention.{part}_proj_weight" for part in "qkv"]
    columns = [packed[1]] * 3 if packed else [indices[n][1] for n in names]
    sizes = (WIDTH, net.attention.kdim, net.attention.vdim)
    columns = [np.arange(n) if c is None else c for n, c in zip(sizes, columns, strict=True)]
    out = indices["attention.out_proj.weight"][0]
    heads = list(slim.attention.kept_heads)
    assert slim.attention.num_heads == len(heads) == 3
    return Pair(slim.attention, dense, tuple(columns), out, heads)


# Calls --------------------------------------------------------------------------------------------


def causal(length: int, source: int) -> Tensor:
    return torch.ones(length, source).triu(1).bool()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def padding(batch: int, source: int) -> Tensor:
    left = source - torch.arange(batch)[:, None] % 3 - 1
    return torch.arange(source)[None] >= left.clamp_min(1)


def infinite(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


# Keyword arguments of a call, by batch, query and key lengths.
CALLS: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "plain": lambda _n, _l, _s: {},
    "padding": lambda n, _l, s: {"key_padding_mask": padding(n, s)},
    "padding_float": lambda n, _l, s: {"key_padding_mask": drawn(n, s)},
    "mask": lambda _n, l, s: {"attn_mask": causal(l, s)},
    "mask_float": lambda _n, l, s: {"attn_mask": drawn(l, s)},
    "mask_by_head": lambda n, l, s: {"attn_mask": drawn(n * HEADS, l, s)},
    "mask_by_head_bool": lambda n, l, s: {
        "attn_mask": (drawn(n * HEADS, l, s) > 0.5) & ~torch.eye(l, s).bool()
    },
    "causal_hint": lambda _n, l, s: {"attn_mask": causal(l, s), "is_causal": True},
    "causal_and_padding": lambda n, l, s: {
        "attn_mask": causal(l, s), "is_causal": True, "key_padding_mask": padding(n, s)
    },
    "both_float": lambda n, l, s: {
        "attn_mask": infinite(causal(l, s)), "key_padding_mask": infinite(padding(n, s))
    },
}  # fmt: skip


def shapes(module: nn.MultiheadAttention, batch: int, length: int, source: int) -> list[Any]:
    """Leading shapes of query, key and value; without a batch where that is 0."""
    if batch == 0:
        return [(length,), (source,), (source,)]
    order = (0, 1) if module.batch_first else (1, 0)
    return [tuple((batch, n)[i] for i in order) for n in (length, source, source)]


def compare(both: Pair, slim: Any, dense: Any, weights: bool, average: bool, **near: Any) -> None:
    near = near or {"rtol": 1e-4, "atol": 1e-5}
    (out, its), (full, all_of_them) = slim, dense
    torch.testing.assert_close(out, full[..., both.out], **near)
    assert (its is not None) == weights
    if its is not None:
        its_dense = all_of_them[..., both.heads, :, :]
        its_dense = its_dense.mean(-3) if average else its_dense
        torch.testing.assert_close(its, its_dense, **near)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("called", CALLS)
def test_a_later_call_with_any_masks_and_lengths(name: str, called: str) -> None:
    """All of these were None at capture; batch, lengths and weights differ from the capture's."""
    both, same = pair(name), KINDS[name]["same"] == "qkv"
    for batch, length, source in ((2, 7, 7), (3, 4, 4 if same else 9), (1, 1, 1), (0, 5, 5)):
        dims = shapes(both.slim, batch, length, source)
        slim, dense = both.inputs(*dims, same=same)
        keywords = CALLS[called](max(batch, 1), length, source)
        if batch == 0 and "key_padding_mask" in keywords:
            keywords["key_padding_mask"] = keywords["key_padding_mask"][0]
        for weights, average in ((False, True), (True, True), (True, False)):
            asked = {"need_weights": weights, "average_attn_weights": average}
            result = both.slim(*slim, **keywords, **asked)
            asked["average_attn_weights"] = False
            compare(both, result, both.dense(*dense, **keywords, **asked), weights, average)


def test_a_mask_by_head_may_be_that_of_the_heads_that_are_left() -> None:
    both = pair("self")
    (x, _, _), _ = both.inputs(*shapes(both.slim, 2, 7, 7), same=True)
    mask = drawn(2, HEADS, 7, 7)
    expected = both.slim(x, x, x, attn_mask=mask.flatten(0, 1))[0]
    of_kept = mask[:, both.heads].flatten(0, 1)
    assert torch.equal(both.slim(x, x, x, attn_mask=of_kept)[0], expected)
    assert not torch.allclose(both.slim(x, x, x, attn_mask=of_kept.flip(0))[0], expected)
    unbatched = both.slim(x[0], x[0], x[0], attn_mask=mask[0])[0]
    torch.testing.assert_close(unbatched, expected[0])


WRONG: dict[str, Callable[[Tensor], tuple[list[Tensor], dict[str, Any]]]] = {
    "width": lambda x: ([x[..., :-1]] * 3, {}),
    "rank": lambda x: ([x[None]] * 3, {}),
    "key_rank": lambda x: ([x, x[0], x[0]], {}),
    "key_and_value": lambda x: ([x, x, x[:, :-1]], {}),
    "batch": lambda x: ([x, x[:1], x[:1]], {}),
    "padding_batch": lambda x: ([x] * 3, {"key_padding_mask": padding(3, 7)}),
    "padding_length": lambda x: ([x] * 3, {"key_padding_mask": padding(2, 6)}),
    "padding_rank": lambda x: ([x] * 3, {"key_padding_mask": padding(2, 7)[0]}),
    "padding_type": lambda x: ([x] * 3, {"key_padding_mask": padding(2, 7).long()}),
    "mask_shape": lambda x: ([x] * 3, {"attn_mask": causal(6, 7)}),
    "mask_rank": lambda x: ([x] * 3, {"attn_mask": causal(7, 7)[0]}),
    "mask_heads": lambda x: ([x] * 3, {"attn_mask": drawn(5, 7, 7)}),
    "causal_without_mask": lambda x: ([x] * 3, {"is_causal": True}),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("weights", [False, True])
def test_wrong_arguments_are_refused_as_by_the_stock_class(wrong: str, weights: bool) -> None:
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    slim = SlimMultiheadAttention(WIDTH, HEADS, batch_first=True)
    errors = []
    for module in (stock, slim):
        args, keywords = WRONG[wrong](drawn(2, 7, WIDTH))
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            module(*args, **keywords, need_weights=weights)
        errors.append(caught.value)
    assert type(errors[1]) is type(errors[0])
    if wrong not in ("batch", "key_and_value"):  # these it prints in another order
        assert str(errors[1]) == str(errors[0])


OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"bias": False, "add_bias_kv": True},
    {"kdim": 10, "vdim": 14, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_at_the_stock_sizes_it_is_the_stock_class(options: dict[str, Any]) -> None:
    """Values, gradients, random numbers of dropout, and the drawing of parameters."""
    modules = []
    for kind in (nn.MultiheadAttention, SlimMultiheadAttention):
        torch.manual_seed(7)
        modules.append(kind(WIDTH, HEADS, dropout=0.3, **options))
    stock, slim = modules
    assert all(map(torch.equal, stock.parameters(), slim.parameters()))
    widths = (WIDTH, stock.kdim, stock.vdim)
    args = [drawn(5, 5, width) for width in widths]
    for weights in (False, True):
        grads = []
        for module in modules:
            torch.manual_seed(8)
            module.zero_grad()
            out, its = module(*args, need_weights=weights, attn_mask=causal(5, 5))
            (out.square().sum() + (0 if its is None else its.square().sum())).backward()
            grads.append([out, *(p.grad for p in module.parameters())])
        for ours, theirs in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Modes, precisions and copies ---------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_in_training_only_and_its_probability_can_be_set(weights: bool) -> None:
    both = pair("self", dropout=0.4)
    slim = copy.deepcopy(both.slim)
    x = drawn(1, 4, len(both.widths[0])).expand(4000, -1, -1)

    def out() -> Tensor:
        return slim(x, x, x, need_weights=weights)[0].detach()

    expected = out()
    assert torch.equal(out(), expected)
    slim.train()
    torch.manual_seed(0)
    dropped = out()
    assert not torch.allclose(dropped, expected, atol=1e-2)
    torch.testing.assert_close(dropped.mean(0), expected[0], rtol=0, atol=0.1)
    slim.dropout = 0.0
    torch.testing.assert_close(out(), expected)
    slim.dropout = 1.0
    torch.testing.assert_close(out(), slim.out_proj.bias.expand_as(expected))
    assert torch.equal(slim.eval() and out(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    both, same = pair(name), KINDS[name]["same"] == "qkv"
    modules = [copy.deepcopy(m).to(dtype) for m in (both.slim, both.dense)]
    given = both.inputs(*shapes(both.slim, 2, 7, 7), same=same, dtype=dtype)
    near = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    for weights in (False, True):
        keywords = {"key_padding_mask": padding(2, 7), "average_attn_weights": False}
        slim, dense = (
            m(*x, need_weights=weights, **keywords) for m, x in zip(modules, given, strict=True)
        )
        assert slim[0].dtype == dtype
        compare(both, slim, dense, weights, average=False, **near)


def test_autocast() -> None:
    both = pair("self")
    slim, dense = both.inputs(*shapes(both.slim, 2, 7, 7), same=True)
    for weights in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            made = both.slim(*slim, need_weights=weights, attn_mask=causal(7, 7))
            full = both.dense(*dense, need_weights=weights, attn_mask=causal(7, 7))
        assert made[0].dtype == full[0].dtype == torch.bfloat16
        torch.testing.assert_close(made[0], full[0][..., both.out], rtol=0.1, atol=0.1)


def test_another_device() -> None:
    both = pair("widths")
    slim = copy.deepcopy(both.slim).to("meta")
    args = [drawn(2, 7, len(kept)).to("meta") for kept in both.widths]
    out, weights = slim(*args, key_padding_mask=padding(2, 7).to("meta"))
    assert (out.shape, out.device.type) == ((2, 7, len(both.out)), "meta")
    assert weights is not None
    assert weights.shape == (2, 7, 9)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_and_files(way: str) -> None:
    both = pair("widths")
    slim = both.slim
    file = io.BytesIO()
    if way == "deepcopy":
        twin = copy.deepcopy(slim)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(slim))  # noqa: S301
    elif way == "save":
        torch.save(slim, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(slim)
        with torch.no_grad():
            [p.zero_() for p in twin.parameters()]
        twin.load_state_dict(slim.state_dict())
    assert list(twin.state_dict()) == list(both.dense.state_dict())
    assert type(twin) is SlimMultiheadAttention
    (args, _) = both.inputs(*shapes(slim, 2, 7, 7), same=False)
    assert torch.equal(twin(*args)[0], slim(*args)[0])
    assert not {p.data_ptr() for p in slim.parameters()} & {p.data_ptr() for p in twin.parameters()}


def test_gradient_checkpointing() -> None:
    slim = copy.deepcopy(pair("self").slim)
    x = drawn(2, 7, slim.embed_dim).requires_grad_()
    grads = []
    for run in (lambda f, *a: f(*a), functools.partial(checkpoint, use_reentrant=False)):
        slim.zero_grad()
        x.grad = None
        run(slim, x, x, x)[0].square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in slim.parameters())])
    assert all(map(torch.equal, *grads))


def test_export_with_masks_at_another_batch() -> None:
    slim = pair("self").slim
    x, mask = drawn(2, 7, slim.embed_dim), padding(2, 7)
    dims = {0: torch.export.Dim.AUTO}
    for weights in (False, True):
        keywords = {"key_padding_mask": mask, "need_weights": weights}
        program = torch.export.export(
            slim,
            (x, x, x),
            keywords,
            strict=False,
            dynamic_shapes={
                "query": dims, "key": dims, "value": dims, "key_padding_mask": dims,
                "need_weights": None,
            },
        )  # fmt: skip
        y = drawn(5, 7, slim.embed_dim)
        keywords["key_padding_mask"] = padding(5, 7)
        torch.testing.assert_close(
            program.module()(y, y, y, **keywords)[0], slim(y, y, y, **keywords)[0]
        )


@pytest.mark.sweep
@pytest.mark.parametrize("name", KINDS)
def test_torch_compile(name: str) -> None:
    both, same = pair(name), KINDS[name]["same"] == "qkv"
    compiled = torch.compile(copy.deepcopy(both.slim), fullgraph=True, backend="aot_eager")
    for called, make in CALLS.items():
        args, _ = both.inputs(*shapes(both.slim, 2, 7, 7), same=same)
        for weights in (False, True):
            keywords = {**make(2, 7, 7), "need_weights": weights}
            torch.testing.assert_close(
                compiled(*args, **keywords)[0], both.slim(*args, **keywords)[0], msg=called
            )


@pytest.mark.sweep
def test_onnx(tmp_path: Any) -> None:
    net = seeded_net(**KINDS["cross"])
    slim = depcut.shrink(net, 0.5, inputs())
    assert isinstance(slim.attention, SlimMultiheadAttention)
    depcut.export(slim, tmp_path / "slim.onnx", inputs())


# Nested tensors and torch's encoder ---------------------------------------------------------------


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
def test_nested_tensors() -> None:
    both = pair("self")
    lengths = (5, 2, 7)
    parts = [drawn(n, len(both.widths[0])) for n in lengths]
    full = [torch.zeros(n, WIDTH) for n in lengths]
    for whole, part in zip(full, parts, strict=True):
        whole[:, both.widths[0]] = part
    with torch.no_grad():
        for weights in (False, True):
            x, y = torch.nested.nested_tensor(parts), torch.nested.nested_tensor(full)
            made = both.slim(x, x, x, need_weights=weights, average_attn_weights=False)
            expected = both.dense(y, y, y, need_weights=weights, average_attn_weights=False)
            padded = expected[0].to_padded_tensor(0.0), expected[1]
            compare(both, (made[0].to_padded_tensor(0.0), made[1]), padded, weights, average=False)
    with pytest.raises(InputError, match="nested tensor"):
        both.slim(x, x, x, attn_mask=causal(7, 7))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 20, dropout=0.1, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        return self.encoder(x, **keywords)


@functools.cache
def encoders(norm_first: bool) -> tuple[nn.Module, nn.Module]:
    """Slim and dense encoder, the stream between the layers whole, since norms reduce it."""
    torch.manual_seed(0)
    net = Encoder(norm_first).eval()
    analysis = depcut.analyze(net, drawn(2, 7, WIDTH))
    counts = {HEADS: 3, SIZE: 4, 20: 13}
    rng = np.random.default_rng(4)
    kept = {
        g.name: sorted(rng.permutation(g.size)[: counts[g.size]].tolist()) for g in analysis.groups
    }
    plan = analysis.plan_keeping(kept)
    slim = plan.apply(net)
    assert depcut.report(slim).generated == {}
    return slim, expanded(net, slim, plan.tensor_indices(), "")


@NESTED
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_take_no_inference_path_that_is_wrong_for_them(norm_first: bool) -> None:
    slim, dense = encoders(norm_first)
    x = drawn(3, 7, WIDTH)
    ignored = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    for keywords in (
        {}, {"mask": causal(7, 7)}, {"src_key_padding_mask": ignored},
        {"mask": causal(7, 7), "src_key_padding_mask": ignored},
        {"mask": causal(7, 7), "is_causal": True},
    ):  # fmt: skip
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                made, full = slim(x, **keywords), dense(x, **keywords)
            torch.testing.assert_close(made, full, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        one = slim(x[0], mask=causal(7, 7))
    torch.testing.assert_close(one, slim(x, mask=causal(7, 7))[0], rtol=1e-4, atol=1e-5)


def test_a_dropped_in_encoder_trains_without_dropout_as_it_evaluates() -> None:
    slim = copy.deepcopy(encoders(False)[0])
    x = drawn(3, 7, WIDTH)
    expected = slim(x)
    slim.train()
    assert not torch.allclose(slim(x), expected)
    for module in slim.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(slim(x), expected)


# How modules are fitted ---------------------------------------------------------------------------


def narrowed(net: nn.Module, args: Any, counts: dict[int, int]) -> nn.Module:
    """Applies a plan that keeps the first units of the groups of these sizes."""
    analysis = depcut.analyze(net, args)
    kept = {g.name: list(range(counts[g.size])) for g in analysis.groups if g.size in counts}
    return analysis.plan_keeping(kept).apply(net)


def test_the_report_names_the_heads_and_their_sizes() -> None:
    slim = narrowed(seeded_net(**KINDS["self"]), inputs(), {HEADS: 1, SIZE: 4})
    report = depcut.report(slim)
    assert report.patched == {
        "attention": "4 heads of 6 -> 1 head of 4, a slim torch.nn.MultiheadAttention"
    }
    assert "patched attention: 4 heads of 6" in str(report)
    attention = slim.attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (1, 4, WIDTH)
    assert attention.softmax_scale == pytest.approx(SIZE**-0.5)
    assert attention.out_proj.in_features == 4


def test_values_may_have_another_size_than_queries_and_keys() -> None:
    net = seeded_net(**KINDS["widths"], bias=False)
    analysis = depcut.analyze(net, inputs())
    first, second = (g for g in analysis.groups if g.size == SIZE)
    slim = analysis.plan_keeping({first.name: [0, 1, 2, 5], second.name: [1, 3]}).apply(net)
    attention = slim.attention
    sizes = {attention.head_dim, attention.value_head_dim}
    assert sizes == {2, 4}
    assert attention.out_proj.in_features == HEADS * attention.value_head_dim
    assert "(values of " in depcut.report(slim).patched["attention"]


def test_the_stock_class_stays_where_it_fits() -> None:
    net = seeded_net(**KINDS["self"])
    slim = narrowed(net, inputs(), {HEADS: 2, WIDTH: 12})
    assert type(slim.attention) is nn.MultiheadAttention
    assert (slim.attention.embed_dim, slim.attention.num_heads, slim.attention.kdim) == (12, 2, 12)
    assert depcut.report(slim).patched == depcut.report(slim).generated == {}
    slim(*inputs())
    for parameter in slim.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():  # torch's own inference path
        fast = slim(*inputs())
    slim.attention.train()
    torch.testing.assert_close(fast, slim(*inputs()))


@pytest.mark.parametrize("name", KINDS)
def test_a_slim_attention_shrinks_again(name: str) -> None:
    net = seeded_net(**KINDS[name])
    once = narrowed(net, inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    analysis = depcut.analyze(once, inputs())
    counts = {3: [0, 2], 4: [1, 3], 20: list(range(3, 19)), 10: list(range(8))}
    plan = analysis.plan_keeping({g.name: counts[g.size] for g in analysis.groups if g.size in counts})
    again = plan.apply(once)
    report = depcut.report(again)
    assert report.generated == {}
    assert report.patched["attention"].startswith("3 heads of 4 -> 2 heads of 2")
    attention = again.attention
    assert type(attention) is SlimMultiheadAttention
    assert (attention.num_heads, attention.kept_heads, attention.dense_heads) == (2, (0, 2), HEADS)
    assert attention.softmax_scale == pytest.approx(SIZE**-0.5)
    x, y = inputs(3)
    mask = drawn(3 * HEADS, 7, 7)
    parts = expanded(once.attention, attention, plan.tensor_indices(), "attention.")
    columns = plan.tensor_indices()
    first = "attention.in_proj_weight"
    columns = columns[first if first in columns else "attention.q_proj_weight"][1]
    q = drawn(3, 7, attention.embed_dim)
    assert len(columns) == attention.embed_dim
    del x, y, mask, parts, q


def test_a_slim_attention_shrinks_by_a_ratio() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), Encoder32(), nn.Linear(32, 4)).eval()
    once = depcut.shrink(net, 0.4, drawn(2, 5, 6), of="channels", align=1)
    again = depcut.shrink(once, 0.3, drawn(2, 5, 6), of="params", align=1)
    assert depcut.report(again).generated == {}
    assert any(isinstance(m, SlimMultiheadAttention) for m in again.modules())
    with torch.no_grad():
        fast = again(drawn(2, 5, 6))
    torch.testing.assert_close(fast, again(drawn(2, 5, 6)))


class Encoder32(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(32, 4, 48, batch_first=True)


class NamedAttention(nn.MultiheadAttention):
    """The user's own name for it, with a method."""

    def heads(self) -> int:
        return self.num_heads


class SelfAttention(NamedAttention):
    """Takes one tensor and returns one, by way of torch's forward."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor, **_: Any) -> Any:
        return super().forward(x, y, z, need_weights=False, attn_mask=self.mask(x))

    def mask(self, x: Tensor) -> Tensor | None:
        return causal(x.shape[1], x.shape[1]) if self.training else None


@pytest.mark.parametrize("kind", [NamedAttention, SelfAttention])
def test_subclasses_stay_what_they_are(kind: type[nn.MultiheadAttention]) -> None:
    options = KINDS["self"]
    net = seeded_net(kind=kind, **options)
    slim = narrowed(net, inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    plain = narrowed(seeded_net(**options), inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    assert depcut.report(slim).generated == {}
    assert isinstance(slim.attention, (kind, SlimMultiheadAttention))
    assert isinstance(slim.attention, kind)
    assert slim.attention.heads() == 3
    assert kind.__name__ in repr(slim)
    assert type(net.attention) is kind
    assert torch.equal(slim(*inputs()), plain(*inputs()))
    copies = [copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))]  # noqa: S301
    for twin in copies:
        assert type(twin.attention) is type(slim.attention)
        assert torch.equal(twin(*inputs()), slim(*inputs()))
        changed = twin.train()(*inputs())
        assert torch.equal(changed, slim(*inputs())) == (kind is NamedAttention)
        twin.eval()
    again = narrowed(copies[1], inputs(), {3: 2, 4: 2})
    assert depcut.report(again).generated == {}
    assert isinstance(again.attention, kind)
    assert again.attention.heads() == 2


class OwnForward(nn.MultiheadAttention):
    """Attention by hand in a subclass, whose literals are its own."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor, **_: Any) -> Any:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q, k, v = nn.functional.linear(x, weight, bias).chunk(3, -1)
        split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
        out = nn.functional.scaled_dot_product_attention(*split)
        return self.out_proj(out.transpose(1, 2).flatten(2)), y is z


def test_a_forward_of_ones_own_is_not_replaced() -> None:
    net = seeded_net(kind=OwnForward, **KINDS["self"])
    slim = narrowed(net, inputs(), {HEADS: 2})
    assert not isinstance(slim.attention, SlimMultiheadAttention)
    full = expanded_net(net, slim, {HEADS: 2})
    torch.testing.assert_close(slim(*inputs()), full(*inputs()), rtol=1e-4, atol=1e-5)


def expanded_net(net: nn.Module, slim: nn.Module, counts: dict[int, int]) -> nn.Module:
    analysis = depcut.analyze(net, inputs())
    kept = {g.name: list(range(counts[g.size])) for g in analysis.groups if g.size in counts}
    return expanded(net, slim, analysis.plan_keeping(kept).tensor_indices(), "")


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("name", ["self", "widths"])
def test_parametrizations_and_hooks_survive(name: str) -> None:
    net, calls = seeded_net(**KINDS[name]), []
    parameter = "in_proj_weight" if name == "self" else "v_proj_weight"
    nn.utils.parametrize.register_parametrization(net.attention, parameter, Halved())
    nn.utils.parametrize.register_parametrization(net.attention.out_proj, "weight", Halved())
    net.attention.register_forward_pre_hook(lambda m, _: calls.append(m))
    dense_class = type(net.attention)
    slim = narrowed(net, inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    assert depcut.report(slim).generated == {}
    assert isinstance(slim.attention, SlimMultiheadAttention)
    assert type(net.attention) is dense_class
    calls.clear()
    expected = slim(*inputs())
    assert calls == [slim.attention]
    nn.utils.parametrize.remove_parametrizations(slim.attention, parameter)
    nn.utils.parametrize.remove_parametrizations(slim.attention.out_proj, "weight")
    assert type(slim.attention) is SlimMultiheadAttention
    torch.testing.assert_close(slim(*inputs()), expected)
    net(*inputs())


class CalledTwice(nn.Module):
    """One attention, called as self-attention and then across."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.alias = self.attention

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.stem(x)
        q = q + self.attention(q, q, q)[0]
        k = self.stem(y)
        return self.alias(q, k, k, need_weights=False)[0]


def test_a_module_that_is_called_twice_under_two_names() -> None:
    torch.manual_seed(0)
    net = CalledTwice().eval()
    slim = narrowed(net, inputs(), {HEADS: 3, SIZE: 4})
    assert depcut.report(slim).generated == {}
    assert list(depcut.report(slim).patched) == ["attention"]
    assert slim.alias is slim.attention


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_whole_transformer_is_not_generated(norm_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.Transformer(WIDTH, HEADS, 1, 1, 20, batch_first=True, norm_first=norm_first).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.net, self.head = nn.Linear(5, WIDTH), net, nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.net(self.stem(x), self.stem(y)))

    slim = depcut.shrink(Model().eval(), 0.5, inputs(), of="channels", align=1)
    assert depcut.report(slim).generated == {}
    assert slim.net.d_model == slim.stem.out_features < WIDTH
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    x, y = (slim.stem(t) for t in inputs())
    assert slim.net(x, y, tgt_mask=mask, tgt_is_causal=True).shape == y.shape


def built(kind: str, width: int, norm_first: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    options: Any = {"batch_first": True, "norm_first": norm_first}
    x, y = drawn(2, 7, 10), drawn(2, 5, 10)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(width, 8, 2 * width, **options)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        return nn.Sequential(nn.Linear(10, width), encoder, nn.Linear(width, 3)), (x,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(10, width), nn.Linear(width, 3)
            if kind == "decoder":
                layer = nn.TransformerDecoderLayer(width, 8, 2 * width, **options)
                self.inner: nn.Module = nn.TransformerDecoder(layer, 2)
            else:
                self.inner = nn.Transformer(width, 8, 1, 1, 2 * width, **options)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.inner(self.stem(x), self.stem(y)))

    return Model(), (x, y)


@pytest.mark.sweep
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_nothing_is_generated_for_transformers(kind: str, norm_first: bool, width: int) -> None:
    net, args = built(kind, width, norm_first)
    analysis = depcut.analyze(net.eval(), args)
    for of in ("macs", "params", "channels"):
        for ratio in (0.3, 0.5, 0.7):
            slim = analysis.plan(ratio, of=of).apply(net)
            assert not any(isinstance(m, GeneratedModule) for m in slim.modules())


@pytest.mark.sweep
def test_nothing_is_generated_for_the_vision_transformer(zoo_libraries: None) -> None:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.vit_b_16(weights=None).eval()
    analysis = depcut.analyze(net, torch.randn(1, 3, 224, 224))
    for ratio in (0.3, 0.5):
        slim = analysis.plan(ratio).apply(net)
        assert depcut.report(slim).generated == {}
