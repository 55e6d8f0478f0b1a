"""Multi-head attention whose heads together may be of another width than the embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from depcut.errors import InputError
from depcut.support.torch_private import canonical_mask, check_attention_shapes

_Masks = tuple[Tensor | None, Tensor | None]  # of padding, and of attention


class SlimMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` in which the sizes of heads and of the embedding are free.

    Arguments, results, errors, parameters and their names are those of the stock class. The widths
    of query, key and value are `embed_dim`, `kdim` and `vdim`, the output's is
    `out_proj.out_features`. Attention weights are those of the heads that are left; a
    three-dimensional `attn_mask` has a matrix for each of these, or for each that there once was.
    The inference paths of torch, which demand one width, are not taken.

    The constructor is that of the stock class, and gives the sizes that this has.

    Attributes:
        num_heads: Heads that are left.
        head_dim: Size of the queries and keys of a head.
        value_head_dim: Size of the values of a head.
        softmax_scale: Factor of the products of queries and keys.
        dense_heads: How many heads there once were.
        kept_heads: Which of them are left, ascending.
    """

    value_head_dim: int
    softmax_scale: float
    dense_heads: int
    kept_heads: tuple[int, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        become_slim(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a class made by `slim_class`, the class that it was made for is referred to."""
        recipe: Any = super().__reduce_ex__(protocol)
        kind = getattr(type(self), "slim_of", None)
        return recipe if kind is None else (_empty, (kind,), *recipe[2:])

    def _reset_parameters(self) -> None:
        """Draw the parameters as the stock class does."""
        for weight in (
            self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight,
        ):  # fmt: skip
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `torch.nn.MultiheadAttention`.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) if `batch_first`, or (L, embed_dim).
            key: S positions of width kdim, alike.
            value: S positions of width vdim, alike.
            key_padding_mask: (N, S) or (S): True, or a number to be added, by key.
            need_weights: Whether the attention weights are returned, too.
            attn_mask: (L, S) or (N * heads, L, S): True, or a number to be added, by query and key.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: Hint that `attn_mask` is the causal mask.

        Returns:
            The output, of the query's shape but its own width, and the weights of shape
            (N, L, S), (N, num_heads, L, S), the same without N, or None.

        Raises:
            InputError: Nested tensors with masks, of another layout, or that are not one tensor.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            one = query is key and key is value and query.layout == torch.strided
            if not one or not self.batch_first or not (key_padding_mask is attn_mask is None):
                raise InputError(
                    "a slim torch.nn.MultiheadAttention takes a nested tensor of strided layout as "
                    "query, key and value alike, with batch_first=True and without masks",
                    remedy="pass padded tensors and a key_padding_mask",
                )
            return self._attend_nested(query, need_weights, average_attn_weights)
        batched = query.dim() == 3
        masks = _additive(key_padding_mask, self._of_kept_heads(attn_mask, query), query.dtype)
        check_attention_shapes(query, key, value, *masks, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer "
                "module method `generate_square_subsequent_mask` to create this mask."
            )
        self._check_sizes(query, key, value)
        q, k, v = (self._by_head(x, batched) for x in self._project(query, key, value))
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else _merged(masks, q, k)
        k, v, mask = self._extended(k, v, mask)
        out, weights = self._attend(q, k, v, mask, is_causal, need_weights)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        out = out.permute(order).flatten(2)
        out = functional.linear(out, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, weighs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The values that each head gathers, and its weights where they are asked for."""
        dropout = self.dropout if self.training else 0.0
        if not weighs:
            scale = self.softmax_scale
            attend = functional.scaled_dot_product_attention
            return attend(q, k, v, mask, dropout, causal, scale=scale), None
        scores = (q * self.softmax_scale) @ k.transpose(-2, -1)
        weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout > 0:
            weights = functional.dropout(weights, dropout)
        return weights @ v, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads side by side."""
        inner = self.num_heads * self.head_dim
        rows = [inner, inner, self.num_heads * self.value_head_dim]
        packed: Any = self.in_proj_weight  # None where each has its own
        bias: Any = self.in_proj_bias
        if packed is not None and query is key and key is value:
            together = functional.linear(query, packed, bias)
            if len({*rows}) == 1:  # as the stock class does, whose units are the same in all three
                q, k, v = together.unflatten(-1, (3, -1)).unbind(-2)
            else:
                q, k, v = together.split(rows, -1)
            return q, k, v
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if packed is not None:
            weights = _cut(packed, rows)  # type: ignore[assignment]
        biases = (None, None, None) if bias is None else _cut(bias, rows)
        q, k, v = map(functional.linear, (query, key, value), weights, biases)
        return q, k, v

    def _by_head(self, x: Tensor, batched: bool) -> Tensor:
        """(N, num_heads, positions, size of a head) of what is projected."""
        x = x.unflatten(-1, (self.num_heads, -1))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with the positions of `add_bias_kv` and `add_zero_attn`, unmasked."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            both = [
                b.view(1, 1, self.num_heads, -1).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
                for b, x in ((self.bias_k, k), (self.bias_v, v))
            ]
            k, v = torch.cat([k, both[0]], 2), torch.cat([v, both[1]], 2)
            more += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            more += 1
        return k, v, functional.pad(mask, (0, more)) if mask is not None and more else mask

    def _of_kept_heads(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """An attention mask without the matrices of heads that are gone."""
        if mask is None or mask.dim() != 3 or self.num_heads == self.dense_heads:
            return mask
        batch = 1 if query.dim() == 2 else query.shape[0 if self.batch_first else 1]
        if mask.shape[0] != batch * self.dense_heads:
            return mask
        by_head = mask.unflatten(0, (-1, self.dense_heads))
        return torch.stack([by_head[:, i] for i in self.kept_heads], 1).flatten(0, 1)

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse what the stock class refuses, in its words."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        packed: Any = self.in_proj_weight
        if packed is None and key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's "
                f"{value.shape[:-1]}"
            )
        if packed is not None and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise RuntimeError(
                f"the batch of the query is {query.shape[batch]}, that of the key "
                f"{key.shape[batch]}"
            )

    def _attend_nested(
        self, query: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of several lengths."""
        lengths = [x.shape[0] for x in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=padded.device)[:, None]
        beyond = torch.arange(padded.shape[1], device=padded.device) >= ends
        out, weights = self.forward(
            padded,
            padded,
            padded,
            key_padding_mask=beyond,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        if weights is not None:
            rows = beyond if average_attn_weights else beyond[:, None]
            weights = weights.masked_fill(rows[..., None], 0.0)
        parts = [x[:n] for x, n in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts), weights


def become_slim(module: nn.MultiheadAttention) -> None:
    """Set the attributes of the slim class to what the stock module at hand computes.

    Args:
        module: Of the slim class already, with the attributes of the stock class.
    """
    vars(module).update(
        value_head_dim=module.head_dim,
        softmax_scale=math.sqrt(1.0 / float(module.head_dim)),
        dense_heads=module.num_heads,
        kept_heads=tuple(range(module.num_heads)),
        # By this torch's encoder layers tell that their inference path must not be taken.
        _qkv_same_embed_dim=False,
    )


@functools.cache
def slim_class(kind: Any) -> type[SlimMultiheadAttention]:
    """The slim class that stands for the stock one or for a subclass, whose methods come first.

    Args:
        kind: `torch.nn.MultiheadAttention` or a subclass of it.
    """
    if kind is nn.MultiheadAttention:
        return SlimMultiheadAttention
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "slim_of": kind,
    }
    return type(kind.__name__, (kind, SlimMultiheadAttention), members)


def _empty(kind: Any) -> SlimMultiheadAttention:
    """A module without any state, to be filled."""
    made = slim_class(kind)
    return made.__new__(made)


def _additive(padding: Tensor | None, attention: Tensor | None, dtype: torch.dtype) -> _Masks:
    """Both masks as numbers to be added."""
    other = None if attention is None else attention.dtype
    padding = canonical_mask(padding, "key_padding_mask", other, "attn_mask", dtype)
    attention = canonical_mask(attention, "attn_mask", None, "", dtype, False)
    return padding, attention


def _merged(masks: _Masks, q: Tensor, k: Tensor) -> Tensor | None:
    """One mask that broadcasts to (N, num_heads, L, S).

    Args:
        masks: Of padding, (N, S) or (S), and of attention, (L, S) or (N * num_heads, L, S).
        q: (N, num_heads, L, size of a head).
        k: (N, num_heads, S, size of a head).
    """
    (batch, heads, length, _), source = q.shape, k.shape[2]
    padding, attention = masks
    if attention is not None:
        size = (length, source) if attention.dim() == 2 else (batch * heads, length, source)
        if attention.shape != size:
            raise RuntimeError(
                f"The shape of the {attention.dim()}D attn_mask is {attention.shape}, but should "
                f"be {size}."
            )
        attention = attention if attention.dim() == 2 else attention.unflatten(0, (-1, heads))
    if padding is None:
        return attention
    padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
    for i, wanted in enumerate((batch, source)):
        if padding.shape[i] != wanted:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{i}] to be {wanted}, but got {padding.shape[i]}"
            )
    padding = padding[:, None, None]
    # Runtimes of ONNX files do not broadcast a mask along the queries.
    return padding.expand(-1, -1, length, -1) if attention is None else attention + padding


def _cut(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Weights or biases of queries, keys and values that are laid end to end.

    Equal ones are cut as the stock class cuts them, evenly: a later plan keeps them equal.
    """
    return x.chunk(len(sizes)) if len({*sizes}) == 1 else x.split(list(sizes))
