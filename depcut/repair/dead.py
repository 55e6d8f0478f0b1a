"""Which units are dead: whatever reads them gets nothing, or a constant that it can absorb.

Liveness as in a compiler: all units are taken to be dead, and those come back whose products reach
an index that stays, until no more do. So what is read by dead units alone is dead, too, and what
only feeds itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from depcut import axes
from depcut.axes import Axis, Indices
from depcut.capture.program import module_of
from depcut.coupling.groups import Coupling, Group
from depcut.repair.contractions import Contraction

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Stuck:
    """Units that are dead, and stay nevertheless.

    Attributes:
        group: Name of their group.
        units: Their numbers.
        reason: What holds them.
    """

    group: str
    units: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Dead:
    """Dead units of an architecture with its weights.

    Attributes:
        units: Those that can go, ascending, by group number; groups without any are left out.
        stuck: Those that cannot, with the reasons.
    """

    units: dict[int, Indices]
    stuck: tuple[Stuck, ...]


class _Liveness:
    """The fixpoint of liveness; `gone` is True, [units] by axis, for what is dead so far."""

    def __init__(self, coupling: Coupling, contractions: Sequence[Contraction]) -> None:
        self.coupling, self.contractions = coupling, tuple(contractions)
        self.gone: dict[Axis, Flags] = {g.axis: np.ones(g.size, bool) for g in coupling.groups}
        self.held: dict[Axis, str] = {}
        for node, effects in coupling.effects.items():
            for term in effects.statistics:
                for leaf in axes.leaves(axes.resolve(term)):
                    if leaf in self.gone:
                        self.held.setdefault(leaf, f"{_layer(module_of(node))} runs over all units")
                        self.gone[leaf][:] = False

    def kept(self, term: axes.Term) -> Indices:
        """Indices of a term that stay."""
        term = axes.resolve(term)
        held = {leaf for leaf in axes.leaves(term) if leaf in self.gone}
        return axes.indices(term, {leaf: np.flatnonzero(~self.gone[leaf]) for leaf in held})

    def settle(self) -> None:
        """Take units that are alive out of `gone`, until none changes."""
        changed = True
        while changed:
            changed = False
            for contraction in reversed(self.contractions):
                for axis, alive in self.alive(
                    contraction, constants=contraction.absorber is not None
                ):
                    changed |= bool((self.gone[axis] & alive).any())
                    self.gone[axis] &= ~alive

    def alive(self, contraction: Contraction, *, constants: bool) -> list[tuple[Axis, Flags]]:
        """Units that contribute to a contraction, as flags [units] by axis.

        Args:
            contraction: The contraction.
            constants: Whether constants count as no contribution.
        """
        operands = self._operands(contraction, constants)
        out = []
        for operand, dim in contraction.places:
            letters = contraction.form.labels[operand][dim]
            counts = contraction.form.sum_to(letters, operands).cpu().numpy()
            alive = (counts > 0.5) | contraction.wild
            term = axes.resolve(self._dims(contraction, operand)[dim])
            for axis, times in axes.project(term, alive.astype(np.float64)):
                if axis in self.gone:
                    out.append((axis, times > 0))
        return out

    def _dims(self, contraction: Contraction, operand: int) -> tuple[axes.Term, ...]:
        dims = self.coupling.env[contraction.form.operands[operand]]
        assert isinstance(dims, tuple)
        return dims

    def _operands(self, contraction: Contraction, constants: bool) -> list[Tensor]:
        """The operands' `live` flags, zeroed at dead units of dimensions that are not summed."""
        form = contraction.form
        summed = {c for i, dim in contraction.places for c in form.labels[i][dim]}
        out = []
        for i, live in enumerate(contraction.live):
            used = live
            for dim, term in enumerate(self._dims(contraction, i)):
                if live.shape[dim] == term.size > 1 and not summed & set(form.labels[i][dim]):
                    used = _only(used, dim, self.kept(term))
            out.append(used)
        if constants and contraction.fixed is not None:
            shape = [1] * out[0].ndim
            shape[form.channel] = -1
            out[0] = out[0] * (~contraction.fixed).reshape(shape)
        return out


