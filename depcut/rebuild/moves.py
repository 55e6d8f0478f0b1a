"""Which numbers of a recipe shrink which groups, found by building the class with others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from depcut.allocate.space import StepTie
from depcut.rebuild.builder import Builder
from depcut.rebuild.recipe import Path
from depcut.rebuild.solve import Solver
from depcut.rebuild.twin import alike, changes

_MOST_STEPS = 12  # divisors that are tried, the finest first
_MOST_KNOBS = 3  # that one move changes
_MOST_ALONE = 6  # numbers that cannot change alone, of which pairs are tried
_NOT_ALONE = "it cannot change alone"


@dataclass(frozen=True)
class Move:
    """Numbers of a recipe that shrink together, and the groups that shrink with them.

    Attributes:
        powers: The numbers; each becomes value * (t / steps) ** power. Of power -1 are factors of
            widths that shrink, where the product is to stay.
        tie: The groups, and how many steps there are.
    """

    powers: tuple[tuple[Path, int], ...]
    tie: StepTie

    def factors(self, share: Fraction) -> dict[Path, Fraction]:
        """What each number is multiplied with where a share of the units stays."""
        return {path: share**power for path, power in self.powers}


@dataclass(frozen=True, eq=False)
class Knob:
    """Numbers that are changed as one: a single one, or those of a list.

    Attributes:
        paths: The numbers.
        groups: Variables in dimensions that change with them.
        modules: Modules of which a plain attribute changes with them that a size is computed from,
            layers of which a tensor changes, and what these are in.
        factor: Whether it is a float, by which widths are multiplied.
    """

    paths: tuple[Path, ...]
    groups: frozenset[int]
    modules: frozenset[str]
    factor: bool


def knobs(builder: Builder, solver: Solver) -> list[Knob]:
    """The numbers that sizes of groups depend on, and those that code computes sizes from.

    Args:
        builder: Of the class.
        solver: Of the model's coupling.
    """
    found = {(path,): _knob(builder, solver, (path,)) for path in builder.base}
    alone = [p for (p,), knob in found.items() if knob is _NOT_ALONE and isinstance(p[-1], str)]
    pairs = itertools.combinations(alone[:_MOST_ALONE], 2)
    every = [*found.values()]
    every += [_knob(builder, solver, pair) for pair in pairs if pair[0][:-1] == pair[1][:-1]]
    return [knob for knob in every if isinstance(knob, Knob)]


def lists(builder: Builder, solver: Solver, besides: Collection[Path]) -> list[Knob]:
    """The lists of numbers that sizes of groups depend on, each as a whole.

    Args:
        builder: Of the class.
        solver: Of the model's coupling.
        besides: Numbers that are dealt with already: lists of these alone are left out.
    """
    found: dict[Path, list[Path]] = {}
    for path in builder.base:
        if isinstance(path[-1], int):
            found.setdefault(path[:-1], []).append(path)
    every = [
        _knob(builder, solver, tuple(paths))
        for paths in found.values()
        if len(paths) > 1 and not {*paths} <= {*besides}
    ]
    return [knob for knob in every if isinstance(knob, Knob)]


def _knob(builder: Builder, solver: Solver, paths: tuple[Path, ...]) -> Knob | str | None:
    """What follows some numbers; None where it is nothing, or what cannot shrink."""
    value = min(builder.base[path] for path in paths)
    factor = all(isinstance(builder.base[path], float) for path in paths)
    shares = [Fraction(1, 2), Fraction(3, 4), Fraction(2, 3)]
    if isinstance(value, int) and value > 1:
        shares += [Fraction(value - 1, value), Fraction(1, value)]
    for share in shares:
        values = builder.scaled(dict.fromkeys(paths, share))
        twin = builder.twin(values) if values else None
        if twin is None:
            continue
        if not alike(builder.dense, twin):
            return _NOT_ALONE
        touched = solver.changed(builder.dense.shapes, twin.shapes)
        if isinstance(touched, str):
            return None
        places = changes(builder.dense, twin).keys() & solver.sources
        if not touched and not places:
            return None
        shapes = builder.dense.shapes.items()
        modules = {name for name, _ in places}
        for name, shape in shapes:
            if twin.shapes[name] != shape:
                layer = name.rpartition(".")[0]
                modules |= {layer, layer.rpartition(".")[0]}
        return Knob(paths, frozenset(touched), frozenset(modules), factor)
    return None if factor else _NOT_ALONE


def subsets(found: Sequence[Knob]) -> Iterator[tuple[Knob, ...]]:
    """Knobs that may have to move together: the fewest first, each beside what it touches too.

    Args:
        found: All knobs.
    """
    for count in range(1, _MOST_KNOBS + 1):
        for chosen in itertools.combinations(found, count):
            paths = [path for knob in chosen for path in knob.paths]
            whole = any(k.groups and not k.factor for k in chosen) or count == 1
            sized = any(knob.groups for knob in chosen)
            if whole and sized and len(set(paths)) == len(paths) and _linked(chosen):
                yield chosen


def _linked(chosen: Sequence[Knob]) -> bool:
    """Whether each knob shares a group or a module with another one."""
    return len(chosen) == 1 or all(
        any(k is not o and (k.groups & o.groups or k.modules & o.modules) for o in chosen)
        for k in chosen
    )


def candidates(builder: Builder, solver: Solver, chosen: Sequence[Knob]) -> Iterator[Move]:
    """Ways in which groups may shrink with some knobs, in the finest steps.

    Args:
        builder: Of the class.
        solver: Of the model's coupling.
        chosen: The knobs; a factor beside others makes up for what they change.
    """
    powers = tuple(
        (path, -1 if knob.factor and len(chosen) > 1 else 1)
        for knob in chosen
        for path in knob.paths
    )
    sizes = sorted({solver.coupling.groups[v].size for knob in chosen for v in knob.groups})
    whole = [v for path, _ in powers if isinstance(v := builder.base[path], int)] or sizes
    common = math.gcd(*whole)
    steps = [d for d in range(common, 1, -1) if common % d == 0]
    for step in steps[:_MOST_STEPS]:
        share = Fraction(step - 1, step)
        values = builder.scaled({path: share**power for path, power in powers})
        twin = builder.twin(values) if values else None
        if twin is None or not alike(builder.dense, twin):
            continue
        seen = set()
        for inner in (False, True):
            groups = solver.shrunk(builder.dense.shapes, twin.shapes, share, inner)
            if groups and groups not in seen:
                seen.add(groups)
                yield Move(powers, StepTie(groups, step))
        if seen:
            return


def combined(moves: Mapping[Move, Fraction]) -> dict[Path, Fraction]:
    """What each number is multiplied with where several moves are made.

    Args:
        moves: With the share that stays of the units of each.
    """
    out: dict[Path, Fraction] = {}
    for move, share in moves.items():
        for path, factor in move.factors(share).items():
            out[path] = out.get(path, Fraction(1)) * factor
    return {path: factor for path, factor in out.items() if factor != 1}
