"""Lossless clean-up: remove the units that are dead already, and compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from torch import nn

from depcut.analysis import analyze
from depcut.apply.plan import Plan, planned
from depcut.apply.report import amend
from depcut.capture.inputs import Inputs
from depcut.capture.part import shown_part, whole_of
from depcut.capture.plain import refuse_spread
from depcut.capture.random_state import preserved
from depcut.capture.results import EVERY, Outputs
from depcut.errors import InputError, listed
from depcut.pictures.record import plain
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary, Table
from depcut.repair.contractions import Contraction, find_contractions
from depcut.repair.dead import Stuck, find_dead
from depcut.repair.folding import contributions, fold_constants
from depcut.repair.other_sizes import lasting
from depcut.rewrite.masks import without_masks
from depcut.support.unwrap import unwrapped
from depcut.verify.calls import verify_equal_calls

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, eq=False, repr=False)
class Compaction(Shown):
    """The dead units of a model, and what holds those that stay.

    Attributes:
        plan: The units that stay.
        folded: Names of the biases and running means that take over what removed units
            contributed as constants.
        stuck: Dead units that stay, each with the reason.
        model: The model with its masks applied, or the part of it that is captured.
        contractions: What reads the units.
    """

    plan: Plan
    folded: tuple[str, ...]
    stuck: tuple[Stuck, ...]
    model: nn.Module
    contractions: tuple[Contraction, ...]

    @property
    def removed(self) -> Mapping[str, int]:
        """Number of dead units that go, by group."""
        return {name: self.plan.sizes[name] - len(kept) for name, kept in self.plan.kept.items()}

    def apply(self) -> nn.Module:
        """The smaller model, which computes what the dense one does; that one is not changed.

        Raises:
            VerificationError: The smaller model does not compute what the dense one does.
        """
        keep = self.plan.keep()
        slim = self.plan.apply(whole_of(self.model), compensate=False)
        seen = shown_part(slim, self.plan.part)
        if self.folded:
            fold_constants(keep, self.model, seen, self.contractions)
        amend(slim, error=verify_equal_calls(seen, keep, self.model))
        return slim

    def to_dict(self) -> dict[str, Any]:
        """What goes, what stays and why, and the plan, as plain data."""
        stuck = [{"group": s.group, "units": list(s.units), "reason": s.reason} for s in self.stuck]
        removed = dict(self.removed)
        return {
            "removed": removed,
            "folded": list(self.folded),
            "stuck": plain(stuck),
            "plan": self.plan.to_dict(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group of the architecture."""
        return self.plan.rows()

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        return self.plan.records()

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        dead, total = sum(self.removed.values()), sum(self.plan.sizes.values())
        return f"Compaction: {dead} of {total} units are dead and can go, {len(self.stuck)} stay"

    def summary(self) -> Summary:
        """What notebooks show."""
        rows = [(n, str(self.plan.sizes[n]), str(count)) for n, count in self.removed.items()]
        table = Table(("group", "units", "dead"), rows, "groups")
        notes = [f"constants folded into {listed(list(self.folded))}"] if self.folded else []
        notes += [f"dead, but stays: {s.group}: {s.reason}" for s in self.stuck]
        return Summary(self.headline, {}, (table,), tuple(notes))

    def __str__(self) -> str:
        removed = self.removed
        total = sum(self.plan.sizes.values())
        lines = [f"{sum(removed.values()) or 'none'} of {total} units are dead and can go"]
        lines += [f"  {n}: {count} of {self.plan.sizes[n]}" for n, count in removed.items()]
        if self.folded:
            lines.append(f"constants folded into {listed(list(self.folded))}")
        lines += [
            f"dead, but stays: {s.group}, units {listed(list(map(str, s.units)))}: {s.reason}"
            for s in self.stuck
        ]
        return "\n".join(lines)


@preserved()
def compaction(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    outputs: Outputs = EVERY,
    part: str | None = None,
) -> Compaction:
    """Find the units that are dead already; the model is only read.

    A unit is dead where all that reads it multiplies it with zeros, or reads a constant that a bias
    (or the running mean of a batch norm that follows) can absorb exactly: a channel whose filter
    is zero, whatever the norms and activations behind it make of that. Constants are derived from
    the graph, not seen in data. Masks of `torch.nn.utils.prune` are applied first.

    Args:
        model: Any module that torch.export can capture, with its weights.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments, or a list of several
            such example calls, in all of which a unit must be dead; left out, inferred from the
            first layer where that is unambiguous.
        outputs: Names or positions of the outputs that are to stay, see `depcut.analyze`; of a unit
            that only others need nothing is left. Left out, all of them.
        part: Name of a module that alone is captured, see `depcut.analyze`.

    Raises:
        DepcutError: See `depcut.analyze`.
    """
    model = unwrapped(model)
    refuse_spread(model)
    plain = without_masks(model) if isinstance(model, nn.Module) else model
    analysis = analyze(plain, inputs, outputs, part=part)
    coupling, plain = analysis.coupling, analysis.model
    empty = [n for n, t in plain.state_dict(keep_vars=True).items() if t.is_meta]
    if empty:
        raise InputError(
            f"weights without values: {listed(empty, 3)}",
            where="a model on the meta device",
            remedy="load its weights first: which units are dead is a matter of values",
        )
    contractions = find_contractions(coupling, plain)
    dead = find_dead(coupling, contractions)
    if dead.units:
        contractions = lasting(coupling.program, plain, contractions)
        dead = find_dead(coupling, contractions)
    kept = {
        coupling.groups[i].name: np.setdiff1d(np.arange(coupling.groups[i].size), units)
        for i, units in dead.units.items()
    }
    plan = planned(coupling, plain, kept, {"units": "dead ones removed"})
    folded = tuple(contributions(plan.keep(), contractions))
    return Compaction(plan, folded, dead.stuck, plain, contractions)


def compact(
    model: ModelT, inputs: Inputs = None, *, outputs: Outputs = EVERY, part: str | None = None
) -> ModelT:
    """The model without the units that are dead already; in eval mode it computes the same.

    Warns where nothing is dead: the result is an equal copy then. `print(depcut.compaction(model,
    inputs))` says what goes, and what stays for which reason.

    Args:
        model: Any module that torch.export can capture, with its weights; it is not changed.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments, or a list of several
            such example calls, in all of which a unit must be dead; left out, inferred from the
            first layer where that is unambiguous.
        outputs: Names or positions of the outputs that are to stay, see `depcut.analyze`; of a unit
            that only others need nothing is left. Left out, all of them.
        part: Name of a module that alone is captured, see `depcut.analyze`.

    Raises:
        DepcutError: See `depcut.analyze` and `Plan.apply`.
    """
    dead = compaction(model, inputs, outputs=outputs, part=part)
    if not dead.plan.kept:
        warnings.warn(f"nothing was removed: {dead}", stacklevel=2)
    return cast(ModelT, dead.apply())