def _only(tensor: Tensor, dim: int, kept: Indices) -> Tensor:
    at = torch.from_numpy(kept).to(tensor.device)
    return torch.zeros_like(tensor).index_copy(dim, at, tensor.index_select(dim, at))


def _layer(name: str) -> str:
    return repr(name) if name else "the model's forward"


def find_dead(coupling: Coupling, contractions: Sequence[Contraction]) -> Dead:
    """The dead units.

    Args:
        coupling: The analysed architecture.
        contractions: What reads its groups.
    """
    state = _Liveness(coupling, contractions)
    surplus: dict[tuple[int, str], list[int]] = {}
    while True:
        state.settle()
        back = _back(coupling, state)
        if not back:
            break
        for group, units, reason in back:
            state.gone[group.axis][units] = False
            surplus.setdefault((group.index, reason), []).extend(int(u) for u in units)
    gone = {g.index: np.flatnonzero(state.gone[g.axis]) for g in coupling.groups}
    stuck = [
        Stuck(coupling.groups[i].name, tuple(sorted(units)), reason)
        for (i, reason), units in surplus.items()
    ]
    stuck += _held(coupling, state, {(i, u) for (i, _), units in surplus.items() for u in units})
    return Dead({i: dead.astype(np.int64) for i, dead in gone.items() if len(dead)}, tuple(stuck))


def _back(coupling: Coupling, state: _Liveness) -> list[tuple[Group, Indices, str]]:
    """Dead units that must stay, since a tie or a floor asks for as many, with the reason."""
    families: dict[tuple[str, int], list[Group]] = {}
    for group in coupling.groups:
        key = ("alone", group.index) if group.tied is None else ("tied", group.tied)
        families.setdefault(key, []).append(group)
    out = []
    for family in families.values():
        most = [_most(group, int(state.gone[group.axis].sum())) for group in family]
        for group, own in zip(family, most, strict=True):
            dead = np.flatnonzero(state.gone[group.axis])
            if len(dead) == min(most):
                continue
            if own < len(dead):
                several = f"a multiple of {group.multiple}" if group.multiple > 1 else group.floor
                reason = f"{several} must stay"
            else:
                fewest = family[most.index(min(most))].name
                reason = f"as many must stay as of {fewest!r}"
            out.append((group, dead[: len(dead) - min(most)], reason))
    return out


def _most(group: Group, dead: int) -> int:
    """Units of a group that can go, of so many that are dead."""
    kept = max(group.size - dead, group.floor)
    return group.size - -(-kept // group.multiple) * group.multiple


def _held(coupling: Coupling, state: _Liveness, known: set[tuple[int, int]]) -> list[Stuck]:
    """Units that contribute constants alone and stay, each with the reason."""
    busy = {g.axis: np.zeros(g.size, bool) for g in coupling.groups}
    reasons: dict[Axis, dict[str, Flags]] = {g.axis: {} for g in coupling.groups}
    for contraction in state.contractions:
        for axis, alive in state.alive(contraction, constants=True):
            busy[axis] |= alive
        if contraction.absorber is None and contraction.fixed is not None:
            why = f"{_layer(contraction.layer)} reads a constant, and {contraction.why}"
            for axis, alive in state.alive(contraction, constants=False):
                flags = reasons[axis].setdefault(why, np.zeros(len(alive), bool))
                flags |= alive
    for axis, why in state.held.items():
        reasons[axis].setdefault(why, np.ones(axis.size, bool))
    out = []
    for group in coupling.groups:
        left = ~state.gone[group.axis] & ~busy[group.axis]
        for why, flags in reasons[group.axis].items():
            here = [int(u) for u in np.flatnonzero(left & flags)]
            units = [u for u in here if (group.index, u) not in known]
            if units:
                out.append(Stuck(group.name, tuple(units), why))
                left &= ~flags
    return out
