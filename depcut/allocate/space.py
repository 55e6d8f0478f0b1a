"""What may be removed: the steps of every class of groups, and what each of them loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depcut import axes
from depcut.allocate.shared import readers
from depcut.axes import Axis, Term
from depcut.coupling.groups import Coupling
from depcut.plan.cost import channel_families

Counts = NDArray[np.int64]
Scores = list[NDArray[np.float64]]

_CONVEXITY = 8
_COHERENCE = 4  # power of the number of readers by which a loss that all of them share grows
_FEWEST = 4


@dataclass(frozen=True)
class StepTie:
    """Groups that shrink together: each keeps size * t / steps units, for one integer t.

    Attributes:
        groups: Their numbers; `steps` divides the size of each.
        steps: In how many equal steps they go; equal counts are the case of steps = size.
    """

    groups: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Space:
    """What may be removed, in steps, per class of groups that shrink together.

    Attributes:
        class_of: Class number of each group.
        sizes: Dense count of each class.
        steps: How much of its count a step of each class removes.
        held: Whether a class must keep all its units.
        floors: Least count that a class must keep.
        units: Units of each group that one of its class's count stands for; 1 where the groups of
            the class keep equal counts.
        readers: How many layers read a class's groups, the most of them.
        nested: How many groups that are free to shrink number a layer's channels together, a
            class's group among them, the most of them; 1: it is a width of its own.
    """

    class_of: NDArray[np.int64]
    sizes: Counts
    steps: Counts
    held: NDArray[np.bool_]
    floors: Counts
    units: Counts
    readers: Counts
    nested: Counts

    def kept(self, taken: Counts) -> Counts:
        """Kept count of each group, [groups], after `taken` steps of each class, [classes]."""
        return np.asarray((self.sizes - taken * self.steps)[self.class_of] * self.units)

    def taken(self, counts: Counts) -> Counts:
        """Steps taken of each class, [classes], where the groups keep `counts`, [groups]."""
        first = np.array(
            [int(np.flatnonzero(self.class_of == n)[0]) for n in range(len(self.sizes))]
        )
        return np.asarray((self.sizes - counts[first] // self.units[first]) // self.steps)

    def per_class(self, gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """What one of each class's count costs, [classes], from what a unit of a group does."""
        weights = gradient * self.units
        return np.asarray(
            np.bincount(self.class_of, weights, minlength=len(self.sizes)), dtype=np.float64
        )

    @property
    def available(self) -> Counts:
        """Steps that each class can give up, [classes], none below its floor; 0 where held."""
        free = (self.sizes - self.floors) // self.steps
        return np.where(self.held, 0, free)


