"""What a class can express of smaller widths: the ways it can shrink, tried out, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

from depcut.allocate.space import Counts, StepTie
from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.errors import PlanError
from depcut.plan.keep import Keep
from depcut.plan.stacks import Stack, stacks_of
from depcut.rebuild.builder import Builder, built_with
from depcut.rebuild.moves import Move, candidates, combined, knobs, lists, subsets
from depcut.rebuild.recipe import Number, Path, recipe_of
from depcut.rebuild.record import record, values_of
from depcut.rebuild.solve import Solver
from depcut.rebuild.stock import other_buffer, rebuilt
from depcut.rebuild.trial import trial
from depcut.rebuild.twin import Twin, twin_of, without
from depcut.rewrite.build import Slim
from depcut.support.failures import first_line, reraise_fatal

_VECTOR = 4  # floats in 16 bytes
FIXED = "no number of the config changes this width alone"


@dataclass(frozen=True, eq=False)
class Rebuilding:
    """How a model can shrink so that its class can be built anew.

    Attributes:
        coupling: The analysed model.
        builder: Builds its class.
        moves: What can shrink, each tried out.
        held: Groups that must keep all their units, by number, with the reason.
        stacks: Lists of layers that get shorter, with the layers that stay.
        absent: Groups of layers that go, by number.
    """

    coupling: Coupling
    builder: Builder
    moves: tuple[Move, ...]
    held: Mapping[int, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    absent: frozenset[int] = frozenset()

    @property
    def ties(self) -> tuple[StepTie, ...]:
        """What shrinks together, in which steps."""
        return tuple(move.tie for move in self.moves)

    def values(self, counts: Counts) -> dict[Path, Number]:
        """The numbers to build the class with.

        Args:
            counts: Kept count of each group, in whole steps of the moves.
        """
        groups = self.coupling.groups
        left = ((m, [i for i in m.tie.groups if i not in self.absent]) for m in self.moves)
        firsts = [(move, groups[there[0]]) for move, there in left if there]
        shares = {move: Fraction(int(counts[g.index]), g.size) for move, g in firsts}
        out = self.builder.scaled(combined(shares)) or {}
        return {**self.builder.explicit, **out} if out else {}

    def twin(self, counts: Counts) -> Twin | None:
        """The class built at some counts; None where it cannot be, or has other sizes.

        Args:
            counts: Kept count of each group, in whole steps of the moves.
        """
        twin = self.builder.twin(self.values(counts), self.stacks)
        if twin is None or twin.kinds != without(self.builder.dense, self.stacks).kinds:
            return None
        shapes = _shapes(self.coupling, counts)
        return twin if all(twin.shapes.get(n, s) == s for n, s in shapes.items()) else None

    def record(self, counts: Counts) -> dict[str, Any]:
        """What a plan keeps of it, as JSON.

        Args:
            counts: Kept count of each group.
        """
        held = ((self.coupling.groups[i].name, why) for i, why in self.held.items())
        return record(self.builder.base, self.values(counts), held, self.stacks)


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
    why = _unlike(builder.dense, twin_of(model)) or _other_values(builder.dense, model)
    return (None, why) if why else (_found(coupling, model, builder), "")


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


def _other_values(built: Twin, model: nn.Module) -> str:
    """Why even the dense model would not come back as it is; "" where it would."""
    name = other_buffer(model, built)
    return (
        ""
        if name is None
        else (
            f"its class builds {name}, which no file of weights holds, with other values; a model "
            "that was cast to half precision and back has lost them"
        )
    )


def _found(coupling: Coupling, model: nn.Module, builder: Builder) -> Rebuilding:
    """Every way to shrink that stands a trial, the fewest numbers first."""
    solver = Solver(coupling)
    moves: list[Move] = []
    taken: set[int] = set()
    used: set[Path] = set()
    failed: dict[int, str] = {}
    single = knobs(builder, solver)
    for whole in (False, True):
        for chosen in subsets([*single, *lists(builder, solver, used)] if whole else single):
            if all(used >= {*knob.paths} for knob in chosen):
                continue
            move, why = _first(coupling, model, builder, candidates(builder, solver, chosen), moves)
            if move is not None:
                kept = [m for m in moves if not {*m.tie.groups} <= {*move.tie.groups}]
                moves = [*kept, move]
                taken = {i for m in moves for i in m.tie.groups}
                used |= {path for path, _ in move.powers}
            else:
                failed |= why
    held = {g.index: failed.get(g.index, FIXED) for g in coupling.groups if g.index not in taken}
    return Rebuilding(coupling, builder, tuple(moves), held)


def _first(
    coupling: Coupling,
    model: nn.Module,
    builder: Builder,
    found: Iterable[Move],
    before: Sequence[Move],
) -> tuple[Move | None, dict[int, str]]:
    """The first move that stands its trial; else the reasons, by group.

    It may take the place of others: of those that shrink a part of its groups by whole factors of
    widths that it shrinks itself.
    """
    failed: dict[int, str] = {}
    for finest in found:
        mine = {*finest.tie.groups}
        paths = {path for path, _ in finest.powers}
        others = [move for move in before if mine & {*move.tie.groups}]
        factors = [
            {*move.tie.groups} < mine
            and not any(isinstance(builder.base[p], float) or p in paths for p, _ in move.powers)
            for move in others
        ]
        if not all(factors):
            continue
        for move in _coarser(coupling, finest):
            why = trial(coupling, model, builder, move)
            if why is None:
                return move, {}
        names = " and ".join(".".join(map(str, path)) for path, _ in finest.powers)
        failed |= dict.fromkeys(finest.tie.groups, f"{names}: {why}")
    return None, failed


def _coarser(coupling: Coupling, move: Move) -> Iterator[Move]:
    """A move, and the same in steps of whole vectors, on which some kernels insist."""
    yield move
    sizes = {coupling.groups[i].size for i in move.tie.groups}
    if len(sizes) == 1 and not move.tie.steps % _VECTOR and move.tie.steps > _VECTOR:
        yield replace(move, tie=replace(move.tie, steps=move.tie.steps // _VECTOR))


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
    values, stacks = values_of(settings), stacks_of(settings)
    if not values and not stacks:
        return None
    recipe = recipe_of(model)
    try:
        if recipe is None:
            raise ValueError("no config is known that its class is built from")
        with preserved():
            before, after = (
                twin_of(built_with(recipe, v, s)) for v, s in (({}, ()), (values, stacks))
            )
    except Exception as error:
        reraise_fatal(error)
        raise PlanError(
            f"the class cannot be built as the plan says: {first_line(error)}",
            where=type(model).__name__,
            remedy="apply it to a model of the class that it was made for",
        ) from error
    return rebuilt(model, keep, before, after, stacks)
