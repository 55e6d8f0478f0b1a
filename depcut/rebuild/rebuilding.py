"""What a class can express of smaller widths: the ways it can shrink, tried out, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

from depcut.allocate.space import Counts, StepTie
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.errors import InputError, PlanError, VerificationError
from depcut.plan.keep import Keep
from depcut.rebuild.moves import Builder, Move, candidates, knobs, scaled, subsets
from depcut.rebuild.recipe import Number, Path, recipe_of
from depcut.rebuild.solve import Solver
from depcut.rebuild.stock import rebuilt
from depcut.rebuild.twin import Twin, twin_of
from depcut.rewrite.build import Slim
from depcut.support.failures import first_line, reraise_fatal
from depcut.verify.calls import verify_calls

REBUILD = "rebuild"  # the entry of a plan's settings
FIXED = "no number of the config changes this width alone"


@dataclass(frozen=True, eq=False)
class Rebuilding:
    """How a model can shrink so that its class can be built anew.

    Attributes:
        coupling: The analysed model.
        builder: Builds its class.
        moves: What can shrink, each tried out.
        held: Groups that must keep all their units, by number, with the reason.
    """

    coupling: Coupling
    builder: Builder
    moves: tuple[Move, ...]
    held: Mapping[int, str] = field(default_factory=dict)

    @property
    def ties(self) -> tuple[StepTie, ...]:
        """What shrinks together, in which steps."""
        return tuple(move.tie for move in self.moves)

    def values(self, counts: Counts) -> dict[Path, Number]:
        """The numbers to build the class with.

        Args:
            counts: Kept count of each group, in whole steps of the moves.
        """
        out: dict[Path, Number] = {}
        for move in self.moves:
            first = self.coupling.groups[move.tie.groups[0]]
            share = Fraction(int(counts[first.index]), first.size)
            if share != 1:
                now = {p: out.get(p, self.builder.base[p]) for p in move.paths}
                out |= scaled(now, move.paths, share) or {}
        return {**self.builder.explicit, **out} if out else {}

    def twin(self, counts: Counts) -> Twin | None:
        """The class built at some counts; None where it cannot be, or has other sizes.

        Args:
            counts: Kept count of each group, in whole steps of the moves.
        """
        twin = self.builder.twin(self.values(counts))
        if twin is None or twin.kinds != self.builder.dense.kinds:
            return None
        shapes = _shapes(self.coupling, counts)
        return twin if all(twin.shapes.get(n, s) == s for n, s in shapes.items()) else None

    def record(self, counts: Counts) -> dict[str, Any]:
        """What a plan keeps of it, as JSON.

        Args:
            counts: Kept count of each group.
        """
        base = self.builder.base
        fields = [[list(p), base[p], v] for p, v in self.values(counts).items()]
        held = {self.coupling.groups[i].name: why for i, why in self.held.items()}
        return {"fields": fields, "held": held}


def _shapes(coupling: Coupling, counts: Counts) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors where the groups keep some counts."""
    units = {g.index: np.arange(int(n)) for g, n in zip(coupling.groups, counts, strict=True)}
    keep = Keep(coupling, {i: u for i, u in units.items() if len(u) < coupling.groups[i].size})
    return {name: tuple(map(keep.count, dims)) for name, dims in coupling.dims.items()}


@preserved()
def rebuilding(coupling: Coupling, model: nn.Module) -> tuple[Rebuilding | None, str]:
    """How a model can shrink so that its class can be built anew.

    Args:
        coupling: The analysed model.
        model: The model; it is only read.

    Returns:
        That, or None and why not.
    """
    recipe = recipe_of(model)
    if recipe is None:
        return None, "no config is known that its class is built from"
    try:
        builder = Builder(recipe)
    except Exception as error:  # noqa: BLE001  (of a library, or of the class's own code)
        reraise_fatal(error)
        return None, f"its class cannot be built from its config: {first_line(error)}"
    why = _unlike(builder.dense, twin_of(model))
    return (None, why) if why else (_found(coupling, model, builder), "")


