"""Which elements stay the same for all inputs, operator by operator, against runs on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import depcut
from depcut.plan.keep import Keep
from depcut.reference.constants import interpret
from depcut.reference.run import Reference

KNOWN = torch.tensor([1.0, 0.0, 2.0, 0.0, 3.0, 0.0])  # a factor that is zero at three of six places
FLAGS = KNOWN > 0


class Applied(nn.Module):
    """A layer, an operator on what it returns, and another layer."""

    def __init__(self, operator: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(width, 3)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operator(self.first(x)))


def overwritten(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x * KNOWN)


def paired(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex((x * KNOWN).reshape(-1, 3, 2))
    return torch.view_as_real(pairs).flatten(1)


# Operator, its width, and how many of its six (or three) features are the same for all inputs.
OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "a product with zeros": (lambda x: x * KNOWN, 6, 3),
    "a function of a product": (lambda x: torch.tanh(x * KNOWN), 6, 3),
    "a sum of two": (lambda x: x * KNOWN + x.flip(0) * KNOWN, 6, 3),
    "where": (lambda x: torch.where(FLAGS, x, torch.zeros_like(x)), 6, 3),
    "where, the other way": (lambda x: torch.where(FLAGS, torch.ones_like(x), x), 6, 3),
    "masked_fill": (lambda x: x.masked_fill(FLAGS, 0.5), 6, 3),
    "masked_fill by the input": (lambda x: x.masked_fill(x > 0, 0.5), 6, 0),
    "dropout": (lambda x: functional.dropout(x * KNOWN, 0.5, training=False), 6, 3),
    "copy": (overwritten, 6, 3),
    "type_as": (lambda x: (x * KNOWN).type_as(KNOWN), 6, 3),
    "to": (lambda x: (x * KNOWN).double().float(), 6, 3),
    "clone and contiguous": (lambda x: (x * KNOWN).clone().contiguous(), 6, 3),
    "pairs, of which nothing is known": (paired, 6, 0),
    "glu": (lambda x: functional.glu(torch.cat([x * KNOWN, x], -1), -1), 6, 3),
    "glu, its gate known": (lambda x: functional.glu(torch.cat([x, x * KNOWN], -1), -1), 6, 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_called_constant_is_constant(name: str) -> None:
    operator, width, constant = OPERATORS[name]
    torch.manual_seed(0)
    model, inputs = Applied(operator, width).eval(), torch.randn(2, 5)
    coupling = depcut.analyze(model, inputs).coupling
    known: dict[Any, tuple[Tensor, Tensor]] = {}

    def look(op: Any) -> None:
        for node in op.inputs:
            if isinstance(op.values[node], Tensor) and isinstance(op.taints[node], Tensor):
                known.setdefault(node, (op.values[node].clone(), op.taints[node].clone()))

    interpret(coupling, model, look)
    changed = [3 * torch.randn_like(inputs)]
    with torch.no_grad():
        _, values = Reference(Keep(coupling, {}), model).run(changed, watch=set(known))
    for node, (value, taint) in known.items():
        fixed = (taint == 0).broadcast_to(value.shape)
        torch.testing.assert_close(values[node][fixed], value[fixed], msg=str(node))
    last = next(n for n in reversed(list(known)) if known[n][0].shape == (2, width))
    assert int((known[last][1] == 0).broadcast_to(2, width).all(0).sum()) == constant
