"""Where units are read: every sum over a group's axis, as an Einstein sum over few numbers.

What an operand holds is reduced to one number an index of the axes that can shrink: 1 where any
element is not a known zero. A sum over these counts the products that are not known to vanish, so
that an index whose count is zero contributes nothing to any index that stays.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut import axes
from depcut.capture.program import Program, module_of
from depcut.coupling.groups import Coupling
from depcut.graph.arguments import argument
from depcut.graph.operators import is_aten
from depcut.ops.form import FORMS, Form
from depcut.ops.normalization import is_batch_norm
from depcut.ops.taint import TaintedOp, resolution, tainted
from depcut.reference.constants import interpret
from depcut.reference.run import Tensors


@dataclass(frozen=True)
class Absorber:
    """Where a constant contribution of an operator can go.

    Attributes:
        tensor: Name of a bias, or of the running mean of the batch norm that follows.
        sign: 1 to add it, -1 to subtract it.
    """

    tensor: str
    sign: int


@dataclass(frozen=True, eq=False)
class Contraction:
    """One operator that sums over axes that can shrink, and what its operands hold.

    Attributes:
        node: The operator.
        layer: Name of the module it belongs to, for messages.
        form: What it computes.
        places: (operand, dimension) of every contracted dimension.
        live: For each operand 1 where something is not a known zero, dimensions of axes that
            cannot shrink reduced to one index.
        wild: Whether anything is not finite, so that zeros do not make it vanish.
        fixed: Indices of the input's contracted dimension that hold one known number each.
        numbers: These numbers, 0 elsewhere.
        weight: What they are multiplied with, in full.
        absorber: What can absorb their contribution; None: `why` says why not.
        why: Reason in words.
    """

    node: fx.Node
    layer: str
    form: Form
    places: tuple[tuple[int, int], ...]
    live: tuple[Tensor, ...]
    wild: bool
    fixed: Tensor | None = None
    numbers: Tensor | None = None
    weight: Tensor | None = None
    absorber: Absorber | None = None
    why: str = ""


class _Collector:
    """Collects what reads the groups while the graph is interpreted.

    Args:
        coupling: The analysed architecture.
        noted: What is collected of a contraction.
    """

    def __init__(self, coupling: Coupling, noted: Callable[[Contraction], Contraction]) -> None:
        self.coupling, self.noted = coupling, noted
        self.contractions: list[Contraction] = []

    def __call__(self, op: TaintedOp) -> None:
        """Look at one operator before it is executed."""
        effects = self.coupling.effects.get(op.node)
        if effects is None:
            return
        places = [p for p in dict.fromkeys(effects.contracts) if self._shrinks(self._term(p))]
        if not places:
            return
        rule = FORMS.find(op.node.target)
        form = rule(op) if rule is not None else None
        if form is not None and {node for node, _ in places} <= set(form.operands):
            self.contractions.append(self.noted(self._contraction(op, form, places)))
            return
        for node, dim in places:
            alone = Form((node,), (tuple(string.ascii_letters[: op.value(node).ndim]),))
            self.contractions.append(self.noted(self._contraction(op, alone, [(node, dim)])))

    def _term(self, place: tuple[fx.Node, int]) -> axes.Term:
        dims = self.coupling.env[place[0]]
        assert isinstance(dims, tuple)
        return axes.resolve(dims[place[1]])

    def _shrinks(self, term: axes.Term) -> bool:
        return any(leaf in self.coupling.group_of for leaf in axes.leaves(axes.resolve(term)))

    def _contraction(
        self, op: TaintedOp, form: Form, places: list[tuple[fx.Node, int]]
    ) -> Contraction:
        at = tuple(
            (i, dim)
            for node, dim in places
            for i, operand in enumerate(form.operands)
            if operand is node
        )
        live = []
        for i, node in enumerate(form.operands):
            dims = self.coupling.env[node]
            assert isinstance(dims, tuple)
            value = op.nonzero(node)
            fixed = [
                d
                for d, (term, letters) in enumerate(zip(dims, form.labels[i], strict=True))
                if form.labels[i].count(letters) == len(letters) and not self._shrinks(term)
            ]
            live.append(value.amax(fixed, keepdim=True) if fixed else value.clone())
        wild = not all(bool(op.value(n).isfinite().all()) for n in form.operands)
        contraction = Contraction(op.node, module_of(op.node), form, at, tuple(live), wild)
        return self._with_constants(op, contraction) if len(form.operands) == 2 else contraction

    def _with_constants(self, op: TaintedOp, contraction: Contraction) -> Contraction:
        """What is constant in the first operand, if the second is a weight."""
        x, w = contraction.form.operands
        if not contraction.form.out and not contraction.form.why:
            return contraction
        if tainted(op.taint(w)):
            return contraction
        value, taint, dim = op.value(x), op.taint(x), contraction.form.channel
        rows = value.movedim(dim, 0).flatten(1)
        marks = taint.movedim(dim, 0).flatten(1).amax(1) > 0
        same = torch.isclose(rows, rows[:, :1], rtol=resolution(value), atol=0).all(1)
        fixed = ~marks & same & rows[:, 0].isfinite()
        numbers = torch.where(fixed, rows[:, 0], 0).double()
        absorber, why = None, contraction.form.why
        if not why:
            absorber, why = self._absorber(op)
        weight = op.value(w).detach()
        return replace(
            contraction, fixed=fixed, numbers=numbers, weight=weight, absorber=absorber, why=why
        )

    def _absorber(self, op: TaintedOp) -> tuple[Absorber | None, str]:
        """The tensor that can absorb a contribution, or why there is none."""
        node = op.node
        bias = node.args[0] if is_aten(node, "addmm") else op.arg("bias")
        if isinstance(bias, fx.Node):
            return self._owned(bias, 1, "its bias")
        users, rank = list(node.users), node.meta["val"].ndim
        weight = op.value(op.arg("weight"))
        channel = rank - 1 if is_aten(node, "linear") else rank - (weight.ndim - 1)
        if len(users) == 1 and is_batch_norm(users[0]) and channel == 1:
            after, mean = users[0], argument(users[0], "running_mean")
            if after.args[0] is node and not argument(after, "training") and mean is not None:
                return self._owned(mean, -1, "the running mean of its batch norm")
        return None, "it has no bias"

    def _owned(self, node: fx.Node, sign: int, what: str) -> tuple[Absorber | None, str]:
        program = self.coupling.program
        name = program.tensors.get(node)
        if name is None or name in program.anonymous:
            return None, f"{what} is computed"
        if len(node.users) > 1 or name in program.aliases:
            return None, f"{what} is used elsewhere, too"
        if node.meta["val"].ndim != 1:
            return None, f"{what} has {node.meta['val'].ndim} dimensions"
        return Absorber(name, sign), ""


def _whole(contraction: Contraction) -> Contraction:
    return contraction


def find_contractions(
    coupling: Coupling,
    model: nn.Module | Tensors,
    leaves: Sequence[Any] | None = None,
    noted: Callable[[Contraction], Contraction] = _whole,
) -> tuple[Contraction, ...]:
    """Everything that reads the groups of a model, in the order of execution, call by call.

    Args:
        coupling: The analysed architecture.
        model: The model whose tensors count, or these by name.
        leaves: Flat inputs to run on; left out, the captured examples.
        noted: What to return of each, where all of them take too much memory.
    """
    calls = []
    for call in coupling.calls:
        collector = _Collector(call, noted)
        interpret(call, model, collector, leaves)
        calls.append(collector.contractions)
    every = [c for contractions in calls for c in contractions]
    return tuple(every if len(calls) == 1 else _agreed(every, coupling.program))


def _agreed(contractions: list[Contraction], program: Program) -> list[Contraction]:
    """The contractions of several example calls; constant is what has one value in all of them.

    A bias that another call adds to something else cannot absorb a constant.
    """
    readers: dict[str, list[Contraction]] = {}
    for contraction in contractions:
        if contraction.absorber is not None:
            readers.setdefault(contraction.absorber.tensor, []).append(contraction)
    common: dict[str, Tensor | None] = {}
    for name, reading in readers.items():
        nodes = [n for p in program.examples for n in p.holders.get(name, ()) if n.users]
        common[name] = _common(reading) if len(nodes) == len(reading) else None
    out = []
    for contraction in contractions:
        absorber = contraction.absorber
        fixed = None if absorber is None else common[absorber.tensor]
        if absorber is None:
            out.append(contraction)
        elif fixed is None:
            why = f"another example call uses {absorber.tensor} otherwise"
            out.append(replace(contraction, absorber=None, why=why))
        else:
            first = readers[absorber.tensor][0].numbers
            assert first is not None
            numbers = torch.where(fixed, first, 0)
            out.append(replace(contraction, fixed=fixed, numbers=numbers))
    return out


def _common(contractions: list[Contraction]) -> Tensor | None:
    """Indices that hold the same number in all contractions; None if their weights differ."""
    first, *others = contractions
    assert first.fixed is not None
    assert first.numbers is not None
    assert first.weight is not None
    fixed = first.fixed
    for other in others:
        assert other.fixed is not None
        assert other.numbers is not None
        assert other.weight is not None
        if first.absorber != other.absorber or not torch.equal(first.weight, other.weight):
            return None
        close = torch.isclose(other.numbers, first.numbers, rtol=resolution(first.weight), atol=0)
        fixed = fixed & other.fixed & close
    return fixed
