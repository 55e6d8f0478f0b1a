"""Where units are read: every sum over a group's axis, as an Einstein sum over few numbers.

What an operand holds is reduced to one number an index of the axes that can shrink: 1 where any
element is not a known zero. A sum over these counts the products that are not known to vanish, so
that an index whose count is zero contributes nothing to any index that stays.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut import axes
from depcut.capture.program import module_of
from depcut.coupling.groups import Coupling
from depcut.ops.contraction import labels_of
from depcut.ops.taint import Step, base_name, tainted
from depcut.ops.taint_rules import is_padded, resolution
from depcut.reference.constants import interpret


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
class Reading:
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


def _batch(ndim: int) -> str:
    """Letters for leading dimensions, aligned at the right."""
    return string.ascii_uppercase[: max(ndim, 0)][::-1]


def form_of(step: Step) -> Form | None:
    """A contraction's notation; None for an operator whose operands are read one by one."""
    name = base_name(step.node)

    def rank(node: Any) -> int:
        return int(step.value(node).ndim)

    if name == "linear":
        x, w = step.arg("input"), step.arg("weight")
        if rank(w) != 2:
            return None
        return Form((x, w), ((*_batch(rank(x) - 1), "i"), ("o", "i")), out="o")
    if name.startswith("conv") and name.endswith("d"):
        return _convolution(step, name)
    if name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm"):
        a, b = step.node.args[1:3] if "add" in name else step.node.args[:2]
        left = (*_batch(rank(a) - 2), *("m" * (rank(a) > 1)), "k")
        right = (*_batch(rank(b) - 2), "k", *("n" * (rank(b) > 1)))
        return Form((a, b), (left, right), out="n" if name == "addmm" else "")  # type: ignore[arg-type]
    if name == "scaled_dot_product_attention" and not step.arg("enable_gqa"):
        q, k = step.arg("query"), step.arg("key")
        return Form((q, k), ((*_batch(rank(q) - 2), "l", "e"), (*_batch(rank(k) - 2), "s", "e")))
    if name == "einsum":
        nodes = list(step.arg("tensors"))
        specs = step.arg("equation").replace(" ", "").partition("->")[0].split(",")
        spelled = [labels_of(spec, rank(n)) for spec, n in zip(specs, nodes, strict=True)]
        letters = {c for spec in spelled for c in spec}
        free = iter(sorted(set(string.ascii_letters) - letters))
        renamed = {c: c if c.isalpha() else next(free) for c in sorted(letters)}
        return Form(tuple(nodes), tuple(tuple(renamed[c] for c in spec) for spec in spelled))
    return None


def _convolution(step: Step, name: str) -> Form:
    x, w = step.arg("input"), step.arg("weight")
    shape, groups = step.value(w).shape, int(step.value(step.arg("groups")))
    rank = len(shape) - 2
    batch = step.value(x).ndim - rank - 1
    inputs = (*"B"[:batch], "gi", *"pqr"[:rank])
    if "transpose" in name:
        factors = (("g", groups), ("i", shape[0] // groups))
        why = "it is a transposed convolution, whose kernels overlap unevenly"
        return Form((x, w), (inputs, ("gi", "o", *"uvw"[:rank])), factors, why=why)
    sizes: tuple[tuple[str, int], ...] = (
        ("g", groups),
        ("i", shape[1]),
        ("o", shape[0] // groups),
    )
    why = "it pads with zeros, so that the border differs" if is_padded(step) else ""
    return Form((x, w), (inputs, ("go", "i", *"uvw"[:rank])), sizes, out="go", why=why)


class Readings:
    """Collects what reads the groups while the graph is interpreted.

    Args:
        coupling: The analysed architecture.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.found: list[Reading] = []

    def __call__(self, step: Step) -> None:
        """Look at one operator before it is executed."""
        effects = self.coupling.effects.get(step.node)
        if effects is None:
            return
        places = [p for p in dict.fromkeys(effects.contracts) if self._shrinks(self._term(p))]
        if not places:
            return
        form = form_of(step)
        if form is not None and {node for node, _ in places} <= set(form.operands):
            self.found.append(self._reading(step, form, places))
            return
        for node, dim in places:
            alone = Form((node,), (tuple(string.ascii_letters[: step.value(node).ndim]),))
            self.found.append(self._reading(step, alone, [(node, dim)]))

    def _term(self, place: tuple[fx.Node, int]) -> axes.Term:
        dims = self.coupling.env[place[0]]
        assert isinstance(dims, tuple)
        return axes.resolve(dims[place[1]])

    def _shrinks(self, term: axes.Term) -> bool:
        return any(leaf in self.coupling.group_of for leaf in axes.leaves(axes.resolve(term)))

    def _reading(self, step: Step, form: Form, places: list[tuple[fx.Node, int]]) -> Reading:
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
            value = step.nonzero(node)
            fixed = [
                d
                for d, (term, letters) in enumerate(zip(dims, form.labels[i], strict=True))
                if form.labels[i].count(letters) == len(letters) and not self._shrinks(term)
            ]
            live.append(value.amax(fixed, keepdim=True) if fixed else value.clone())
        wild = not all(bool(step.value(n).isfinite().all()) for n in form.operands)
        made = Reading(step.node, module_of(step.node), form, at, tuple(live), wild)
        return self._with_constants(step, made) if len(form.operands) == 2 else made

    def _with_constants(self, step: Step, made: Reading) -> Reading:
        """What is constant in the first operand, if the second is a weight."""
        x, w = made.form.operands
        if not made.form.out and not made.form.why:
            return made
        if tainted(step.taint(w)):
            return made
        value, taint, dim = step.value(x), step.taint(x), made.form.channel
        rows = value.movedim(dim, 0).flatten(1)
        marks = taint.movedim(dim, 0).flatten(1).amax(1) > 0
        same = torch.isclose(rows, rows[:, :1], rtol=resolution(value), atol=0).all(1)
        fixed = ~marks & same & rows[:, 0].isfinite()
        numbers = torch.where(fixed, rows[:, 0], 0).double()
        absorber, why = None, made.form.why
        if not why:
            absorber, why = self._absorber(step)
        weight = step.value(w).detach()
        return replace(
            made, fixed=fixed, numbers=numbers, weight=weight, absorber=absorber, why=why
        )

    def _absorber(self, step: Step) -> tuple[Absorber | None, str]:
        """The tensor that can absorb a contribution, or why there is none."""
        name = base_name(step.node)
        bias = step.node.args[0] if name == "addmm" else step.arg("bias")
        if isinstance(bias, fx.Node):
            return self._owned(bias, 1, "its bias")
        users = list(step.node.users)
        rank = step.node.meta["val"].ndim
        channel = rank - 1 if name == "linear" else rank - (step.value(step.arg("weight")).ndim - 1)
        if len(users) == 1 and base_name(users[0]) == "batch_norm" and channel == 1:
            after = Step(users[0], step.values, step.taints)
            mean = after.arg("running_mean")
            if users[0].args[0] is step.node and not after.arg("training") and mean is not None:
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


def read(coupling: Coupling, model: nn.Module) -> tuple[Reading, ...]:
    """Everything that reads the groups of a model, in the order of execution.

    Args:
        coupling: The analysed architecture.
        model: The model whose tensors count.
    """
    readings = Readings(coupling)
    interpret(coupling, model, readings)
    return tuple(readings.found)