def check_rebuildable(found: Rebuilding | None, why: str, *, depth: bool) -> None:
    """Refuse to cut what is to be built anew and cannot be.

    Args:
        found: What the class can express, if anything.
        why: Why it cannot.
        depth: Whether branches may be dropped.

    Raises:
        InputError: It cannot be built anew.
    """
    if depth and found is not None:
        why = "a config says how many layers there are, and depth=True drops parts of layers"
    if why:
        raise InputError(
            f"the model cannot be rebuilt from a config: {why}",
            where="rebuildable=True",
            remedy="leave rebuildable out, or pass rebuildable=False: widths are cut freely",
        )


def _unlike(built: Twin, model: Twin) -> str:
    """How a model differs from what its class builds; "" where it does not."""
    for name, kind in built.kinds.items():
        other = model.kinds.get(name)
        if other is not kind:
            theirs = "missing" if other is None else f"a {other.__name__}"
            return f"{name or 'the model'} is {theirs}, its class builds a {kind.__name__}"
    for name, shape in model.shapes.items():
        if built.shapes.get(name) != shape:
            return f"{name} has shape {list(shape)}, its class builds {built.shapes.get(name)}"
    more = [name for name in model.kinds if name not in built.kinds]
    return f"its class builds no {more[0]}" if more else ""


def _found(coupling: Coupling, model: nn.Module, builder: Builder) -> Rebuilding:
    """Every way to shrink that stands a trial, the fewest numbers first."""
    solver = Solver(coupling)
    moves: list[Move] = []
    taken: set[int] = set()
    failed: dict[int, str] = {}
    every = knobs(builder, solver)
    for chosen in subsets(every):
        reach = {i for knob in chosen for i in solver.groups_of(sorted(knob.groups))}
        if reach <= taken:
            continue
        for move, _ in candidates(builder, solver, chosen):
            if taken & {*move.tie.groups}:
                continue
            why = _trial(coupling, model, builder, move)
            if why is None:
                moves.append(move)
                taken |= {*move.tie.groups}
                break
            names = " and ".join(".".join(map(str, p)) for p in move.paths)
            failed |= dict.fromkeys(move.tie.groups, f"{names}: {why}")
    groups = range(len(coupling.groups))
    held = {i: failed.get(i, FIXED) for i in groups if i not in taken}
    return Rebuilding(coupling, builder, tuple(moves), held)


def _trial(coupling: Coupling, model: nn.Module, builder: Builder, move: Move) -> str | None:
    """Carry a move out alone, and compare by value; what is wrong with it, None if nothing is."""
    share = Fraction(max(1, move.tie.steps // 2), move.tie.steps)
    values = scaled(builder.base, move.paths, share)
    twin = builder.twin(values) if values else None
    if twin is None:
        return "the class cannot be built with half of it"
    generator = np.random.default_rng(0)
    units = {}
    for i in move.tie.groups:
        size = coupling.groups[i].size
        units[i] = np.sort(generator.permutation(size)[: int(size * share)])
    keep = Keep(coupling, units)
    try:
        slim = rebuilt(model, keep, builder.dense, twin)
        verify_calls(slim, model)
    except VerificationError as error:
        return error.what + (f" [{error.where}]" if error.where else "")
    return None


def recorded(settings: Mapping[str, Any], model: nn.Module, keep: Keep) -> Slim | None:
    """The smaller model of a plan that says what to build the class with.

    Args:
        settings: Of the plan.
        model: The dense model; it is not changed.
        keep: What stays.

    Returns:
        It, not verified yet; None where the plan says nothing of it.

    Raises:
        PlanError: The class of the model cannot be built so.
        VerificationError: It has other sizes than the plan.
    """
    fields = settings.get(REBUILD, {}).get("fields")
    if not fields:
        return None
    recipe = recipe_of(model)
    values = {tuple(path): new for path, _, new in fields}
    try:
        if recipe is None:
            raise ValueError("no config is known that its class is built from")
        with preserved():
            before, after = twin_of(recipe.build({})), twin_of(recipe.build(values))
    except Exception as error:
        reraise_fatal(error)
        raise PlanError(
            f"the class cannot be built as the plan says: {first_line(error)}",
            where=type(model).__name__,
            remedy="apply it to a model of the class that it was made for",
        ) from error
    return rebuilt(model, keep, before, after)
