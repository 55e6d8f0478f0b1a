"""What a narrowed `nn.MultiheadAttention` becomes: its class, its attributes, the report."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from attention_pairs import (
    CALLS,
    HEADS,
    KINDS,
    SIZE,
    WIDTH,
    assert_alike,
    causal,
    drawn,
    expanded,
    inputs,
    narrowed,
    paired,
    seeded_net,
    shapes,
)
from selection import sampled
from torch import Tensor, nn

import depcut
from depcut.rewrite.attention import SlimMultiheadAttention


def test_the_report_names_the_heads_and_their_sizes() -> None:
    slim, _ = narrowed(seeded_net(**KINDS["self"]), inputs(), {HEADS: 1, SIZE: 4})
    report = depcut.report(slim)
    assert report.patched == {
        "attention": "4 heads of 6 -> 1 head of 4, a slim torch.nn.MultiheadAttention"
    }
    assert "patched: attention\n    4 heads of 6 -> 1 head of 4" in str(report)
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
    slim, _ = narrowed(net, inputs(), {HEADS: 2, WIDTH: 12})
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


@pytest.mark.parametrize("name", sampled(list(KINDS), ["widths"]))
def test_a_slim_attention_shrinks_again(name: str) -> None:
    once, _ = narrowed(seeded_net(**KINDS[name]), inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    rng = np.random.default_rng(0)
    again, indices = narrowed(once, inputs(), {3: 2, 4: 2, 20: 17, 10: 8}, rng)
    report = depcut.report(again)
    assert report.generated == {}
    assert report.patched["attention"].startswith("3 heads of 4 -> 2 heads of 2")
    both = paired(once.attention, again.attention, indices)
    slim = both.slim
    assert type(slim) is SlimMultiheadAttention
    assert (slim.num_heads, slim.head_dim, slim.dense_heads) == (2, 2, HEADS)
    for called in ("plain", "padding", "mask_by_head", "both_float"):
        given = both.inputs(*shapes(slim, 2, 7, 7), same=KINDS[name]["same"] == "qkv")
        keywords = CALLS[called](2, 7, 7)
        for weights in (False, True):
            made, full = (
                m(*x, **keywords, need_weights=weights, average_attn_weights=False)
                for m, x in zip((slim, both.dense), given, strict=True)
            )
            assert_alike(both, made, full, weights, average=False)


@pytest.mark.sweep
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


@pytest.mark.parametrize(
    "kind", [pytest.param(NamedAttention, marks=pytest.mark.sweep), SelfAttention]
)
def test_subclasses_stay_what_they_are(kind: type[nn.MultiheadAttention]) -> None:
    options = KINDS["self"]
    net = seeded_net(kind=kind, **options)
    slim, _ = narrowed(net, inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    plain, _ = narrowed(seeded_net(**options), inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
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
    again, _ = narrowed(copies[1], inputs(), {3: 2, 4: 2})
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
    slim, indices = narrowed(net, inputs(), {HEADS: 2})
    assert not isinstance(slim.attention, SlimMultiheadAttention)
    full = expanded(net, slim, indices, "")
    torch.testing.assert_close(slim(*inputs()), full(*inputs()), rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("name", sampled(["self", "widths"], ["self"]))
def test_parametrizations_and_hooks_survive(name: str) -> None:
    net, calls = seeded_net(**KINDS[name]), []
    parameter = "in_proj_weight" if name == "self" else "v_proj_weight"
    nn.utils.parametrize.register_parametrization(net.attention, parameter, Halved())
    net.attention.register_forward_pre_hook(lambda m, _: calls.append(m))
    dense_class = type(net.attention)
    slim, _ = narrowed(net, inputs(), {HEADS: 3, SIZE: 4, WIDTH: 20})
    assert depcut.report(slim).generated == {}
    assert isinstance(slim.attention, SlimMultiheadAttention)
    assert type(net.attention) is dense_class
    calls.clear()
    expected = slim(*inputs())
    assert calls == [slim.attention]
    nn.utils.parametrize.remove_parametrizations(slim.attention, parameter)
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
    slim, _ = narrowed(net, inputs(), {HEADS: 3, SIZE: 4})
    assert depcut.report(slim).generated == {}
    assert list(depcut.report(slim).patched) == ["attention"]
    assert slim.alias is slim.attention
