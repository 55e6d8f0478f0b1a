"""Einstein sums: equal letters unify, letters that the result lacks are summed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch

from depcut import axes
from depcut.axes import Term
from depcut.graph.arguments import Call
from depcut.ops.form import Form, form
from depcut.ops.kinds import MATRIX_PRODUCTS, PRODUCTS
from depcut.ops.registry import Op, Output, rule
from depcut.ops.site import ContractionOp, Site, site
from depcut.ops.taint import TaintedOp, tainted, taints

MATRIX_PRODUCTS.add("aten.einsum")
PRODUCTS.add("aten.einsum")


@rule("aten.einsum")
def einsum(op: Op) -> Output:
    """Any product of tensors in Einstein's notation: equal letters unify."""
    equation = op.arg("equation").replace(" ", "")
    operands = list(op.arg("tensors"))
    inputs, arrow, output = equation.partition("->")
    shapes = [op.dims(n) for n in operands]
    labels = [labels_of(spec, len(s)) for spec, s in zip(inputs.split(","), shapes, strict=True)]
    if not arrow:
        flat = [c for spec in labels for c in spec]
        output = "".join(sorted(c for c in set(flat) if flat.count(c) == 1 and c.isalpha()))
        wanted = sorted({c for c in flat if not c.isalpha()}, reverse=True) + list(output)
    else:
        dots = max((sum(not c.isalpha() for c in spec) for spec in labels), default=0)
        wanted = labels_of(output, len(output.replace("...", "")) + dots)
    terms: dict[str, Term] = {}
    for spec, shape in zip(labels, shapes, strict=True):
        for label, term in zip(spec, shape, strict=True):
            if label not in terms or terms[label].size == 1:
                terms[label] = term
            elif term.size != 1:
                op.unify(terms[label], term)
    for node, spec in zip(operands, labels, strict=True):
        for i, label in enumerate(spec):
            if label not in wanted:
                op.contract(node, i)
    flat = [label for spec in labels for label in spec] + wanted
    # A label that no other operand and not the output has is summed beforehand.
    shared = [[label for label in spec if flat.count(label) > 1] for spec in labels]
    done = shared[0]
    for i, spec in enumerate(shared[1:], 1):
        # From left to right, two operands at a time; what nobody needs any more is summed.
        both = list(dict.fromkeys([*done, *spec]))
        op.macs(*(terms[label] for label in both))
        needed = {c for later in shared[i + 1 :] for c in later} | set(wanted)
        done = [label for label in both if label in needed]
    return tuple(axes.resolve(terms[label]) for label in wanted)


def labels_of(spec: str, ndim: int) -> list[str]:
    """The labels of an operand; the dimensions under "..." are numbered from the right."""
    left, dots, right = spec.partition("...")
    if not dots:
        return list(spec)
    hidden = ndim - len(left) - len(right)
    return [*left, *(str(i) for i in range(hidden - 1, -1, -1)), *right]


@taints("aten.einsum")
def einsum_taint(op: TaintedOp) -> Any:
    """Any product of tensors."""
    nodes = op.arg("tensors")
    total = torch.zeros(())
    for k, node in enumerate(nodes):
        if tainted(op.taint(node)):
            operands = [op.taint(n) if i == k else op.nonzero(n) for i, n in enumerate(nodes)]
            counted = op.node.target(op.arg("equation"), operands)  # type: ignore[operator]
            total = total.to(counted.device) + counted
    return (total > 0.5).float()


@form("aten.einsum")
def einsum_form(op: TaintedOp) -> Form | None:
    """The operator's own notation, letters in place of numbers."""
    nodes = list(op.arg("tensors"))
    specs = op.arg("equation").replace(" ", "").partition("->")[0].split(",")
    spelled = [labels_of(s, op.value(n).ndim) for s, n in zip(specs, nodes, strict=True)]
    letters = {c for spec in spelled for c in spec}
    free = iter(sorted(set(ascii_letters) - letters))
    renamed = {c: c if c.isalpha() else next(free) for c in sorted(letters)}
    return Form(tuple(nodes), tuple(tuple(renamed[c] for c in spec) for spec in spelled))


