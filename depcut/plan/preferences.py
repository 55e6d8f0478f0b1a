"""Which widths a class can express only together: one attribute for two axes, an implicit scale.

These are preferences, not couplings: a plan that ignores them is carried out with generated
submodules. Allocation follows them as long as the budget can be met.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from depcut import axes
from depcut.axes import Axis, Term
from depcut.capture.provenance import call_of, literals_of
from depcut.coupling.groups import Coupling
from depcut.ops.registry import Literal
from depcut.plan.attributes import by_path, number_of
from depcut.plan.keep import Keep


@dataclass(frozen=True)
class Preferences:
    """Groups whose widths the model's classes express only together, or not at all, by number.

    Attributes:
        ties: Pairs that should keep equally many units.
        holds: Groups that should keep all units.
    """

    ties: tuple[tuple[int, int], ...]
    holds: frozenset[int]


def preferences(coupling: Coupling) -> Preferences:
    """The equal and unchanged widths with which a model's own classes suffice.

    Args:
        coupling: The analysed architecture.
    """
    ties: list[tuple[int, int]] = []
    spared = _with_cofactor(coupling)
    holds = (_pinned(coupling) | _computed_with(coupling)) & spared
    for terms in _same_number(coupling):
        leaves = {a for t in terms for a in axes.leaves(t) if a in coupling.group_of}
        numbers = {coupling.group_of[a].index for a in leaves}
        if all(isinstance(t, Axis) for t in terms) and len(leaves) == len(terms):
            first, *others = sorted(numbers)
            ties += [(first, other) for other in others]
        elif any(map(axes.is_frozen, terms)) or numbers <= spared:
            holds |= numbers
    return Preferences(tuple(ties), frozenset(holds))


def _same_number(coupling: Coupling) -> list[list[Term]]:
    """Distinct terms whose counts one attribute, or one size that the code reads, supplies."""
    sources: dict[Any, dict[int, Term]] = {}
    dense = Keep(coupling, {})
    for node in coupling.effects:
        literals = [
            (lit, value) for lit, value, _, _ in dense.literals(node) if isinstance(value, int)
        ]
        provenance = by_path(node) if literals else {}
        for literal, _ in literals:
            expr = provenance.get(literal.path)
            if literal.sign < 0:
                continue
            term = axes.resolve(literal.term)
            if not isinstance(expr, tuple):
                place = _place(coupling, node, literal)
                if place is not None:
                    sources.setdefault(place, {})[id(term)] = term
            elif expr[0] == "attr":
                sources.setdefault(expr, {})[id(term)] = term
            elif expr[0] == "size":
                origin = coupling.program.marks.get(expr[1])
                dims = coupling.env.get(origin) if origin is not None else None
                if isinstance(dims, tuple):
                    read = axes.resolve(dims[expr[2]])
                    sources.setdefault((id(read), id(term)), {}).update(
                        {id(read): read, id(term): term}
                    )
    return [list(terms.values()) for terms in sources.values() if len(terms) > 1]


def _place(coupling: Coupling, node: fx.Node, literal: Literal) -> Any:
    """Where in the code a number that is typed in stands: for all calls from there it is one."""
    number, index = call_of(node), number_of(node, literal.path)
    if number is None or index is None:
        return None
    program = next(p for p in coupling.program.captured if node in p.sizes)
    call = program.torch_calls[number]
    return call.module, tuple((f.code, f.span) for f in call.frames), call.numbers[index][0]


def _pinned(coupling: Coupling) -> set[int]:
    """Groups that the default of an argument depends on (the scale of attention)."""
    index = coupling.group_of
    return {
        index[leaf].index
        for effects in coupling.effects.values()
        for node, dim in (effects.contracts if effects.pins else ())
        for leaf in axes.leaves(axes.resolve(coupling.env[node][dim]))  # type: ignore
        if leaf in index
    }


def _computed_with(coupling: Coupling) -> set[int]:
    """Groups whose size the code computes with where it is no size, e.g. a scale 1/sqrt(d)."""
    dense = Keep(coupling, {})
    sizes = {
        (id(literals_of(node)), value)
        for node in coupling.effects
        for _, value, _, _ in dense.literals(node)
        if isinstance(value, int)
    }
    out: set[int] = set()
    for node in (n for p in coupling.program.examples for n in p.graph.graph.nodes):
        received = literals_of(node)
        for value, expr in received:
            if isinstance(expr, tuple) and (id(received), value) not in sizes:
                for term in _read_sizes(expr, coupling):
                    leaves = axes.leaves(axes.resolve(term))
                    out |= {coupling.group_of[a].index for a in leaves if a in coupling.group_of}
    return out


def _read_sizes(expr: Any, coupling: Coupling) -> Iterator[Term]:
    """The terms whose sizes an expression reads."""
    if not isinstance(expr, tuple) or expr[0] == "attr":
        return
    if expr[0] in ("size", "numel"):
        node = coupling.program.marks.get(expr[1])
        dims = coupling.env.get(node) if node is not None else None
        if isinstance(dims, tuple):
            yield from dims[expr[2] : expr[2] + 1] if expr[0] == "size" else dims
        return
    for part in expr[1:]:
        yield from _read_sizes(part, coupling)


def _with_cofactor(coupling: Coupling) -> set[int]:
    """Groups that are a factor next to another free one, which may go instead."""
    index = coupling.group_of
    out: set[int] = set()
    for dims in coupling.dims.values():
        for term in dims:
            for product in _products(term):
                free = [{a for a in axes.leaves(f) if a in index} for f in product.factors]
                if sum(map(bool, free)) > 1:
                    out |= {index[a].index for leaves in free for a in leaves}
    return out


def _products(term: Term) -> Iterator[axes.Product]:
    if isinstance(term, axes.Product):
        yield term
    for child in getattr(term, "factors", ()) or getattr(term, "parts", ()):
        yield from _products(child)
