"""Narrowed `nn.MultiheadAttention`: every later call equals the dense one's with zeros inside."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_pairs import (
    CALLS,
    HEADS,
    KINDS,
    WIDTH,
    assert_alike,
    causal,
    drawn,
    inputs,
    padding,
    pair,
    seeded_net,
    shapes,
)
from selection import sampled, swept
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import depcut
from depcut.rewrite.attention import SlimMultiheadAttention

QUICK = ("self", "widths")

# Calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(list(KINDS), QUICK))
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
            assert_alike(both, result, both.dense(*dense, **keywords, **asked), weights, average)


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


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
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


@pytest.mark.parametrize("weights", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_dropout_in_training_only_and_its_probability_can_be_set(weights: bool) -> None:
    both = pair("self", dropout=0.4)
    slim = copy.deepcopy(both.slim)
    x = drawn(1, 4, len(both.widths[0])).expand(600, -1, -1)

    def out() -> Tensor:
        return slim(x, x, x, need_weights=weights)[0].detach()

    expected = out()
    assert torch.equal(out(), expected)
    slim.train()
    torch.manual_seed(0)
    dropped = out()
    assert not torch.allclose(dropped, expected, atol=1e-2)
    torch.testing.assert_close(dropped.mean(0), expected[0], rtol=0, atol=0.2)
    slim.dropout = 0.0
    torch.testing.assert_close(out(), expected)
    slim.dropout = 1.0
    torch.testing.assert_close(out(), slim.out_proj.bias.expand_as(expected))
    assert torch.equal(slim.eval() and out(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sampled(list(KINDS), QUICK))
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
        assert_alike(both, slim, dense, weights, average=False, **near)


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
    for run in (slim.__class__.__call__, functools.partial(checkpoint, use_reentrant=False)):
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


@pytest.mark.parametrize("name", swept(KINDS, 3))
def test_torch_compile(name: str) -> None:
    both, same = pair(name), KINDS[name]["same"] == "qkv"
    for called, make in CALLS.items():
        args, _ = both.inputs(*shapes(both.slim, 2, 7, 7), same=same)
        for weights in (False, True):
            torch.compiler.reset()
            compiled = torch.compile(both.slim, fullgraph=True, backend="aot_eager")
            keywords = {**make(2, 7, 7), "need_weights": weights}
            expected = both.slim(*args, **keywords)[0]
            torch.testing.assert_close(compiled(*args, **keywords)[0], expected, msg=called)


@pytest.mark.sweep
def test_onnx(tmp_path: Any) -> None:
    net = seeded_net(**KINDS["cross"])
    slim = depcut.shrink(net, 0.5, inputs())
    assert isinstance(slim.attention, SlimMultiheadAttention)
    depcut.export(slim, tmp_path / "slim.onnx", inputs())
