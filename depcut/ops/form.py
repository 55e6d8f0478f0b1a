"""The product form of an operator: what it sums, in Einstein's notation over its operands."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from depcut.ops.registry import Table
from depcut.ops.taint import TaintedOp


@dataclass(frozen=True)
class Form:
    """A contraction in Einstein's notation.

    Attributes:
        operands: The nodes multiplied.
        labels: For each operand one entry a dimension: letters of its row-major factors.
        sizes: Sizes of the factors of dimensions that have several.
        out: Letters of the dimension that a bias has, "" where none can be.
        why: Why the operator cannot take a constant out of the sum, in words; "" if it can.
    """

    operands: tuple[fx.Node, ...]
    labels: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...] = ()
    out: str = ""
    why: str = ""

    @property
    def channel(self) -> int:
        """The dimension of the first operand that the second one has as well."""
        shared = set("".join(self.labels[1]))
        return next(d for d, letters in enumerate(self.labels[0]) if shared & set(letters))

    def viewed(self, operand: int, tensor: Tensor) -> Tensor:
        """An operand with the factors of its dimensions apart; dimensions of one index stay."""
        known = dict(self.sizes)
        shape: list[int] = []
        for letters, size in zip(self.labels[operand], tensor.shape, strict=True):
            split = [known.get(c, -1) for c in letters]
            shape += [size] if len(letters) == 1 else split
        return tensor.reshape(shape)

    def sum_to(self, letters: str, operands: Sequence[Tensor]) -> Tensor:
        """The products of all operands, summed over all letters but these, as one dimension."""
        inputs = ",".join("".join(spec) for spec in self.labels)
        views = [self.viewed(i, t) for i, t in enumerate(operands)]
        return torch.einsum(f"{inputs}->{letters}", *views).reshape(-1)


FormRule = Callable[[TaintedOp], Form | None]

FORMS: Table[FormRule] = Table("product form")


def form(*targets: str) -> Callable[[FormRule], FormRule]:
    """Register how to write operators as products; None says that operands are read one by one.

    Args:
        targets: Operator names as for `rule`.

    Raises:
        RuleError: One of the targets has a form already.
    """
    return FORMS.register(*targets)


def leading(ndim: int) -> str:
    """Letters for so many leading dimensions, aligned at the right; none if negative."""
    return string.ascii_uppercase[: max(ndim, 0)][::-1]
