"""Where zeros in a dense model's parameters make it compute what the smaller model will.

A removed unit counts for nothing where the slices that read it are zero: the columns of the weights
that contract its axis. Where two activations are contracted (queries with keys), the slices that
make it are zeroed instead. No zeros say what a statistic over fewer indices is (LayerNorm, mean,
softmax): groups that one runs over have no places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from depcut import axes
from depcut.capture.program import where
from depcut.coupling.groups import Coupling, Group
from depcut.graph.ancestry import ancestors, reached
from depcut.ops.registry import Effects, Output

Place = tuple[str, int]


@dataclass(frozen=True)
class Places:
    """What can be masked.

    Attributes:
        zeros: (parameter, dimension) pairs to zero, by group number.
        excluded: Why a group cannot be masked, by group number.
    """

    zeros: Mapping[int, frozenset[Place]]
    excluded: Mapping[int, str]

    def without(self, reasons: Mapping[int, str]) -> Places:
        """The same, with further groups excluded."""
        zeros = {n: p for n, p in self.zeros.items() if n not in reasons}
        return Places(zeros, {**self.excluded, **reasons})


def find_places(coupling: Coupling) -> Places:
    """Where to zero each group's units, by the operators' rules; see `probed` for a trial.

    Args:
        coupling: The analysed architecture.
    """
    excluded: dict[int, str] = {}
    zeros: dict[int, set[Place]] = {g.index: set() for g in coupling.groups}
    origins = _Origins(coupling)
    for node, effects in coupling.effects.items():
        for term in effects.statistics:
            for group in _groups_in(coupling, term):
                excluded.setdefault(group.index, f"statistics over its units at {where(node)}")
        for place in effects.contracts:
            for group in _groups_at(coupling, place):
                zeros[group.index] |= origins.read(place, effects, group) or _made(coupling, group)
    for group in coupling.groups:
        if not zeros[group.index]:
            excluded.setdefault(group.index, "nothing that reads its units was found")
    places = Places(
        {n: frozenset(p) for n, p in zeros.items() if n not in excluded},
        excluded,
    )
    return places.without(tied_to(coupling, excluded))


def tied_to(coupling: Coupling, numbers: Iterable[int]) -> dict[int, str]:
    """Groups that must keep as many units as one of these, with the reason.

    Args:
        coupling: The analysed architecture.
        numbers: Numbers of groups that cannot be masked.
    """
    ties = {coupling.groups[n].tied: coupling.groups[n].name for n in numbers}
    known = set(numbers)
    return {
        g.index: f"it must keep as many units as {ties[g.tied]!r}, which cannot be masked"
        for g in coupling.groups
        if g.tied is not None and g.tied in ties and g.index not in known
    }


def _groups_in(coupling: Coupling, term: axes.Term) -> Iterator[Group]:
    for leaf in dict.fromkeys(axes.leaves(axes.resolve(term))):
        group = coupling.group_of.get(leaf)
        if group is not None:
            yield group


def _groups_at(coupling: Coupling, place: tuple[fx.Node, int]) -> Iterator[Group]:
    dims: Output = coupling.env[place[0]]
    if isinstance(dims, tuple):
        yield from _groups_in(coupling, dims[place[1]])


def _made(coupling: Coupling, group: Group) -> set[Place]:
    """Every parameter slice that makes or reads a unit."""
    return {(m.tensor, m.dim) for m in group.members if m.tensor in coupling.program.parameters}


class _Origins:
    """Parameters behind the nodes that no input reaches, such as a weight-normed weight."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.tensors: dict[fx.Node, str] = {}
        self.activations: set[fx.Node] = set()
        for program in coupling.program.captured:
            self.tensors |= program.tensors
            self.activations |= reached(program, program.inputs)

    def _names(self, node: fx.Node) -> set[str]:
        """Names of all tensors that a node is computed from; none if an input reaches it."""
        if node in self.activations:
            return set()
        return {self.tensors[n] for n in ancestors(node) if n in self.tensors}

    def read(self, place: tuple[fx.Node, int], effects: Effects, group: Group) -> set[Place]:
        """The parameter slices that one operand of a contraction reads a unit with."""
        for node, dim in filter(None, (place, effects.counterparts.get(place))):
            names = self._names(node)
            if group in _groups_at(self.coupling, (node, dim)):
                slices = {p for p in _made(self.coupling, group) if p[0] in names}
                if slices:
                    return slices
        return set()
