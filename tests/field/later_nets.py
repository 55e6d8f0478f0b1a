"""Nets as source code, written the many ways in which people write them, at sizes that are drawn.

A net is a file: what finds the expressions of a model reads its source. Every alternative computes
the same sizes, some from attributes, some from shapes, some typed in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

Choose = Callable[[Sequence[Any]], Any]

HEADER = '''\
"""A drawn net."""
import math
import functools
from math import sqrt
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def split_heads(t, heads):
    B, L, C = t.shape
    return t.view(B, L, heads, C // heads).transpose(1, 2)


def split_sized(t, heads, size):
    return t.reshape(t.size(0), -1, heads, size).permute(0, 2, 1, 3)


def merge_heads(t):
    B, H, L, D = t.shape
    return t.transpose(1, 2).contiguous().view(B, L, H * D)


def attend(q, k, v, mask, p=0.0):
    a = q @ k.transpose(-2, -1) / sqrt(k.shape[-1])
    if mask is not None:
        a = a + mask
    a = F.dropout(a.softmax(-1), p, training=p > 0)
    return a @ v


def plain(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)
    return wrapper


def repeat_kv(t, times):
    if times == 1:
        return t
    B, H, L, D = t.shape
    return t[:, :, None].expand(B, H, times, L, D).reshape(B, H * times, L, D)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def as_bias(mask, x):
    """(B, 1, 1 or L, L) float from bool padding (B, L), bool or float (L, L)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask, -1e4)
    mask = mask.to(x.dtype)
    return mask[None, None] if mask.shape[0] == mask.shape[1] == x.shape[1] else mask[:, None, None]