def space(
    coupling: Coupling,
    align: int,
    held: set[int],
    ties: Iterable[tuple[int, int]] = (),
    together: Sequence[StepTie] = (),
) -> Space:
    """The steps that respect ties and alignment.

    Args:
        coupling: The groups.
        align: Kept widths are multiples of it where they can be; 1: any width.
        held: Numbers of groups that keep everything.
        ties: Further pairs of groups that keep equal counts.
        together: Groups that shrink in common steps, whatever ties them otherwise.
    """
    import networkx as nx

    equal = nx.Graph()
    equal.add_nodes_from(g.index for g in coupling.groups)
    representative: dict[int, int] = {}
    for group in coupling.groups:
        if group.tied is not None:
            equal.add_edge(group.index, representative.setdefault(group.tied, group.index))
    equal.add_edges_from(ties)
    for tie in together:
        nx.add_path(equal, tie.groups)
    classes = [sorted(c) for c in nx.connected_components(equal)]
    counted = {tie.groups[0]: tie.steps for tie in together}
    natural = _steps(coupling, align)
    class_of = np.zeros(len(coupling.groups), dtype=np.int64)
    units = np.ones(len(coupling.groups), dtype=np.int64)
    sizes, steps, frozen, floors = [], [], [], []
    for number, members in enumerate(classes):
        class_of[members] = number
        given = [counted[m] for m in members if m in counted]
        size = given[0] if given else coupling.groups[members[0]].size
        dense = np.array([coupling.groups[m].size for m in members])
        units[members] = dense // size
        own = [
            int(n // math.gcd(n, u)) for n, u in zip(natural[members], units[members], strict=True)
        ]
        step = math.lcm(*own)
        sizes.append(size)
        step = step if size % step == 0 else max(own)
        # Of few steps, such as one a head, none is left out for the sake of an alignment.
        step = step if not given or size >= _FEWEST * step else 1
        demanded = (coupling.groups[m].multiple for m in members)
        hard = [m // math.gcd(m, int(u)) for m, u in zip(demanded, units[members], strict=True)]
        steps.append(math.lcm(step, *hard))
        floors.append(max(-(-coupling.groups[m].floor // int(units[m])) for m in members))
        uneven = len(given) > 1 or (dense != units[members] * size).any()
        uneven |= not given and (dense != size).any()
        frozen.append(bool(uneven) or any(m in held for m in members))
    held_mask = np.array(frozen, dtype=np.bool_)
    shared = np.ones(len(classes), dtype=np.int64)
    np.maximum.at(shared, class_of, readers(coupling))
    made = Space(
        class_of,
        np.array(sizes),
        np.array(steps),
        held_mask,
        np.array(floors),
        units,
        shared,
        np.ones(len(classes), dtype=np.int64),
    )
    for family in channel_families(coupling):
        free = [c for c in class_of[list(family)] if made.available[c]]
        np.maximum.at(made.nested, free, len(free))
    return made


def _steps(coupling: Coupling, align: int) -> Counts:
    """Units a step of each group, so that every width it occurs in stays a multiple of `align`."""
    out = np.ones(len(coupling.groups), dtype=np.int64)
    if align <= 1:
        return out
    for dims in coupling.dims.values():
        for term in dims:
            for leaf, cofactor in _cofactors(term, 1):
                group = coupling.group_of.get(leaf)
                if group is not None:
                    step = align // math.gcd(align, cofactor)
                    while step > 1 and (group.size % step or group.size < 2 * step):
                        step = step // 2 if step % 2 == 0 else 1
                    out[group.index] = max(out[group.index], step)
    return out


def _cofactors(term: Term, cofactor: int) -> list[tuple[Axis, int]]:
    """Each axis of a term with the number of indices that one of its indices stands for."""
    if isinstance(term, Axis):
        return [(term, cofactor)]
    children = term.factors if isinstance(term, axes.Product) else term.parts
    out = []
    for child in children:
        own = term.size // child.size if isinstance(term, axes.Product) else 1
        out += _cofactors(child, cofactor * own)
    return out


def marginals(where: Space, scores: Scores, additive: bool = False) -> Scores:
    """The loss of score of each step of each class, not decreasing.

    Scores that only rank (norms) say nothing of how much a group may give up: their loss is
    R^(1 - p) / (p - 1), where R is the share of the group's score that is left. A loss linear in R
    would empty the most expensive group before it touches the next. What several layers read, as
    all do the residual stream, errs in all of them at once: its loss is multiplied by a power of
    their number, so that it goes late.

    Where a group chooses row by row, the k-th cheapest of all rows go together: their mean counts.

    Args:
        where: The classes.
        scores: For each group [units], or [rows, units] where it chooses row by row.
        additive: Whether scores are losses that add up, also over groups.

    Returns:
        For each class its losses, [available steps].
    """
    sums = [np.zeros(n) for n in where.sizes]
    members = np.bincount(where.class_of, minlength=len(sums))
    for group, values in enumerate(scores):
        rows = np.atleast_2d(np.sort(values, axis=-1))
        losses = rows.sum(axis=0) if additive else rows.mean(axis=0)
        unit = int(where.units[group])
        sums[where.class_of[group]] += losses.reshape(-1, unit).sum(axis=1)
    out = []
    for total, number in zip(sums, range(len(sums)), strict=True):
        n, step = int(where.available[number]), int(where.steps[number])
        gone = total[: n * step].reshape(n, step).sum(axis=1)
        if not additive:
            whole = max(float(total.sum()), 1e-12 * members[number])
            left = np.append(1.0, np.maximum(1 - np.cumsum(gone) / whole, 1e-3))
            gone = np.diff(left ** (1 - _CONVEXITY)) / (_CONVEXITY - 1)
            gone *= float(where.readers[number]) ** _COHERENCE
        out.append(np.maximum.accumulate(gone))
    return out
