"""MACs and parameters as polynomials in the kept counts, evaluated without tracing the model.

The count of a term is a sum of products of axis counts, and the cost of an operator a product of
counts. Both are compiled once into integer arrays. Where a machine works in blocks, a count is
rounded up to whole blocks before it is multiplied: the polynomial becomes a staircase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from depcut import axes
from depcut.axes import Axis, Dims, Term
from depcut.capture.capture import capture
from depcut.capture.inputs import Inputs
from depcut.coupling.groups import Coupling
from depcut.coupling.infer import infer_coupling
from depcut.graph.liveness import Gone

Counts = NDArray[np.float64]
Polynomial = dict[tuple[int, ...], float]
Blocked = Sequence[tuple[Polynomial, int]]

NOTHING = Gone()


def _expand(term: Term, number: dict[Axis, int]) -> Polynomial:
    """The count of a resolved term as monomials: group numbers to coefficient."""
    if isinstance(term, Axis):
        return {(number[term],): 1.0} if term in number else {(): float(term.size)}
    if isinstance(term, axes.Product):
        out: Polynomial = {(): 1.0}
        for factor in term.factors:
            inner = _expand(factor, number)
            product: Polynomial = {}
            for m, a in out.items():
                for n, b in inner.items():
                    key = tuple(sorted(m + n))
                    product[key] = product.get(key, 0.0) + a * b
            out = product
        return out
    total: Polynomial = {}
    for part in term.parts:
        for m, a in _expand(part, number).items():
            total[m] = total.get(m, 0.0) + a
    return total


def _padded(rows: list[tuple[int, ...]], fill: int) -> NDArray[np.int64]:
    width = max(map(len, rows), default=0)
    return np.array([[*r, *([fill] * (width - len(r)))] for r in rows], dtype=np.int64).reshape(
        len(rows), width
    )


def _stacked(tables: Sequence[NDArray[np.int64]], fill: int) -> NDArray[np.int64]:
    """The rows of several tables, padded to one width."""
    width = max(table.shape[1] for table in tables)
    pads = [((0, 0), (0, width - table.shape[1])) for table in tables]
    padded = [np.pad(t, pad, constant_values=fill) for t, pad in zip(tables, pads, strict=True)]
    return np.concatenate(padded)


@dataclass(frozen=True, repr=False)
class Cost:
    """A quantity as a function of how many units each group keeps.

    Attributes:
        monomials: Group numbers whose counts are multiplied, one row a monomial; padded with the
            number of groups, which stands for 1.
        coefficients: Factor of each monomial.
        starts: First monomial of each slot (the count of one term).
        blocks: What each slot's count is rounded up to a multiple of; 1 leaves it alone.
        items: Slots that are multiplied, one row a summand; padded with slot 0, which is 1.
        times: Factor of each summand.
        dense: Counts of the dense model.
        total: The quantity of the dense model.
        grid: What each group's count is rounded up to a multiple of; 1 leaves it alone.
    """

    monomials: NDArray[np.int64]
    coefficients: Counts
    starts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    items: NDArray[np.int64]
    times: Counts
    dense: Counts
    total: float = 0.0
    grid: NDArray[np.int64] | None = None

    def __call__(self, counts: NDArray[np.number]) -> float:
        """The quantity for the given kept counts (one number a group)."""
        return float(self.many(np.asarray(counts)[None])[0])

    def many(self, counts: NDArray[np.number]) -> Counts:
        """The quantity for several candidates.

        Args:
            counts: Kept counts of shape [candidates, groups].

        Returns:
            One number a candidate.
        """
        return np.asarray(self.summands(counts).sum(axis=1))

    def summands(self, counts: NDArray[np.number]) -> Counts:
        """What each summand comes to, [candidates, summands].

        Args:
            counts: Kept counts, [candidates, groups].
        """
        return np.asarray(self._slots(counts)[:, self.items].prod(axis=2) * self.times)

    def _slots(self, counts: NDArray[np.number]) -> Counts:
        """Counts of the slots' terms, in whole blocks: [candidates, slots]."""
        given = np.asarray(counts, dtype=np.float64)
        if self.grid is not None:
            given = np.minimum(np.ceil(given / self.grid) * self.grid, self.dense)
        values = np.concatenate([given, np.ones((len(given), 1))], axis=1)
        products = values[:, self.monomials].prod(axis=2) * self.coefficients
        slots = np.add.reduceat(products, self.starts, axis=1)
        whole = np.ceil(slots / self.blocks - 1e-9) * self.blocks
        return np.where(self.blocks > 1, whole, slots)

    def within(self, groups: NDArray[np.int64]) -> Cost:
        """The summands that depend on some of these groups; the others do not change with them.

        Args:
            groups: Group numbers.
        """
        touched = np.isin(self.monomials, groups).any(axis=1)
        by_slot = np.logical_or.reduceat(touched, self.starts)
        rows = by_slot[self.items].any(axis=1)
        used = np.unique(np.append(self.items[rows], 0))  # slot 0 stands for 1 and comes first
        lengths = np.diff(np.append(self.starts, len(self.coefficients)))
        kept = np.repeat(np.isin(np.arange(len(self.starts)), used), lengths)
        return replace(
            self,
            monomials=self.monomials[kept],
            coefficients=self.coefficients[kept],
            starts=np.cumsum(np.append(0, lengths[used][:-1])),
            blocks=self.blocks[used],
            items=np.searchsorted(used, self.items[rows]),
            times=self.times[rows],
        )

    def at(self, groups: NDArray[np.int64], counts: NDArray[np.number]) -> Cost:
        """The quantity where the counts of some groups are given, whatever it is called with.

        Args:
            groups: Group numbers.
            counts: Their counts.
        """
        values = np.ones(len(self.dense) + 1)
        values[groups] = counts
        fixed = np.isin(self.monomials, groups)
        return replace(
            self,
            monomials=np.where(fixed, len(self.dense), self.monomials),
            coefficients=self.coefficients
            * np.where(fixed, values[self.monomials], 1.0).prod(axis=1),
        )

    def less(self, amount: float) -> Cost:
        """The quantity, less an amount that depends on no count.

        Args:
            amount: What is taken off.
        """
        constant = np.zeros((1, self.items.shape[1]), dtype=self.items.dtype)  # slot 0 stands for 1
        return replace(
            self,
            items=np.concatenate([self.items, constant]),
            times=np.append(self.times, -amount),
            total=self.total - amount,
        )

    def scaled(self, factor: float) -> Cost:
        """So many times the quantity.

        Args:
            factor: How many times.
        """
        return replace(self, times=self.times * factor, total=self.total * factor)

    def plus(self, other: Cost) -> Cost:
        """The sum of this and another quantity of the same groups, rounded up on the same grid.

        Args:
            other: The other one.
        """
        # slot 0 stands for 1 in both, and is not taken twice
        behind = int(np.append(other.starts, len(other.coefficients))[1])
        moved = np.where(other.items == 0, 0, other.items + len(self.starts) - 1)
        starts = other.starts[1:] - behind + len(self.coefficients)
        return replace(
            self,
            monomials=_stacked((self.monomials, other.monomials[behind:]), len(self.dense)),
            coefficients=np.append(self.coefficients, other.coefficients[behind:]),
            starts=np.append(self.starts, starts),
            blocks=np.append(self.blocks, other.blocks[1:]),
            items=_stacked((self.items, moved), 0),
            times=np.append(self.times, other.times),
            total=self.total + other.total,
        )

    def gradient(self, counts: NDArray[np.number]) -> Counts:
        """Change of the quantity a unit, for every group, at the given counts.

        Where counts come in blocks, this is the slope of the staircase's ramp, not of its steps.
        """
        values = np.append(np.asarray(counts, dtype=np.float64), 1.0)
        factors = values[self.monomials]
        slots = np.add.reduceat(self.coefficients * factors.prod(axis=1), self.starts)
        picked = slots[self.items]
        by_slot = np.zeros(len(slots))
        for j in range(picked.shape[1]):
            others = np.delete(picked, j, axis=1).prod(axis=1)
            np.add.at(by_slot, self.items[:, j], self.times * others)
        by_slot[0] = 0.0
        lengths = np.diff(np.append(self.starts, len(self.coefficients)))
        weight = np.repeat(by_slot, lengths) * self.coefficients
        out = np.zeros(len(values))
        for j in range(factors.shape[1]):
            np.add.at(
                out, self.monomials[:, j], weight * np.delete(factors, j, axis=1).prod(axis=1)
            )
        return out[:-1]


