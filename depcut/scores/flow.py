"""A captured model made linear and positive: what flows through it says how units connect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from depcut.coupling.groups import Coupling
from depcut.ops import normalization
from depcut.ops.registry import Op, rule_for
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.support.torch_private import pytree, schema_of

_NORMS = (normalization.batch_norm, normalization.layer_norm, normalization.group_norm)
_PRODUCTS = frozenset("mul matmul mm bmm mv dot inner einsum bilinear outer".split())
_SOFTMAX = frozenset("softmax _softmax log_softmax _log_softmax".split())
# Pointwise operators of one tensor that are linear already, or make no activation of it.
_LINEAR = frozenset("mul div add clone alias contiguous detach masked_fill where".split())


class Flow(fx.Interpreter):
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
        super().__init__(coupling.program.graph)
        self.coupling, self.held = coupling, held
        program = coupling.program
        self.given: set[fx.Node] = set(program.inputs)
        for node in program.graph.graph.nodes:
            if not self.given.isdisjoint(node.all_input_nodes) and program.sizes[node] is not None:
                self.given.add(node)

    def total(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of all outputs for one example.

        Args:
            parameters: By name, in double precision.
        """
        program = self.coupling.program
        leaves = pytree.tree_leaves(example(Keep(self.coupling, {}), rows=1))
        inputs = iter(leaves)
        values = []
        for node in program.graph.graph.nodes:
            if node.op != "placeholder":
                continue
            name = program.tensors.get(node)
            if name is None:
                value = next(inputs)
                values.append(torch.ones_like(value) if _is_float(value) else value)
            elif name in parameters:
                values.append(parameters[name])
            else:
                held = program.constants if name in program.anonymous else self.held
                values.append(held[name].detach().clone())
        outputs = self.run(*map(_double, values), enable_io_processing=False)
        return torch.stack([o.sum() for o in outputs if _is_float(o)]).sum()

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, floating-point tensors in double precision."""
        schema = schema_of(n.target)
        if n.op != "call_function" or schema is None:
            return _double(super().run_node(n))
        name = schema.name.partition("::")[2].rstrip("_")
        if name.startswith("_assert"):
            return None
        first = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if rule_for(n.target) in _NORMS and isinstance(self.coupling.program.sizes[n], tuple):
            return self._norm(Op(n, self.coupling.env, self.coupling.program.sizes))
        if name == "_weight_norm":
            op = Op(n, self.coupling.env, self.coupling.program.sizes)
            return _unit_length(self._value(op, "v"), self._value(op, "g"), int(op.arg("dim")))
        if name == "scaled_dot_product_attention":
            return self._attention(Op(n, self.coupling.env, self.coupling.program.sizes))
        if name in _SOFTMAX:
            dim = n.args[1]
            assert isinstance(dim, int)
            return _shares(first, dim)
        tensors = [a for a in n.all_input_nodes if _is_float(self.env.get(a))]
        if name in ("sub", "rsub", "div") and len(tensors) == 2:
            a, b = (self.env[t] for t in tensors)
            if name == "div":
                return (a / _size(b)).expand(torch.broadcast_shapes(a.shape, b.shape))
            return a + b
        if self._is_function(n, name) and _is_float(first):
            return first
        result = _double(super().run_node(n))
        factors = [self.env[t] for t in tensors if t in self.given]
        if name in _PRODUCTS and len(factors) > 1:
            return result / math.prod(map(_size, factors)) ** (1 - 1 / len(factors))
        return result

    def _is_function(self, node: fx.Node, name: str) -> bool:
        """Whether an operator is a function of one floating-point tensor, element by element."""
        value = node.meta.get("val")
        if not _is_float(value) or name in _LINEAR:
            return False
        if name in ("to", "_to_copy", "neg", "type_as", "float", "sub", "rsub"):
            return True
        tensors = [a for a in node.all_input_nodes if isinstance(self.env.get(a), torch.Tensor)]
        tags = node.target.tags  # type: ignore[union-attr]
        return len(tensors) == 1 and torch.Tag.pointwise in tags

    def _value(self, op: Op, name: str) -> Any:
        found = op.arg(name) if op.has(name) else None
        return self.env[found] if isinstance(found, fx.Node) else None

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
