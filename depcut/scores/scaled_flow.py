"""The flow of a network in numbers that neither overflow nor vanish at any depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from depcut.ops.registry import rule_for
from depcut.scores.flow import _NORMS, _PRODUCTS, _SOFTMAX, Flow

_BITS = 128  # a tensor whose largest number is beyond 2^128, or below 2^-128, is rescaled


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

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, to be multiplied by 2^exponent."""
        if all(s not in self.exponents for s in n.all_input_nodes):
            return self._bounded(n, super().run_node(n), 0.0)
        floats = [s for s in n.all_input_nodes if _tensors(self.env[s])]
        given = [s for s in floats if s in self.given]
        name = _name(n)
        e = {s: self.exponents.get(s, 0.0) for s in floats}
        if name in _SOFTMAX or rule_for(n.target) in _NORMS:
            return self._bounded(n, super().run_node(n), 0.0)
        if name == "scaled_dot_product_attention":
            value = n.args[2] if len(n.args) > 2 else n.kwargs["value"]
            exponent = e.get(value, 0.0) if isinstance(value, fx.Node) else 0.0
            return self._bounded(n, super().run_node(n), exponent)
        if name == "div" and len(floats) == 2:
            return self._bounded(n, super().run_node(n), e[floats[0]] - e[floats[1]])
        if name in _PRODUCTS:
            exponent = sum(e[s] for s in given) / max(len(given), 1)
            return self._bounded(n, super().run_node(n), exponent)
        return self._summed(n, floats, given)

    def _summed(self, n: fx.Node, floats: list[fx.Node], given: list[fx.Node]) -> Any:
        """An operator that is linear in activations and may add parameters to them."""
        alone = self._with(n, dict.fromkeys(given, 0.0)) if len(given) < len(floats) else None
        adds = any(bool(t.detach().any()) for t in _tensors(alone))
        own = [self.exponents.get(s, 0.0) for s in given] + [0.0] * adds
        exponent = max(own, default=0.0)
        value = self._with(n, {s: 2.0 ** (self.exponents.get(s, 0.0) - exponent) for s in given})
        if adds and exponent:
            # f(x) = A x + b is wanted of 2^e x, divided by 2^e: the share of b is too large.
            share = 1 - 2.0**-exponent
            value = _mapped(value, alone, lambda v, b: v - share * b)
        return self._bounded(n, value, exponent)

    def _with(self, n: fx.Node, factors: Mapping[fx.Node, float]) -> Any:
        """The value of a node whose operands are multiplied by numbers."""
        before = {s: self.env[s] for s in factors}
        self.env.update({s: _times(self.env[s], f) for s, f in factors.items() if f != 1})
        try:
            return super().run_node(n)
        finally:
            self.env.update(before)

    def _bounded(self, n: fx.Node, value: Any, exponent: float) -> Any:
        """A value, rescaled where its numbers are out of bounds, and its exponent noted."""
        found = _tensors(value)
        if n.op != "call_function" or n not in self.given or not found:
            return value
        largest = max((float(t.detach().abs().max()) for t in found if t.numel()), default=0.0)
        if largest and math.isfinite(largest) and abs(math.log2(largest)) > _BITS:
            shift = math.floor(math.log2(largest))
            value, exponent = _times(value, 2.0**-shift), exponent + shift
        if exponent:
            self.exponents[n] = exponent
        return value


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return ""
    return str(schema.name.partition("::")[2].rstrip("_"))


def _tensors(value: Any) -> list[torch.Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [v for v in items if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _times(value: Any, factor: float) -> Any:
    return _mapped(value, value, lambda v, _: v * factor)


def _mapped(value: Any, other: Any, function: Any) -> Any:
    """A function of two values, tensor by tensor."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, o, function) for v, o in zip(value, other, strict=True))
    return function(value, other) if _tensors(value) else value