def compile_cost(coupling: Coupling, items: Iterable[tuple[float, Dims]]) -> Cost:
    """Compile a sum of products of counts.

    Args:
        coupling: Whose groups the counts are of.
        items: (factor, terms whose counts are multiplied) summands.
    """
    number = {g.axis: g.index for g in coupling.groups}
    return compile_staircase(
        coupling,
        ((times, [(_expand(axes.resolve(t), number), 1) for t in terms]) for times, terms in items),
    )


def polynomial(coupling: Coupling, term: Term) -> Polynomial:
    """The count of a term as monomials: group numbers to coefficient.

    Args:
        coupling: Whose groups are numbered.
        term: Any of its terms.
    """
    return _expand(axes.resolve(term), {g.axis: g.index for g in coupling.groups})


def compile_staircase(coupling: Coupling, items: Iterable[tuple[float, Blocked]]) -> Cost:
    """Compile a sum of products of counts that are rounded up to whole blocks.

    Args:
        coupling: Whose groups the counts are of.
        items: (factor, (polynomial, block) pairs whose counts are multiplied) summands.
    """
    slots: dict[tuple[Any, int], int] = {}
    rows: dict[tuple[int, ...], float] = {}
    polynomials: list[tuple[Polynomial, int]] = [({(): 1.0}, 1)]
    for factor, counts in items:
        times, row = factor, []
        for count, block in counts:
            if len(count) == 1 and () in count:
                times *= count[()]
                continue
            key = (tuple(sorted(count.items())), block)
            if key not in slots:
                slots[key] = len(polynomials)
                polynomials.append((count, block))
            row.append(slots[key])
        signature = tuple(sorted(row))
        rows[signature] = rows.get(signature, 0.0) + times
    flat = [(m, c) for p, _ in polynomials for m, c in p.items()]
    sizes = [len(p) for p, _ in polynomials]
    cost = Cost(
        monomials=_padded([m for m, _ in flat], len(coupling.groups)),
        coefficients=np.array([c for _, c in flat]),
        starts=np.cumsum([0, *sizes[:-1]]),
        blocks=np.array([block for _, block in polynomials]),
        items=_padded(list(rows) or [()], 0),
        times=np.array(list(rows.values()) or [0.0]),
        dense=np.array([g.size for g in coupling.groups], dtype=np.float64),
    )
    return replace(cost, total=cost(cost.dense))


