"""The outer axis of a group: in each of its rows the group may keep other units.

A choice row by row is sound where it is a choice for each row's own model, put together: the rows
must be told apart in every tensor that holds the group (weights, buffers, every activation), and no
operator may mix them while the group is still there. An outer axis that is free itself is mixed by
none of those operators that let it pass, or its indices could not be removed one by one; what is
left to look for are the operators that sum, or take statistics, over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import fx

from depcut import axes
from depcut.axes import Axis, Concat, Dims, Product, Term
from depcut.ops.registry import Effects, Output

# Frozen last of all, so that no operator can have been the one that mixes its indices.
OUTPUT = "model output"

Label = Callable[[], str]
Tensors = Iterable[tuple[Label, Dims]]


@dataclass(frozen=True)
class RowAxis:
    """The outer axis of a group.

    Attributes:
        axis: The axis by whose indices the group may choose; None if there is none.
        why: If there is none: the tensor or operator that rules it out.
    """

    axis: Axis | None
    why: str = ""


@dataclass(frozen=True)
class Occurrence:
    """One place of an axis in one tensor.

    Attributes:
        inner: The axis.
        partners: Axes that tell its rows apart there, nearest first; whether they are factors of
            the same product (they are another dimension otherwise).
    """

    inner: Axis
    partners: dict[Axis, bool]


def occurrences(dims: Dims, wanted: Mapping[Axis, str]) -> list[Occurrence]:
    """Every place of the wanted axes in a tensor's dimensions.

    Args:
        dims: Resolved terms of its dimensions.
        wanted: The axes to look for.
    """
    counts = [Counter(axes.leaves(term)) for term in dims]
    direct = [_factors(term) for term in dims]
    by_place: dict[tuple[Axis, int], Occurrence] = {}
    for i, term in enumerate(dims):
        others = [j for j in range(len(dims)) if j != i]
        across = {
            leaf: False
            for j in others
            for leaf in direct[j]
            if may_be_outer(leaf) and sum(counts[k][leaf] for k in others) == 1
        }
        for inner, left, beside in _walk(term, (), Counter()):
            if inner not in wanted:
                continue
            near = {a: True for a in left if may_be_outer(a) and beside[a] == 1}
            far = {a: False for a in across if not beside[a] and a is not inner}
            here = Occurrence(inner, near | far)
            # A dimension that holds the axis twice must hold it alike.
            known = by_place.get((inner, i), here).partners
            alike = {a: own for a, own in here.partners.items() if known.get(a) is own}
            by_place[inner, i] = Occurrence(inner, alike)
    return list(by_place.values())


def _walk(
    term: Term, left: tuple[Axis, ...], beside: Counter[Axis]
) -> Iterator[tuple[Axis, tuple[Axis, ...], Counter[Axis]]]:
    """Each leaf, the factors before it (nearest first), and all leaves of the factors beside it."""
    if isinstance(term, Axis):
        yield term, left, beside
    elif isinstance(term, Concat):
        for part in term.parts:
            yield from _walk(part, left, beside)
    else:
        each = [Counter(axes.leaves(f)) for f in term.factors]
        whole = sum(each, beside)
        for factor, own in zip(term.factors, each, strict=True):
            yield from _walk(factor, left, whole - own)
            if isinstance(factor, Axis):
                left = (factor, *left)


def _factors(term: Term) -> tuple[Axis, ...]:
    factors = term.factors if isinstance(term, Product) else (term,)
    return tuple(f for f in factors if isinstance(f, Axis))


def may_be_outer(axis: Axis) -> bool:
    """Whether no operator mixes the indices of an axis and lets it pass."""
    return axis.reason is None or axis.reason.why == OUTPUT


@dataclass
class _Search:
    """Candidates for the outer axis of each group, and what ruled out the others."""

    names: Mapping[Axis, str]
    left: dict[Axis, list[Axis]] = field(default_factory=dict)
    lost: dict[Axis, dict[Axis, str]] = field(default_factory=dict)
    near: dict[Axis, set[Axis]] = field(default_factory=dict)
    first: dict[Axis, str] = field(default_factory=dict)

    def lose(self, inner: Axis, outer: Axis, why: str) -> None:
        """Rule out one candidate."""
        if outer in self.left.get(inner, ()):
            self.left[inner].remove(outer)
            self.lost.setdefault(inner, {})[outer] = why

    def look(self, label: Label, dims: Dims) -> None:
        """Rule out what does not accompany each group in a tensor."""
        for place in occurrences(dims, self.names):
            inner = place.inner
            if inner not in self.left:
                self.left[inner], self.first[inner] = list(place.partners), label()
                self.near[inner] = {a for a, own in place.partners.items() if own}
            for outer in [a for a in self.left[inner] if a not in place.partners]:
                name = self.names.get(outer, "its outer axis")
                self.lose(inner, outer, f"{label()} holds it without {name!r}")

    def reduce(
        self, label: Label, operands: list[Dims], results: list[Dims], over: set[Axis]
    ) -> None:
        """Rule out what an operator mixes that sums, or takes statistics, over some axes."""
        remaining = {leaf for dims in results for term in dims for leaf in axes.leaves(term)}
        times = Counter(leaf for dims in results for t in dims for leaf in axes.leaves(t))
        for place in (o for dims in operands + results for o in occurrences(dims, self.names)):
            inner = place.inner
            for outer in [a for a, own in place.partners.items() if not own]:
                if outer in over and (inner not in over or inner in remaining):
                    self.lose(inner, outer, f"{label()} sums over {self.names.get(outer)!r} alone")
                if outer not in over and inner in over and times[outer] > 1:
                    self.lose(
                        inner, outer, f"{label()} pairs the rows of {self.names.get(outer)!r}"
                    )

    def result(self) -> dict[Axis, RowAxis]:
        """One outer axis for each group at most; what is an outer axis has none itself."""
        taken: set[Axis] = set()
        out: dict[Axis, RowAxis] = {}
        for inner in reversed(list(self.names)):
            candidates = self.left.get(inner, [])
            usable = [a for a in candidates if out.get(a, RowAxis(None)).axis is None]
            if usable and inner not in taken:
                out[inner] = RowAxis(usable[0])
                taken.add(usable[0])
            else:
                out[inner] = RowAxis(None, self._why(inner, bool(candidates)))
        return out

    def _why(self, inner: Axis, spare: bool) -> str:
        if spare:
            return "other groups choose by its own units"
        # Of the factors beside it, the one that went furthest was the likeliest.
        lost, near = self.lost.get(inner, {}), self.near.get(inner, set())
        likely = [why for a, why in lost.items() if a in near] or list(lost.values())
        why = likely[-1] if likely else ""
        return why or f"no other axis goes with it in {self.first.get(inner, 'any tensor')}"


def find_row_axes(
    names: Mapping[Axis, str],
    tensors: Mapping[str, Dims],
    env: Mapping[fx.Node, Output],
    effects: Mapping[fx.Node, Effects],
    label: Callable[[fx.Node], str],
) -> dict[Axis, RowAxis]:
    """The outer axis of each group.

    Args:
        names: Names of the groups, by axis, in their order.
        tensors: Resolved terms of parameters, buffers and constants, by name.
        env: Terms of every node.
        effects: What the rules recorded, by node.
        label: What messages call a node.
    """
    search = _Search(names)
    seen: set[tuple[int, ...]] = set()
    nodes = {node: shapes_of(output) for node, output in env.items()}
    held = [(partial(str, name), dims) for name, dims in tensors.items()]
    results = [(partial(label, node), d) for node, shapes in nodes.items() for d in shapes]
    for name, dims in [*held, *results]:
        key = tuple(map(id, dims))
        if key not in seen:
            seen.add(key)
            search.look(name, dims)
    for node, effect in effects.items():
        over = [t for n, dim in effect.contracts for d in nodes[n] for t in d[dim : dim + 1]]
        over += map(axes.resolve, effect.statistics)
        if over:
            operands = [d for n in node.all_input_nodes for d in nodes.get(n, ())]
            reduced = {leaf for term in over for leaf in axes.leaves(term)}
            search.reduce(partial(label, node), operands, nodes[node], reduced)
    return search.result()


def shapes_of(output: Output) -> list[Dims]:
    """Resolved terms of all tensors that a node stands for."""
    shapes = [output] if isinstance(output, tuple) else list(output or ())
    return [tuple(map(axes.resolve, shape)) for shape in shapes if shape is not None]
