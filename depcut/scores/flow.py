"""A captured model made linear and positive, whose derivatives are synaptic flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from depcut.coupling.groups import Coupling
from depcut.graph.ancestry import reached
from depcut.graph.interpreter import Interpreter
from depcut.graph.operators import base_name, is_operator, is_pointwise
from depcut.ops.kinds import NORMS, PRODUCTS, SOFTMAXES
from depcut.ops.registry import Op
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.support.torch_private import pytree

# Pointwise operators of one tensor that are linear already, or make no activation of it.
_LINEAR = frozenset("mul div add clone alias contiguous detach masked_fill where".split())


class Flow(Interpreter):
    """Runs a captured graph in double precision with everything but its linear paths taken out.

    Parameters are given (their absolute values, masked); floating-point inputs are ones, ids stay
    as they are. Pointwise functions of one tensor are the identity. A norm is the division by the
    mean of the whole tensor, held constant, times |gamma| plus |beta|: no statistics. A softmax is
    the division by its sum, held constant. A difference is a sum, a quotient is by the mean of its
    denominator, held constant, and a product of two activations is divided by the geometric mean
    of their means, held constant, so that numbers stay within bounds at any depth. Where there are
    only weights and activation functions, this is the network of SynFlow's paper.

    Args:
        coupling: The captured graph and its terms.
        held: Every tensor that the model holds, by name.
    """

    def __init__(self, coupling: Coupling, held: Mapping[str, torch.Tensor]) -> None:
        program = coupling.program
        super().__init__(program)
        self.coupling, self.held = coupling, held
        self.parameters: Mapping[str, torch.Tensor] = {}
        self.activations = reached(program, program.inputs, lambda n: program.sizes[n] is not None)

    def total(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of all outputs for one example.

        Args:
            parameters: By name, in double precision.
        """
        self.parameters = parameters
        outputs = self.run(pytree.tree_leaves(example(Keep(self.coupling, {}), rows=1)))
        return torch.stack([o.sum() for o in outputs if _is_float(o)]).sum()

    def given(self, _node: fx.Node, value: Any) -> Any:
        """Ones; ids stay as they are."""
        return _double(torch.ones_like(value) if _is_float(value) else value)

    def tensor(self, _node: fx.Node, name: str) -> Any:
        """A parameter as it was given, else the model's own tensor."""
        if name in self.parameters:
            return self.parameters[name]
        held = self.program.constants if name in self.program.anonymous else self.held
        return _double(held[name].detach().clone())

    def constant(self, node: fx.Node) -> Any:
        """An attribute of the graph."""
        return _double(super().constant(node))

    def call(self, n: fx.Node) -> Any:
        """The value of one node, floating-point tensors in double precision."""
        if not is_operator(n):
            return _double(super().call(n))
        name = base_name(n)
        if name.startswith("_assert"):
            return None
        first = self.values.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if n.target in NORMS and isinstance(self.coupling.program.sizes[n], tuple):
            return self._norm(Op(n, self.coupling.env, self.coupling.program.sizes))
        if name == "_weight_norm":
            op = Op(n, self.coupling.env, self.coupling.program.sizes)
            return _unit_length(self._value(op, "v"), self._value(op, "g"), int(op.arg("dim")))
        if name == "scaled_dot_product_attention":
            return self._attention(Op(n, self.coupling.env, self.coupling.program.sizes))
        if n.target in SOFTMAXES:
            dim = n.args[1]
            assert isinstance(dim, int)
            return _shares(first, dim)
        tensors = [a for a in n.all_input_nodes if _is_float(self.values.get(a))]
        if name in ("sub", "rsub", "div") and len(tensors) == 2:
            a, b = (self.values[t] for t in tensors)
            if name == "div":
                return (a / _size(b)).expand(torch.broadcast_shapes(a.shape, b.shape))
            return a + b
        if self._is_function(n, name) and _is_float(first):
            return first
        result = _double(super().call(n))
        factors = [self.values[t] for t in tensors if t in self.activations]
        if n.target in PRODUCTS and len(factors) > 1:
            return result / math.prod(map(_size, factors)) ** (1 - 1 / len(factors))
        return result

    def _is_function(self, node: fx.Node, name: str) -> bool:
        """Whether an operator is a function of one floating-point tensor, element by element."""
        value = node.meta.get("val")
        if not _is_float(value) or name in _LINEAR:
            return False
        if name in ("to", "_to_copy", "neg", "type_as", "float", "sub", "rsub"):
            return True
        tensors = [a for a in node.all_input_nodes if isinstance(self.values.get(a), torch.Tensor)]
        return len(tensors) == 1 and is_pointwise(node.target)

    def _value(self, op: Op, name: str) -> Any:
        operand = op.arg(name) if op.has(name) else None
        return self.values[operand] if isinstance(operand, fx.Node) else None

    def _norm(self, op: Op) -> torch.Tensor:
        x, weight, bias = (self._value(op, name) for name in ("input", "weight", "bias"))
        assert isinstance(x, torch.Tensor)
        out = x / _size(x)
        trailing = op.has("normalized_shape")
        for parameter, scale in ((weight, True), (bias, False)):
            if parameter is not None:
                per = parameter if trailing else parameter.reshape(-1, *[1] * (x.ndim - 2))
                out = out * per if scale else out + per
        return out

    def _attention(self, op: Op) -> torch.Tensor:
        names = ("query", "key", "value", "attn_mask")
        q, k, v, mask = (self._value(op, name) for name in names)
        if op.arg("enable_gqa") and q.shape[-3] != k.shape[-3]:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        logits = q @ k.transpose(-1, -2)
        if op.arg("is_causal"):
            logits = logits.tril()
        if mask is not None:
            logits = logits * mask if mask.dtype == torch.bool else logits + mask
        out: torch.Tensor = _shares(logits, -1) @ v
        return out


def _unit_length(v: torch.Tensor, g: torch.Tensor, dim: int) -> torch.Tensor:
    """g v / |v|, the norm held constant, over all dimensions but one (-1: over all)."""
    others = [d for d in range(v.ndim) if dim < 0 or d != dim]
    norm: torch.Tensor = torch.linalg.vector_norm(v.detach(), dim=others, keepdim=True)
    return v * g / norm.where(norm > 0, 1.0)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _double(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_double, value))
    return value.double() if _is_float(value) else value


def _size(value: torch.Tensor) -> float:
    """Mean of the absolute values, one number that is no variable; 1 for nothing but zeros."""
    return float(value.detach().abs().mean()) or 1.0


def _shares(logits: Any, dim: int) -> torch.Tensor:
    """Positive numbers divided by their sum, which is held constant; what is masked is zero."""
    positive: torch.Tensor = torch.nan_to_num(logits, neginf=0.0).clamp(min=0)
    total = positive.detach().sum(dim, keepdim=True)
    shares: torch.Tensor = positive / total.where(total > 0, 1.0)
    return shares