Items = list[tuple[float, Dims]]


def _macs(coupling: Coupling, gone: Gone) -> Items:
    program = coupling.program
    effects = [e for n, e in coupling.effects.items() if n in program.sizes and n not in gone.nodes]
    return [(t / program.batch, d) for e in effects for t, d in e.macs]


def _params(coupling: Coupling, gone: Gone) -> Items:
    program = coupling.program
    names = (program.parameters & coupling.dims.keys()) - gone.tensors
    own = [n for n in coupling.dims if n in names and program.aliases.get(n, (n,))[0] == n]
    return [(1.0, coupling.dims[n]) for n in own]


def channel_families(coupling: Coupling) -> tuple[tuple[int, ...], ...]:
    """Groups that number a layer's channels together, as heads and the features of each do.

    Args:
        coupling: The groups.

    Returns:
        Distinct tuples of group numbers, whose counts are multiplied; every group is in one.
    """
    number = {g.axis: g.index for g in coupling.groups}
    terms = {(m.tensor, m.dim) for g in coupling.groups for m in g.members if m.role == "producer"}
    found = {
        family: None
        for tensor, dim in sorted(terms)
        for family in _expand(axes.resolve(coupling.dims[tensor][dim]), number)
        if family
    }
    within = {i for family in found for i in family}
    return (*found, *((g.index,) for g in coupling.groups if g.index not in within))


def _channels(coupling: Coupling, gone: Gone) -> Items:
    groups = coupling.groups
    left = {g.index for g in groups if not gone.tensors.issuperset(m.tensor for m in g.members)}
    families = (f for f in channel_families(coupling) if left.issuperset(f))
    return [(1.0, tuple(groups[i].axis for i in f)) for f in families]


# The summands of each quantity: a factor, and the terms whose counts are multiplied.
ITEMS = {"macs": _macs, "params": _params, "channels": _channels}


def dense_total(items: Items) -> float:
    """The quantity of the dense model, without compiling it.

    Args:
        items: Its summands.
    """
    return sum(times * math.prod(term.size for term in dims) for times, dims in items)


def macs(coupling: Coupling, gone: Gone = NOTHING) -> Cost:
    """Multiply-accumulates of one example (convolutions, matrix products, attention)."""
    return compile_cost(coupling, _macs(coupling, gone))


def params(coupling: Coupling, gone: Gone = NOTHING) -> Cost:
    """Number of parameters; shared ones once."""
    return compile_cost(coupling, _params(coupling, gone))


def channels(coupling: Coupling, gone: Gone = NOTHING) -> Cost:
    """Number of channels of all layers; those of layers that shrink together once."""
    return compile_cost(coupling, _channels(coupling, gone))


COSTS = {"macs": macs, "params": params, "channels": channels}


def count_macs(model: nn.Module, inputs: Inputs = None) -> int:
    """Multiply-accumulates of one example.

    Args:
        model: Any model that depcut can capture.
        inputs: Example inputs, as for `depcut.shrink`.
    """
    return round(macs(infer_coupling(capture(model, inputs))).total)


def count_params(model: nn.Module) -> int:
    """Number of parameters; shared ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())