'''


@dataclass
class Written:
    """A class of the file: its name, source, and how it is called."""

    name: str
    source: str
    masked: bool = False
    marks: set[str] = field(default_factory=set)


def _lines(text: str, depth: int) -> str:
    return textwrap.indent(_dedented(text), "    " * depth).rstrip("\n")


def _dedented(text: str) -> str:
    return textwrap.dedent(text).strip("\n") + "\n"


def _class(name: str, init: str, body: str) -> str:
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{_lines(init, 2)}\n\n{_lines(body, 1)}\n"
    )


# Attention ----------------------------------------------------------------------------------------


def attention(name: str, width: int, pick: Choose) -> Written:
    heads = pick([2, 4])
    size = pick([width // heads, 6])
    inner = heads * size
    h = pick(["self.heads", f"{heads}", "self.cfg.heads", f"({inner} // self.size)", "H"])
    d = pick(["self.size", f"{size}", f"({inner} // {heads})", "D", "self.inner // self.heads"])
    bias = pick(["True", "False"])
    p = pick([0.0, 0.2])
    init = _dedented(f"""
        H, D = {heads}, {size}
        self.heads, self.size, self.inner, self.p = {heads}, {size}, {inner}, {p}
        self.cfg = SimpleNamespace(heads={heads})
        self.scale = self.size ** -0.5
        self.drop = nn.Dropout({p})
        self.out = nn.Linear({inner}, {width}, bias={bias})
    """)
    fused = pick([True, False])
    if fused:
        init += f"self.qkv = nn.Linear({width}, {inner} * 3, bias={bias})\n"
        splits = [
            f"q, k, v = self.qkv(x).reshape(B, L, 3, {h}, {d}).permute(2, 0, 3, 1, 4)",
            f"q, k, v = self.qkv(x).view(B, -1, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)",
            f"qkv = self.qkv(x).reshape(B, L, 3 * {h}, {d}).transpose(1, 2)\n"
            f"q, k, v = qkv.chunk(3, dim=1)",
            f"q, k, v = (split_heads(t, {h}) for t in self.qkv(x).chunk(3, -1))",
            f"q, k, v = [t.unflatten(-1, ({h}, -1)).transpose(1, 2)"
            f" for t in self.qkv(x).split({inner}, dim=-1)]",
            f"q, k, v = map(lambda t: t.view(B, L, {h}, {d}).transpose(1, 2),"
            f" self.qkv(x).chunk(3, dim=-1))",
            f"t = self.qkv(x)\nq, k, v = t[..., :{inner}], t[..., {inner}:2 * {inner}],"
            f" t[..., -{inner}:]\n"
            f"q, k, v = (split_sized(t, {h}, {d}) for t in (q, k, v))",
        ]
    else:
        for letter in "qkv":
            init += f"self.{letter} = nn.Linear({width}, {inner}, bias={bias})\n"
        splits = [
            f"q = self.q(x).view(B, L, {h}, {d}).transpose(1, 2)\n"
            f"k = self.k(x).view(B, L, {h}, {d}).transpose(1, 2)\n"
            f"v = self.v(x).view(B, L, {h}, {d}).transpose(1, 2)",
            f"q, k, v = (split_heads(m(x), {h}) for m in (self.q, self.k, self.v))",
            f"q, k, v = [split_sized(m(x), {h}, {d}) for m in (self.q, self.k, self.v)]",
            "q, k, v = self.separate(self.q(x)), self.separate(self.k(x)), "
            "self.separate(self.v(x))",
            f"hidden = (*x.shape[:-1], -1, {d})\n"
            "q, k, v = (m(x).view(hidden).transpose(1, 2) for m in (self.q, self.k, self.v))",
            f"shape = x.size()[:-1] + ({h}, {d})\n"
            "q, k, v = self.q(x).view(shape).transpose(1, 2), "
            "self.k(x).view(*shape).transpose(1, 2), self.v(x).view(shape).transpose(1, 2)",
        ]
    split = pick(splits)
    scale = pick(
        [
            "q = q * self.scale",
            "q = q * q.size(-1) ** -0.5",
            f"q = q / math.sqrt({size})",
            "q = q / sqrt(q.shape[-1])",
            f"q = q * {d} ** -0.5",
            "q = q / (self.inner // self.heads) ** 0.5",
            "q = q / torch.sqrt(torch.tensor(float(q.shape[-1]), device=q.device, dtype=q.dtype))",
            "q, k = q * q.size(-1) ** -0.25, k * k.size(-1) ** -0.25",
        ]
    )
    core = pick(
        [
            "a = q @ k.transpose(-2, -1)\n"
            "if bias is not None:\n    a = a + bias\n"
            "a = self.drop(a.softmax(dim=-1))\n"
            "o = a @ v",
            "a = torch.einsum('bhid,bhjd->bhij', q, k)\n"
            "if mask is not None:\n    a = a + as_bias(mask, x)\n"
            "a = F.dropout(F.softmax(a, -1), p=self.p, training=self.training)\n"
            "o = torch.einsum('bhij,bhjd->bhid', a, v)",
            "dots = torch.matmul(q, k.transpose(2, 3))\n"
            "if mask is not None and mask.dtype == torch.bool:\n"
            "    dots = dots.masked_fill(as_bias(mask, x) < 0, torch.finfo(dots.dtype).min)\n"
            "elif mask is not None:\n    dots = dots + bias\n"
            "o = self.drop(torch.softmax(dots, -1)).matmul(v)",
            "causal = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)\n"
            "a = (q @ k.transpose(-1, -2)).masked_fill(causal, float('-inf'))\n"
            "if bias is not None:\n    a = a + bias\n"
            "o = F.dropout(a.softmax(-1), self.p, self.training) @ v",
            "if bias is not None:\n    bias = bias.expand(B, -1, L, -1)\n"
            f"q, k, v = (t.reshape(B * {h}, L, {d}) for t in (q, k, v))\n"
            "a = torch.bmm(q, k.transpose(1, 2))\n"
            "if bias is not None:\n"
            f"    a = a.view(B, {h}, L, L) + bias\n"
            f"    a = a.view(B * {h}, L, L)\n"
            f"o = torch.bmm(self.drop(a.softmax(-1)), v).view(B, {h}, L, {d})",
            "o = attend(q, k, v, bias, self.p if self.training else 0.0)",
            "q = q\no = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, "
            "dropout_p=self.p if self.training else 0.0)",
            "if mask is None:\n"
            "    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)\n"
            "else:\n    o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)",
        ]
    )
    merge = pick(
        [
            f"o = o.transpose(1, 2).reshape(B, L, {inner})",
            "o = o.transpose(1, 2).flatten(2)",
            "o = o.permute(0, 2, 1, 3).contiguous().view(B, L, -1)",
            "o = merge_heads(o)",
            f"o = o.transpose(1, 2).reshape(B, L, {h} * {d})",
            "o = o.transpose(1, 2).contiguous().view(B, -1, self.inner)",
            f"o = o.transpose(1, 2).reshape(*x.shape[:-1], {inner})",
            *(["o = o.transpose(1, 2).reshape(x.shape)"] if inner == width else []),
            *(["o = o.transpose(1, 2).reshape(B, L, C)"] if inner == width else []),
        ]
    )
    decorator = pick(["", "@plain\n"])
    local = pick([f"H, D = {heads}, {size}", f"H = self.heads\nD = {inner} // H"])
    body = (
        f"def separate(self, t):\n    B, L, _ = t.shape\n"
        f"    return t.view(B, L, {heads}, {size}).transpose(1, 2)\n\n"
        f"{decorator}def forward(self, x, mask=None):\n"
        f"    B, L, C = x.shape\n"
        f"{_lines(local, 1)}\n    bias = as_bias(mask, x)\n"
        f"{_lines(split, 1)}\n{_lines(scale, 1)}\n{_lines(core, 1)}\n{_lines(merge, 1)}\n"
        f"    return self.out(o)"
    )
    return Written(name, _class(name, init, body), masked=True)


def grouped_query(name: str, width: int, pick: Choose) -> Written:
    heads, kv, size = 4, pick([2, 1]), pick([4, 6])
    d = pick(["self.head_dim", f"{size}"])
    repeat = pick(
        [
            "k, v = repeat_kv(k, self.times), repeat_kv(v, self.times)",
            "k = k.repeat_interleave(self.times, dim=1)\nv = v.repeat_interleave(self.times, 1)",
            f"k = torch.repeat_interleave(k, {heads} // {kv}, dim=1)\n"
            f"v = torch.repeat_interleave(v, {heads} // {kv}, dim=1)",
            "k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)\n"
            "v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)",
        ]
    )
    merge = pick(
        ["o.transpose(1, 2).flatten(2)", f"o.transpose(1, 2).reshape(B, L, {heads} * {size})"]
    )
    body = f"""
        def forward(self, x, mask=None):
            B, L, _ = x.shape
            q = self.q(x).view(B, L, -1, {d}).transpose(1, 2)
            k = self.k(x).view(B, L, -1, {d}).transpose(1, 2)
            v = self.v(x).view(B, L, {pick(["-1", str(kv), "self.kv"])}, {d}).transpose(1, 2)
            REPEAT
            o = attend(q, k, v, as_bias(mask, x))
            return self.o({merge})
    """
    body = textwrap.dedent(body).replace("    REPEAT", _lines(repeat, 1))
    init = f"""
        self.times, self.kv, self.head_dim = {heads // kv}, {kv}, {size}
        self.q = nn.Linear({width}, {heads * size}, bias=False)
        self.k = nn.Linear({width}, {kv * size}, bias=False)
        self.v = nn.Linear({width}, {kv * size}, bias=False)
        self.o = nn.Linear({heads * size}, {width}, bias=False)
    """
    return Written(name, _class(name, init, body), masked=True)


def linear_attention(name: str, width: int, pick: Choose) -> Written:
    heads, size = 2, pick([8, 5])
    h, d = pick(["self.h", "2"]), pick([f"{size}", "self.d", "-1"])
    over = pick(["L", "x.shape[1]", f"math.sqrt({size})", "k.size(-1) ** 0.5"])
    body = f"""
        def forward(self, x, mask=None):
            B, L, C = x.shape
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = q.reshape(B, L, {h}, {d}).relu() + 0
            k = k.reshape(B, L, {h}, {d}).relu()
            v = v.reshape(B, L, {h}, {d})
            if mask is not None and mask.dtype == torch.bool and mask.dim() == 2:
                if mask.shape == (B, L):
                    k = k.masked_fill(mask[:, :, None, None], 0.0)
            kv = torch.einsum("bnhd,bnhe->bhde", k, v) / {over}
            return self.out(torch.einsum("bnhd,bhde->bnhe", q, kv).reshape(B, L, {heads * size}))
    """
    init = f"""
        self.h, self.d = {heads}, {size}
        self.qkv = nn.Linear({width}, {3 * heads * size})
        self.out = nn.Linear({heads * size}, {width})
    """
    return Written(name, _class(name, init, body), masked=True)


def multihead(name: str, width: int, pick: Choose) -> Written:
    heads, p = pick([2, 4]), pick([0.0, 0.1])
    first = pick(["True", "False"])
    weights = pick(["need_weights=False", "need_weights=True", "average_attn_weights=False"])
    turn = ".transpose(0, 1)" if first == "False" else ""
    body = f"""
        def forward(self, x, mask=None):
            padding = attn = None
            if mask is not None:
                if mask.shape[0] == mask.shape[1] == x.shape[1]:
                    attn = mask
                else:
                    padding = mask
            y = x{turn}
            y, _ = self.mha(y, y, y, key_padding_mask=padding, attn_mask=attn, {weights})
            return y{turn}
    """
    init = f"self.mha = nn.MultiheadAttention({width}, {heads}, dropout={p}, batch_first={first})"
    return Written(name, _class(name, init, body), masked=True)


def encoder(name: str, width: int, pick: Choose) -> Written:
    pre = pick(["True", "False"])
    act = pick(["'relu'", "'gelu'", "torch.nn.functional.silu"])
    layer = (
        f"nn.TransformerEncoderLayer({width}, {pick([2, 4])}, {pick([24, 20])}, "
        f"dropout={pick([0.0, 0.1])}, activation={act}, batch_first=True, norm_first={pre})"
    )
    stack = pick([f"self.layer = {layer}", f"self.layer = nn.TransformerEncoder({layer}, 2)"])
    key = "mask" if "TransformerEncoder(" in stack else "src_mask"
    body = f"""
        def forward(self, x, mask=None):
            if mask is not None and mask.shape[0] == mask.shape[1] == x.shape[1]:
                return self.layer(x, {key}=mask)
            return self.layer(x, src_key_padding_mask=mask)
    """
    return Written(name, _class(name, stack, body), masked=True)


# Others -------------------------------------------------------------------------------------------


def mlp(name: str, width: int, pick: Choose) -> Written:
    hidden = pick([24, 20])
    kind = pick(["plain", "glu", "split", "slice", "typed", "scaled", "checked", "training"])
    act = pick(["gelu", "relu", "silu", "tanh"])
    p = pick([0.0, 0.3])
    wide = 2 * hidden if kind in ("glu", "split", "slice", "typed") else hidden
    body = {
        "plain": f"return self.down(self.drop(F.{act}(self.up(x))))",
        "glu": f"a, b = self.up(x).chunk(2, dim=-1)\nreturn self.down(F.{act}(a) * b)",
        "split": f"a, b = torch.split(self.up(x), self.hidden, dim=-1)\n"
        f"return self.down(F.{act}(a) * b)",
        "slice": f"h = self.up(x)\nn = h.shape[-1] // 2\n"
        f"return self.down(F.{act}(h[..., :n]) * h[..., n:])",
        "typed": f"h = self.up(x)\n"
        f"return self.down(F.{act}(h[..., :{hidden}]) * h[..., {hidden}:])",
        "scaled": f"h = self.up(x)\nh = F.{act}(h) / "
        + pick([f"math.sqrt({hidden})", "h.shape[-1] ** 0.5", "sqrt(self.hidden)"])
        + "\nreturn self.down(F.dropout(h, self.p, self.training))",
        "checked": f"h = F.{act}(self.up(x))\n"
        f"assert h.shape[-1] == {pick([str(hidden), 'self.hidden'])}\n"
        "return self.down(h)",
        "training": f"h = F.{act}(self.up(x))\nif self.training:\n"
        f"    h = h * {pick(['1.0', f'torch.ones({hidden}, dtype=h.dtype, device=h.device)'])}\n"
        "return self.down(h)",
    }[kind]
    init = f"""
        self.hidden, self.p = {hidden}, {p}
        self.up = nn.Linear({width}, {wide}, bias={pick(["True", "False"])})
        self.down = nn.Linear({hidden}, {width})
        self.drop = nn.Dropout({p})
    """
    return Written(
        name, _class(name, init, f"def forward(self, x):\n{_lines(body, 1)}"), marks={kind}
    )


def region(name: str, width: int, pick: Choose) -> Written:
    """Code around a hidden layer that a graph would lose."""
    hidden = pick([16, 12])
    body = pick(
        [
            "h = self.up(x)\nwith torch.no_grad():\n"
            f"    s = h.reshape(*h.shape[:-1], {hidden} // 4, 4).abs().sum(-1)\n"
            f"    s = 1 + s.repeat_interleave(4, -1) * 0\n"
            "return self.down(torch.relu(h) * s)",
            f"h = Straight.apply(self.up(x).tanh())\n"
            f"return self.down(h.view(*x.shape[:-1], {hidden}))",
            "def inner(t):\n"
            f"    return self.down(F.silu(self.up(t)) / math.sqrt({hidden}))\n"
            "if self.training and x.requires_grad:\n"
            "    return checkpoint(inner, x, use_reentrant=False)\n"
            "return inner(x)",
            "with torch.autocast(x.device.type, enabled=False):\n"
            f"    h = self.up(x.to(self.up.weight.dtype)).relu().view(-1, {hidden})\n"
            "    return self.down(h).view_as(x)",
            f"h = F.linear(x, self.up.weight, self.up.bias).relu()\n"
            f"return F.linear(h * {hidden} ** -0.5, self.down.weight, self.down.bias)",
            f"h = x.new_zeros(*x.shape[:-1], {hidden})\nh = h + self.up(x).relu()\n"
            f"return self.down(h)",
            f"h = torch.cat([self.up(x).relu(), self.side(x).tanh()], dim=-1)\n"
            f"a, b = h.split([{hidden}, {hidden}], dim=-1)\nreturn self.down(a * b)",
        ]
    )
    init = f"""
        self.up = nn.Linear({width}, {hidden})
        self.side = nn.Linear({width}, {hidden})
        self.down = nn.Linear({hidden}, {width})
    """
    return Written(name, _class(name, init, f"def forward(self, x):\n{_lines(body, 1)}"))


def convolution(name: str, width: int, pick: Choose) -> Written:
    hidden = pick([16, 24])
    kind = pick(["plain", "depthwise", "functional", "group_norm", "gated", "grouped"])
    init = _dedented(f"""
        self.hidden = {hidden}
        self.up = nn.Conv1d({width}, {hidden * 2 if kind == "gated" else hidden}, 1)
        self.norm = nn.BatchNorm1d({hidden})
        self.down = nn.Conv1d({hidden}, {width}, 3, padding=1)
    """)
    if kind in ("depthwise", "functional", "grouped"):
        groups = 4 if kind == "grouped" else hidden
        init += f"self.mid = nn.Conv1d({hidden}, {hidden}, 3, padding=1, groups={groups})\n"
    g = pick([f"{hidden}", "self.hidden", "h.shape[1]", "self.mid.groups"])
    middle = {
        "plain": "h = self.norm(self.up(h)).relu()",
        "depthwise": "h = self.mid(self.norm(self.up(h)).relu()).relu()",
        "grouped": "h = self.mid(self.norm(self.up(h)).relu()).relu()",
        "functional": "h = self.up(h).relu()\n"
        f"h = F.conv1d(h, self.mid.weight, self.mid.bias, padding=1, groups={g}).relu()",
        "group_norm": f"h = F.group_norm(self.up(h), {hidden} // 4).relu()",
        "gated": "a, b = self.up(h).chunk(2, 1)\nh = a * b.sigmoid()",
    }[kind]
    extra = pick(
        [
            "",
            f"h = h.view(h.size(0), {hidden}, -1)",
            "B, C, L = h.shape\nh = h.reshape(B, C, L)",
            f"h = h.unflatten(1, (4, {hidden // 4})).flatten(1, 2)",
        ]
    )
    body = (
        f"def forward(self, x):\n    h = x.transpose(1, 2)\n{_lines(middle, 1)}\n"
        f"{_lines(extra, 1)}\n    return self.down(h).transpose(1, 2)"
    )
    return Written(name, _class(name, init, body))


def recurrent(name: str, width: int, pick: Choose) -> Written:
    kind, hidden = pick(["GRU", "LSTM", "RNN"]), pick([10, 12])
    two = pick([False, True])
    ways = 2 if two else 1
    first = pick([True, False])
    state = pick(["", f"torch.zeros({ways}, {{n}}, {hidden}, dtype=x.dtype, device=x.device)"])
    turn = "" if first else ".transpose(0, 1)"
    given = state.format(n="x.size(0)")
    if given and kind == "LSTM":
        given = f"({given}, {given})"
    after = pick(
        [
            "",
            f"y = y.reshape(x.shape[0], -1, {ways * hidden})",
            f"y = y.contiguous().view(x.size(0), x.size(1), {ways}, {hidden}).flatten(2)",
        ]
    )
    body = (
        f"def forward(self, x):\n"
        f"    y, _ = self.rnn(x{turn}{', ' + given if given else ''})\n"
        f"    y = y{turn}\n{_lines(after, 1)}\n    return self.out(y)"
    )
    init = f"""
        self.rnn = nn.{kind}({width}, {hidden}, batch_first={first}, bidirectional={two})
        self.out = nn.Linear({ways * hidden}, {width})
    """
    return Written(name, _class(name, init, body))


def gate(name: str, width: int, pick: Choose) -> Written:
    hidden = pick([8, 12])
    c = pick(["C", f"{width}", "x.size(-1)", "-1"])
    body = f"""
        def forward(self, x):
            B, L, C = x.shape
            s = x.mean(dim={pick(["1", "-2"])})
            s = torch.sigmoid(self.up(F.relu(self.down(s)))).view(B, 1, {c})
            return x * s
    """
    init = f"self.down = nn.Linear({width}, {hidden})\nself.up = nn.Linear({hidden}, {width})"
    return Written(name, _class(name, init, body))


BLOCKS: dict[str, Callable[[str, int, Choose], Written]] = {
    "attention": attention,
    "mlp": mlp,
    "region": region,
    "convolution": convolution,
    "grouped_query": grouped_query,
    "recurrent": recurrent,
    "multihead": multihead,
    "encoder": encoder,
    "gate": gate,
    "linear_attention": linear_attention,
}


# Nets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetSource:
    """A drawn net.

    Attributes:
        text: The file.
        kind: Of its inputs: "tokens" of 5 numbers, "ids" below 11, or "images" of 3 channels.
        masked: Whether its forward takes a mask.
        blocks: Names of its blocks.
    """

    text: str
    kind: str
    masked: bool
    blocks: tuple[str, ...]


def written(pick: Choose) -> NetSource:
    """The source of a net of one to three blocks.

    Args:
        pick: Takes one of several options.
    """
    width = pick([16, 24])
    kind = pick(["tokens", "tokens", "ids", "images"])
    names = [pick([*BLOCKS, "attention", "attention"]) for _ in range(pick([1, 2, 3]))]
    parts = []
    for i, name in enumerate(names):
        parts.append(BLOCKS[name](f"{name.title().replace('_', '')}{i}", width, pick))
    norm = pick(["nn.Identity()", f"nn.LayerNorm({width})"])
    stem = {
        "tokens": f"nn.Linear(5, {width})",
        "ids": f"nn.Embedding(11, {width})",
        "images": f"nn.Conv2d(3, {width}, 2, stride=2)",
    }[kind]
    flat = pick(
        [
            "x = x.flatten(2).transpose(1, 2)",
            f"x = x.reshape(x.size(0), {width}, -1).permute(0, 2, 1)",
            "B, C, H, W = x.shape\nx = x.view(B, C, H * W).transpose(1, 2)",
        ]
    )
    where = pick(["", "position", "class_token"]) if kind != "images" else ""
    init = f"self.stem = {stem}\n"
    body = "x = self.stem(x)\n" + (flat + "\n" if kind == "images" else "")
    if where == "position":
        init += f"self.where = nn.Parameter(torch.randn(1, 32, {width}) * 0.1)\n"
        body += "x = x + self.where[:, :x.size(1)]\n"
    masked = any(p.masked for p in parts) and where != "class_token"
    if where == "class_token":
        init += f"self.token = nn.Parameter(torch.randn(1, 1, {width}) * 0.1)\n"
        body += pick(
            [
                "x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)\n",
                f"x = torch.cat([self.token.expand(x.size(0), 1, {width}), x], 1)\n",
            ]
        )
    residual = pick([True, False])
    for i, part in enumerate(parts):
        init += f"self.norm{i} = {norm}\nself.block{i} = {part.name}()\n"
        given = f"self.norm{i}(x)" + (", mask" if part.masked and masked else "")
        if part.masked and masked:
            given = pick([given, given.replace(", mask", ", mask=mask")])
        body += f"x = {'x + ' if residual else ''}self.block{i}({given})\n"
    pool = pick(["tokens", "mean", "first"])
    init += f"self.head = nn.Linear({width}, 3)"
    body += {
        "tokens": "return self.head(x)",
        "mean": "return self.head(x.mean(1))",
        "first": "return self.head(x[:, 0])",
    }[pool]
    extra = pick(["", ", gain=1.0"])
    if extra:
        body = body.replace("return self.head(", "return gain * self.head(")
    arguments = ("self, x, mask=None" if masked else "self, x") + extra
    forward = f"def forward({arguments}):\n{_lines(body, 1)}"
    text = "\n\n".join([HEADER, *(p.source for p in parts), _class("Net", init, forward)])
    return NetSource(text, kind, masked, tuple(names))


def loaded(source: NetSource, folder: Path) -> nn.Module:
    """The net of a source, written to a file and imported.

    Args:
        source: The net.
        folder: Where the file goes.
    """
    name = "later_" + hashlib.sha256(source.text.encode()).hexdigest()[:12]
    path = folder / f"{name}.py"
    path.write_text(source.text, encoding="utf-8")
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    net: nn.Module = module.Net()
    return net
