"""Which groups shrink where a class is built with other numbers: from shapes to counts."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property

from depcut import axes
from depcut.axes import Axis, Term
from depcut.coupling.groups import Coupling
from depcut.plan.attributes import Attribute, attributes_in, by_path
from depcut.plan.keep import Keep

Shapes = Mapping[str, tuple[int, ...]]

_MOST_FREE = 10  # undecided axes of one dimension that are tried in every combination


class Solver:
    """Solves new shapes for the groups that keep a share of their units, the others all.

    Args:
        coupling: The analysed model.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        ties: dict[int, int] = {}
        self.variable: dict[Axis, int] = {}
        for group in coupling.groups:
            first = group.index
            if group.tied is not None:
                first = ties.setdefault(group.tied, first)
            self.variable[group.axis] = first
        self.terms = {name: tuple(map(axes.resolve, dims)) for name, dims in coupling.dims.items()}

    @cached_property
    def sources(self) -> frozenset[Attribute]:
        """Attributes of modules that supply a size somewhere."""
        dense = Keep(self.coupling, {})
        return frozenset(
            attribute
            for node in self.coupling.effects
            if any(isinstance(value, int) for _, value, _, _ in dense.literals(node))
            for expr in by_path(node).values()
            for attribute in attributes_in(expr)
        )

    def variables(self, term: Term) -> list[int]:
        """The groups (of tied ones the first) in a term, in index order."""
        found = (self.variable[leaf] for leaf in axes.leaves(term) if leaf in self.variable)
        return list(dict.fromkeys(found))

    def groups_of(self, variables: Sequence[int]) -> tuple[int, ...]:
        """Numbers of all groups that some variables stand for."""
        wanted = set(variables)
        return tuple(g.index for g in self.coupling.groups if self.variable[g.axis] in wanted)

    def changed(self, before: Shapes, after: Shapes) -> set[int] | str:
        """Groups in dimensions that differ; a tensor that differs where it holds no group."""
        out: set[int] = set()
        for name, old in before.items():
            if old == after[name]:
                continue
            terms = self.terms.get(name)
            if terms is None or len(after[name]) != len(terms):
                return name
            for term, was, now in zip(terms, old, after[name], strict=True):
                if was != now:
                    found = self.variables(term)
                    if not found:
                        return name
                    out |= set(found)
        return out

    def shrunk(
        self, before: Shapes, after: Shapes, share: Fraction, inner: bool
    ) -> tuple[int, ...] | None:
        """The groups that keep a share of their units, if that explains the new shapes.

        Args:
            before: Shapes of the dense model's tensors.
            after: New ones.
            share: What each of the groups keeps.
            inner: Of several solutions, whether inner factors of products are to shrink; else
                outer ones.

        Returns:
            Numbers of the groups; None where there is no solution.
        """
        if isinstance(self.changed(before, after), str):
            return None
        known: dict[int, bool] = {}
        equations: list[tuple[Term, int]] = []
        for name, terms in self.terms.items():
            if name not in after:
                continue
            for term, was, now in zip(terms, before[name], after[name], strict=True):
                if was == now:
                    known.update(dict.fromkeys(self.variables(term), False))
                elif now > was:
                    return None
                else:
                    equations.append((term, now))
        equations = list({(id(t), n): (t, n) for t, n in equations}.values())
        search = _Search(self, equations, share, inner)
        return (
            self.groups_of([v for v, x in search.known.items() if x]) if search.run(known) else None
        )


class _Search:
    """Propagation of what is known of the variables through the equations; guesses where it ends.

    Args:
        solver: Knows the variables.
        equations: Terms, with the number of indices that stay.
        share: What a group that shrinks keeps.
        inner: Which factors are to shrink where either would do.
    """

    def __init__(
        self, solver: Solver, equations: list[tuple[Term, int]], share: Fraction, inner: bool
    ) -> None:
        self.solver, self.equations, self.share, self.inner = solver, equations, share, inner
        self.known: dict[int, bool] = {}
        self.holders: dict[int, list[int]] = defaultdict(list)
        for number, (term, _) in enumerate(equations):
            for variable in solver.variables(term):
                self.holders[variable].append(number)

    def run(self, known: Mapping[int, bool]) -> bool:
        """Whether there is a solution (guesses are not taken back)."""
        self.known = dict(known)
        if not self._propagated(range(len(self.equations))):
            return False
        for number in range(len(self.equations)):
            found = self._assignments(number)
            if not found:
                return False
            free = [v for v in found[0] if v not in self.known]
            if free:
                self.known.update(found[0])
                if not self._propagated({n for v in free for n in self.holders[v]}):
                    return False
        return True

    def _propagated(self, numbers: Sequence[int] | set[int] | range) -> bool:
        waiting = deque(numbers)
        while waiting:
            found = self._assignments(waiting.popleft())
            if not found:
                return False
            for variable, value in found[0].items():
                if variable not in self.known and all(f[variable] == value for f in found):
                    self.known[variable] = value
                    waiting.extend(self.holders[variable])
        return True

    def _assignments(self, number: int) -> list[dict[int, bool]]:
        """What the variables of an equation may be, the preferred first."""
        term, wanted = self.equations[number]
        variables = self.solver.variables(term)
        free = [v for v in variables if v not in self.known]
        if len(free) > _MOST_FREE:
            return []
        groups = self.solver.coupling.groups
        options = []
        for variable in free:
            whole = (groups[variable].size * self.share).denominator == 1
            options.append((True, False) if whole else (False,))
        out = []
        for values in itertools.product(*options):
            trial = {v: self.known[v] for v in variables if v in self.known}
            trial.update(zip(free, values, strict=True))
            if self._count(term, trial) == wanted:
                out.append(trial)
        # Sorted so that the first one shrinks the outermost (or innermost) variables.
        order = variables[::-1] if self.inner else variables
        out.sort(key=lambda t: [not t[v] for v in order])
        return out

    def _count(self, term: Term, values: Mapping[int, bool]) -> int:
        variable = self.solver.variable

        def kept(axis: Axis) -> int:
            number = variable.get(axis)
            shrinks = number is not None and values[number]
            return int(axis.size * self.share) if shrinks else axis.size

        return axes.count(term, kept)
