"""`Flow` with a power of two beside each tensor: no overflow or underflow at any depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from depcut.graph.operators import base_name, is_operator
from depcut.ops.kinds import NORMS, PRODUCTS, SOFTMAXES
from depcut.scores.flow import Flow

_BITS = 128  # a tensor whose largest number is beyond 2^128, or below 2^-128, is rescaled
_ADDED = 64  # of two summands that far apart in bits, the smaller one does not count


class ScaledFlow(Flow):
    """A flow in which a tensor that has grown or shrunk too far stands for 2^e times itself.

    The operators of a flow are linear in the activations, apart from those that divide by the size
    of one; so exponents add up, cancel, or are made equal before a sum. Up to the scale of its
    total it computes what `Flow` does, and exactly that where no number leaves 2^-128 to 2^128.
    """

    def total(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of all outputs for one example, divided by a power of two.

        Args:
            parameters: By name, in double precision.
        """
        self.exponents: dict[fx.Node, float] = {}
        return super().total(parameters)

    def call(self, n: fx.Node) -> Any:
        """The value of one node, to be multiplied by 2^exponent."""
        if all(s not in self.exponents for s in n.all_input_nodes):
            return self._bounded(n, super().call(n), 0.0)
        floats = [s for s in n.all_input_nodes if _tensors(self.values[s])]
        given = [s for s in floats if s in self.activations]
        name = base_name(n) if is_operator(n) else ""
        e = {s: self.exponents.get(s, 0.0) for s in floats}
        if n.target in SOFTMAXES or n.target in NORMS:
            return self._bounded(n, super().call(n), 0.0)
        if name == "scaled_dot_product_attention":
            return self._attended(n, e)
        if name == "div" and len(floats) == 2:
            return self._bounded(n, super().call(n), e[floats[0]] - e[floats[1]])
        if n.target in PRODUCTS:
            exponent = sum(e[s] for s in given) / max(len(given), 1)
            return self._bounded(n, super().call(n), exponent)
        return self._summed(n, floats, given)

    def _attended(self, n: fx.Node, e: Mapping[fx.Node, float]) -> Any:
        """Attention, with one power of two for the products and the mask that is added to them."""
        names = ("query", "key", "value", "attn_mask")
        given: dict[str, Any] = {**dict(zip(names, n.args, strict=False)), **n.kwargs}
        product, mask = e[given["query"]] + e[given["key"]], given.get("attn_mask")
        added = e.get(mask, product) if isinstance(mask, fx.Node) else product
        largest = max(product, added)
        near = min(max(largest, -_ADDED), _ADDED)
        factors = {given["query"]: 2.0 ** (product - largest + near)}
        if isinstance(mask, fx.Node) and mask in e:
            factors[mask] = 2.0 ** (added - largest + near)
        return self._bounded(n, self._with(n, factors), e[given["value"]])

    def _summed(self, n: fx.Node, floats: list[fx.Node], given: list[fx.Node]) -> Any:
        """An operator that is linear in activations, and may add parameters or numbers to them."""
        exponent = max((self.exponents.get(s, 0.0) for s in given), default=0.0)
        if exponent < 0 and len(given) < len(floats):
            alone = _tensors(self._with(n, dict.fromkeys(given, 0.0)))
            exponent = 0.0 if any(bool(t.detach().any()) for t in alone) else exponent
        # Far enough out, for what is added to count as little as it should.
        near = min(max(exponent, -_ADDED), _ADDED)
        value = self._with(
            n, {s: 2.0 ** (self.exponents.get(s, 0.0) - exponent + near) for s in given}
        )
        return self._bounded(n, _times(value, 2.0**-near) if near else value, exponent)

    def _with(self, n: fx.Node, factors: Mapping[fx.Node, float]) -> Any:
        """The value of a node whose operands are multiplied by numbers."""
        before = {s: self.values[s] for s in factors}
        self.values.update({s: _times(self.values[s], f) for s, f in factors.items() if f != 1})
        try:
            return super().call(n)
        finally:
            self.values.update(before)

    def _bounded(self, n: fx.Node, value: Any, exponent: float) -> Any:
        """A value, rescaled where its numbers are out of bounds, and its exponent noted."""
        tensors = _tensors(value)
        if n.op != "call_function" or n not in self.activations or not tensors:
            return value
        largest = max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)
        if largest and math.isfinite(largest) and abs(math.log2(largest)) > _BITS:
            shift = math.floor(math.log2(largest))
            value, exponent = _times(value, 2.0**-shift), exponent + shift
        if exponent:
            self.exponents[n] = exponent
        return value


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [v for v in items if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_times(v, factor) for v in value)
    return value * factor if _tensors(value) else value