@dataclass(frozen=True)
class Einsum:
    """An Einstein sum of a parameter and one other operand.

    Attributes:
        which: Position of the parameter among the operands.
        given: Labels of the other operand.
        held: Labels of the parameter.
        blocks: Labels that both and the result have.
        free: Labels that only the other operand and the result have.
        summed: Labels that both have and the result has not.
        outputs: Labels that only the parameter and the result have.
    """

    which: int
    given: str
    held: str
    blocks: str
    free: str
    summed: str
    outputs: str

    @property
    def result(self) -> None:
        """None: the result's labels may be in any order."""

    def inputs(self, call: Call) -> torch.Tensor:
        """(blocks, vectors, in): in are the summed labels."""
        x = call["tensors"][1 - self.which]
        x = torch.einsum(f"{self.given}->{self.blocks}{self.free}{self.summed}", x)
        ends = len(self.blocks), x.ndim - len(self.summed)
        sizes = x.shape[: ends[0]].numel(), x.shape[ends[0] : ends[1]].numel()
        return x.reshape(*sizes, x.shape[ends[1] :].numel())

    def reads(self, nodes: Call, call: Call) -> tuple[Hashable, ...] | None:  # noqa: ARG002  (of a family)
        """Not known: the parameter's labels say in which order the others are."""
        return None

    def _turned(self, call: Call) -> torch.Tensor:
        """The parameter's labels in the order blocks, outputs, summed."""
        order = self.blocks + self.outputs + self.summed
        weight: torch.Tensor = call["tensors"][self.which]
        return weight.permute([self.held.index(c) for c in order])

    def matrix(self, call: Call) -> torch.Tensor:
        """(blocks, out, in): block, output and summed labels, each flattened."""
        w = self._turned(call)
        ends = len(self.blocks), len(self.blocks) + len(self.outputs)
        sizes = w.shape[: ends[0]].numel(), w.shape[ends[0] : ends[1]].numel()
        return w.reshape(*sizes, w.shape[ends[1] :].numel())

    def write(self, call: Call, matrix: torch.Tensor) -> None:
        """Write W of shape (blocks, out, in) into the parameter."""
        turned = self._turned(call)
        turned.copy_(matrix.reshape(turned.shape))


def _spelled(op: ContractionOp) -> str:
    """The equation with letters in place of dots, the same from the right for all operands."""
    equation: str = op.arg("equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    free = [c for c in ascii_letters if c not in equation]
    specs, most = inputs.split(","), 0
    for i, spec in enumerate(specs):
        if "..." in spec:
            count = len(op.dims(op.arg("tensors")[i])) - len(spec.replace("...", ""))
            specs[i] = spec.replace("...", "".join(free[:count][::-1]))
            most = max(most, count)
    return ",".join(specs) + arrow + output.replace("...", "".join(free[:most][::-1]))


@site("aten.einsum")
def einsum_sites(op: ContractionOp) -> list[Site]:
    """A sum over labels that a parameter shares with activations."""
    operands = list(op.arg("tensors"))
    inputs, arrow, output = _spelled(op).partition("->")
    specs = inputs.split(",")
    names = [op.parameter(n) for n in operands]
    if len(operands) != 2 or not arrow or names.count(None) != 1:
        return []
    which = 0 if names[0] is not None else 1
    held, given, name = specs[which], specs[1 - which], names[which]
    assert name is not None
    outputs = "".join(c for c in held if c not in given)
    shared = [c for c in held if c in given]
    blocks = "".join(c for c in shared if c in output)
    summed = "".join(c for c in shared if c not in output)
    single = len(set(held)) == len(held) and len(set(given)) == len(given)
    free = "".join(c for c in given if c in output and c not in blocks)
    if not (single and summed and all(c in output for c in outputs)):
        return []
    terms = dict(zip(held, op.stored[name], strict=True))
    rows = axes.product(*(terms[c] for c in blocks + outputs))
    family = Einsum(which, given, held, blocks, free, summed, outputs)
    return [Site(op.node, (name,), (), (tuple(terms[c] for c in summed),), rows, family)]
