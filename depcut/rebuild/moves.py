"""Which numbers of a recipe shrink which groups, found by building the class with others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from depcut.allocate.space import StepTie
from depcut.rebuild.recipe import Number, Path, Recipe, Values
from depcut.rebuild.solve import Solver
from depcut.rebuild.twin import Twin, alike, changes, twin_of
from depcut.support.failures import reraise_fatal

_MOST_STEPS = 12  # divisors that are tried, the finest first
_MOST_KNOBS = 3  # that one move changes
_PROBES = (6, 10)  # values of a number that is derived where none is given


@dataclass(frozen=True)
class Move:
    """Numbers of a recipe that shrink together, and the groups that shrink with them.

    Attributes:
        paths: The numbers; each becomes value * t / steps.
        tie: The groups, and how many steps there are.
    """

    paths: tuple[Path, ...]
    tie: StepTie

    def share(self, counts: Mapping[int, int], sizes: Mapping[int, int]) -> Fraction:
        """What stays, from the kept counts of the groups."""
        first = self.tie.groups[0]
        return Fraction(counts.get(first, sizes[first]), sizes[first])


class Builder:
    """Builds twins of a class, and remembers how the dense one looks.

    Args:
        recipe: Of the model.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dense = twin_of(recipe.build({}))
        self.base: dict[Path, Number] = {}
        for path, value in recipe.fields.items():
            self.base |= {path: value} if value is not None else self._given(path)

    def twin(self, values: Values) -> Twin | None:
        """The class with other numbers; None where it cannot be built."""
        try:
            return twin_of(self.recipe.build({**self.explicit, **values}))
        except Exception as error:  # noqa: BLE001  (a library's own checks of its numbers)
            reraise_fatal(error)
            return None

    @property
    def explicit(self) -> dict[Path, Number]:
        """Numbers that are derived where none is given, and are given here."""
        return {p: v for p, v in self.base.items() if self.recipe.fields.get(p) is None}

    def _given(self, path: Path) -> dict[Path, Number]:
        """The value of a number that changes nothing where it is given; {} where none does."""
        for probe in _PROBES:
            built = self.twin({path: probe})
            if built is None or not alike(self.dense, built):
                continue
            values = {
                Fraction(was * probe, now)
                for name, old in self.dense.shapes.items()
                for was, now in zip(old, built.shapes[name], strict=False)
                if was != now and now
            }
            value = min(values, default=Fraction(1, 2))
            if value.denominator != 1:
                continue
            again = self.twin({path: int(value)})
            if again is not None and again.shapes == self.dense.shapes:
                return {path: int(value)}
        return {}


@dataclass(frozen=True, eq=False)
class Knob:
    """Numbers that are changed as one: a single one, or those of a list.

    Attributes:
        paths: The numbers.
        groups: Variables in dimensions that change with them.
        modules: Modules of which a plain attribute changes with them that a size is computed from.
    """

    paths: tuple[Path, ...]
    groups: frozenset[int]
    modules: frozenset[str]


def scaled(base: Values, paths: Iterable[Path], share: Fraction) -> dict[Path, Number] | None:
    """Values with some of them scaled; None where one would be no integer any more.

    Args:
        base: The values.
        paths: Which of them.
        share: The factor.
    """
    out: dict[Path, Number] = {}
    for path in paths:
        value = base[path]
        if isinstance(value, int):
            new = value * share
            if new.denominator != 1 or new < 1:
                return None
            out[path] = int(new)
        else:
            out[path] = float(value * share)
    return out


def knobs(builder: Builder, solver: Solver) -> list[Knob]:
    """The numbers that sizes of groups depend on, and those that code computes sizes from.

    Args:
        builder: Of the class.
        solver: Of the model's coupling.
    """
    lists: dict[Path, list[Path]] = {}
    for path in builder.base:
        if isinstance(path[-1], int):
            lists.setdefault(path[:-1], []).append(path)
    named: list[tuple[Path, ...]] = [(path,) for path in builder.base]
    named += [tuple(paths) for paths in lists.values() if len(paths) > 1]
    return [knob for paths in named if (knob := _knob(builder, solver, paths)) is not None]


def _knob(builder: Builder, solver: Solver, paths: tuple[Path, ...]) -> Knob | None:
    """What follows some numbers; None where it is nothing, or what cannot shrink."""
    value = min(builder.base[path] for path in paths)
    shares = [Fraction(1, 2), Fraction(3, 4), Fraction(2, 3)]
    if isinstance(value, int) and value > 1:
        shares += [Fraction(value - 1, value), Fraction(1, value)]
    for share in shares:
        values = scaled(builder.base, paths, share)
        twin = builder.twin(values) if values else None
        if twin is None:
            continue
        touched = alike(builder.dense, twin) and solver.changed(builder.dense.shapes, twin.shapes)
        if not isinstance(touched, set):
            return None
        places = changes(builder.dense, twin).keys() & solver.sources
        modules = frozenset(name for name, _ in places)
        return Knob(paths, frozenset(touched), modules) if touched or modules else None
    return None


def subsets(found: Sequence[Knob]) -> Iterator[tuple[Knob, ...]]:
    """Knobs that may have to move together: the fewest first, each beside what it touches too.

    Args:
        found: All knobs.
    """
    for count in range(1, _MOST_KNOBS + 1):
        for chosen in itertools.combinations(found, count):
            paths = [path for knob in chosen for path in knob.paths]
            if len(set(paths)) == len(paths) and any(k.groups for k in chosen) and _linked(chosen):
                yield chosen


def _linked(chosen: Sequence[Knob]) -> bool:
    """Whether each knob shares a group or a module with another one."""
    return len(chosen) == 1 or all(
        any(k is not o and (k.groups & o.groups or k.modules & o.modules) for o in chosen)
        for k in chosen
    )


def candidates(
    builder: Builder, solver: Solver, chosen: Sequence[Knob]
) -> Iterator[tuple[Move, Twin]]:
    """Ways in which groups may shrink with some knobs, and the class after the finest step.

    Args:
        builder: Of the class.
        solver: Of the model's coupling.
        chosen: The knobs.
    """
    paths = tuple(path for knob in chosen for path in knob.paths)
    sizes = {solver.coupling.groups[v].size for knob in chosen for v in knob.groups}
    whole = [v for p in paths if isinstance(v := builder.base[p], int)] or sorted(sizes)
    common = math.gcd(*whole)
    steps = [d for d in range(common, 1, -1) if common % d == 0]
    for step in steps[:_MOST_STEPS]:
        share = Fraction(step - 1, step)
        twin = builder.twin(scaled(builder.base, paths, share) or {})
        if twin is None or not alike(builder.dense, twin):
            continue
        seen = set()
        for inner in (False, True):
            groups = solver.shrunk(builder.dense.shapes, twin.shapes, share, inner)
            if groups and groups not in seen:
                seen.add(groups)
                yield Move(paths, StepTie(groups, step)), twin
        if seen:
            return
