"""Pairs of a narrowed `nn.MultiheadAttention` and its dense counterpart, and calls of both.

The counterpart holds the slim weights at the places that were kept, and zeros elsewhere; its inputs
are zero where the slim one has none.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import depcut
from depcut.rewrite.attention import SlimMultiheadAttention

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
        whole = (self.dense.embed_dim, self.dense.kdim, self.dense.vdim)
        for i, (shape, kept) in enumerate(zip(shapes, self.widths, strict=True)):
            if i and (same or (self.slim.in_proj_weight is not None and i == 2)):
                slim.append(slim[-1])
                dense.append(dense[-1])
                continue
            small = torch.randn(*shape, len(kept), generator=generator).to(dtype)
            full = torch.zeros(*shape, whole[i]).to(dtype)
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


def paired(dense: nn.Module, slim: nn.Module, indices: dict[str, Any]) -> Pair:
    """The attention of a narrowed net, and its counterpart.

    Args:
        dense: The dense attention.
        slim: The narrowed attention.
        indices: Of the plan.
    """
    whole = expanded(dense, slim, indices, "attention.")
    packed = indices.get("attention.in_proj_weight")
    names = [f"attention.{part}_proj_weight" for part in "qkv"]
    columns = [packed[1]] * 3 if packed else [indices[n][1] for n in names]
    sizes = (dense.embed_dim, dense.kdim, dense.vdim)
    kept = [np.arange(n) if c is None else c for n, c in zip(sizes, columns, strict=True)]
    out = indices["attention.out_proj.weight"][0]
    out = np.arange(dense.out_proj.out_features) if out is None else out
    before = list(getattr(dense, "kept_heads", range(dense.num_heads)))
    heads = [before.index(head) for head in slim.kept_heads]
    return Pair(slim, whole, tuple(kept), out, heads)


@functools.cache
def pair(name: str, dropout: float = 0.0) -> Pair:
    """The pair of one of the kinds, narrowed at random.

    Args:
        name: Of the kind.
        dropout: Its probability.
    """
    net = seeded_net(**KINDS[name], dropout=dropout)
    counts = {HEADS: 3, SIZE: 4, WIDTH: 18, 10: 7, 14: 9}
    slim, indices = narrowed(net, inputs(), counts, np.random.default_rng(3))
    assert depcut.report(slim).generated == {}
    assert type(slim.attention) is SlimMultiheadAttention
    assert slim.attention.num_heads == len(slim.attention.kept_heads) == 3
    return paired(net.attention, slim.attention, indices)


def narrowed(
    net: nn.Module, args: Any, counts: dict[int, int], rng: np.random.Generator | None = None
) -> tuple[Any, dict[str, Any]]:
    """Applies a plan that keeps so many units of the groups of these sizes.

    Args:
        net: Dense.
        args: Example inputs.
        counts: Kept by size of the group.
        rng: Chooses the units; without one, the first stay.

    Returns:
        The narrowed net, and the kept indices of every tensor.
    """
    analysis = depcut.analyze(net, args)
    kept = {}
    for group in analysis.groups:
        if group.size in counts:
            order = np.arange(group.size) if rng is None else rng.permutation(group.size)
            kept[group.name] = sorted(order[: counts[group.size]].tolist())
    plan = analysis.plan_keeping(kept)
    return plan.apply(net), plan.tensor_indices()


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
    "mask": lambda _n, t, s: {"attn_mask": causal(t, s)},
    "mask_float": lambda _n, t, s: {"attn_mask": drawn(t, s)},
    "mask_by_head": lambda n, t, s: {"attn_mask": drawn(n * HEADS, t, s)},
    "mask_by_head_bool": lambda n, t, s: {
        "attn_mask": (drawn(n * HEADS, t, s) > 0.5) & ~torch.eye(t, s).bool()
    },
    "causal_hint": lambda _n, t, s: {"attn_mask": causal(t, s), "is_causal": True},
    "causal_and_padding": lambda n, t, s: {
        "attn_mask": causal(t, s), "is_causal": True, "key_padding_mask": padding(n, s)
    },
    "both_float": lambda n, t, s: {
        "attn_mask": infinite(causal(t, s)), "key_padding_mask": infinite(padding(n, s))
    },
}  # fmt: skip


def shapes(module: nn.MultiheadAttention, batch: int, length: int, source: int) -> list[Any]:
    """Leading shapes of query, key and value; without a batch where that is 0."""
    if batch == 0:
        return [(length,), (source,), (source,)]
    order = (0, 1) if module.batch_first else (1, 0)
    return [tuple((batch, n)[i] for i in order) for n in (length, source, source)]


def assert_alike(
    both: Pair, slim: Any, dense: Any, weights: bool, average: bool, **near: Any
) -> None:
    near = near or {"rtol": 1e-4, "atol": 1e-5}
    (out, its), (full, all_of_them) = slim, dense
    torch.testing.assert_close(out, full[..., both.out], **near)
    assert (its is not None) == weights
    if its is not None:
        its_dense = all_of_them[..., both.heads, :, :]
        its_dense = its_dense.mean(-3) if average else its_dense
        torch.testing.assert_close(its, its_dense, **near)
