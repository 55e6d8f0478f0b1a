"""From what a user asks for to kept counts: which groups are held, fixed or free."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from depcut.allocate.lagrange import closest, least_loss, nudged
from depcut.allocate.named import is_named, matching
from depcut.allocate.order import along, meet, order, step_losses
from depcut.allocate.space import Counts, Space, StepTie, space
from depcut.allocate.spend import nearby, spent
from depcut.axes import Indices
from depcut.calibration.data import Calibration
from depcut.coupling.groups import Coupling
from depcut.errors import BudgetError, InputError
from depcut.plan.cost import Cost
from depcut.plan.data import PlanData, make_plan
from depcut.plan.preferences import preferences
from depcut.scores import Criterion, Score, Scores, is_additive, score, score_name
from depcut.support.checks import check_number
from depcut.support.failures import shown


@dataclass(frozen=True)
class Request:
    """What a user asks for, apart from the budget.

    Attributes:
        score: A criterion by name, with options, or a function of (coupling, model, seed).
        allocation: "uniform" or "global".
        align: Kept widths are multiples of it where the width allows; 1: any width.
        ignore: Globs over module or parameter names whose width must stay.
        ratios: Fraction of units removed, by glob, for groups that the budget does not decide.
        seed: For criteria that draw.
        calibration: Data, and perhaps a loss, for criteria that need them.
        hold: Numbers of further groups whose width must stay.
        together: Groups that shrink in common steps; None: no further ties, and widths that the
            model's classes express are preferred.
    """

    score: str | Score | Criterion = "magnitude"
    allocation: str = "uniform"
    align: int = 8
    ignore: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    calibration: Calibration | None = None
    hold: Collection[int] = ()
    together: tuple[StepTie, ...] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The request as a plan's settings record it: options by name."""
        settings: dict[str, Any] = {
            "align": self.align,
            "allocation": self.allocation,
            "seed": self.seed,
            "score": score_name(self.score),
        }
        if self.calibration is not None:
            settings["examples"] = self.calibration.rows
        return settings


class Chooser:
    """A request resolved against one analysed model.

    Args:
        coupling: The groups.
        model: The model they are of; criteria read its weights.
        request: What is asked for.

    Raises:
        InputError: An option has a wrong value, or a name matches nothing.
    """

    def __init__(self, coupling: Coupling, model: nn.Module, request: Request) -> None:
        self.coupling, self.model, self.request = coupling, model, request
        self.held = _held(coupling, request.ignore) | set(request.hold)
        self.absent: frozenset[int] = frozenset()
        self.fixed = _fixed(coupling, request, self.held)
        self.additive = is_additive(request.score)
        self.scores: Scores = score(
            request.score, coupling, model, request.seed, request.calibration
        )

    def holding(self, numbers: Collection[int]) -> Chooser:
        """A chooser that keeps the width of further groups.

        Args:
            numbers: Of the groups.
        """
        if not numbers:
            return self
        other = copy.copy(self)
        other.held = self.held | set(numbers)
        other.fixed = _fixed(self.coupling, self.request, other.held)
        return other

    def without(self, tensors: Collection[str]) -> Chooser:
        """A chooser for the model without these tensors, whose groups stay out of the allocation.

        Args:
            tensors: Names of parameters and buffers.
        """
        groups = self.coupling.groups
        dead = {g.index for g in groups if all(m.tensor in tensors for m in g.members)}
        alive = {g.tied for g in groups if g.index not in dead}
        other = copy.copy(self)
        other.absent = frozenset(
            i for i in dead if groups[i].tied is None or groups[i].tied not in alive
        )
        other.fixed = {i: n for i, n in self.fixed.items() if i not in other.absent}
        return other

    def fixing(self, counts: Mapping[int, int]) -> Chooser:
        """A chooser in which the budget does not decide some groups any more.

        Args:
            counts: Kept counts by the groups' numbers.
        """
        other = copy.copy(self)
        other.fixed = {**self.fixed, **counts}
        return other

    def spares(self, tensor: str) -> bool:
        """Whether ignore= or ratios= names a parameter, so that its branch must stay."""
        patterns = (*self.request.ignore, *self.request.ratios)
        return any(is_named(tensor, p) for p in patterns)

    @property
    def shares_of_outputs(self) -> bool:
        """Whether scores are losses in shares of the outputs' variance on the data."""
        return self.additive and score_name(self.request.score) == "obs"

    def meet(self, quantity: Cost, target: float, of: str) -> Counts:
        """Kept counts whose cost is as close to the target as steps allow.

        Args:
            quantity: What is budgeted.
            target: Its value to reach.
            of: Its name, for messages.

        Returns:
            Kept count of each group, [groups].

        Raises:
            BudgetError: It cannot be reached.
        """
        remaining = self._remaining(quantity)
        preferred, free = self._spaces()
        try:
            counts = self._allocated(preferred, remaining, target, of)
        except BudgetError:
            counts = self._allocated(free, remaining, target, of)
        return self._with_fixed(counts)

    def nudged(
        self, quantity: Cost, counts: Counts, target: float, tried: Sequence[Counts]
    ) -> Counts | None:
        """Of the counts that differ in one class from these, those closest to the target.

        Args:
            quantity: What is budgeted.
            counts: Kept count of each group.
            target: Its value to come to.
            tried: Counts that are not wanted again.

        Returns:
            Kept count of each group, [groups]; None if all of them were tried.
        """
        where, _ = self._spaces()
        closest = nudged(where, counts, quantity, target, tried)
        return None if closest is None else self._with_fixed(closest)

    def nearby(self, quantity: Cost, counts: Counts, target: float, of: str) -> Iterator[Counts]:
        """Other counts that meet a budget by a few steps more or less; of little loss first.

        Args:
            quantity: What is budgeted.
            counts: Kept count of each group.
            target: Its value to come to.
            of: Its name.

        Returns:
            Kept counts of each group, [groups] each.
        """
        where, _ = self._spaces()
        remaining = self._remaining(quantity)
        losses = self._losses(where, remaining, of)
        for other in nearby(where, counts, losses, remaining, target):
            yield self._with_fixed(other)

    def smallest(self) -> Counts:
        """The least counts that the request allows."""
        _, where = self._spaces()
        return self._with_fixed(where.kept(where.available))

    def plan(self, counts: Counts, settings: Mapping[str, Any]) -> PlanData:
        """The plan that keeps the best units of each group.

        Args:
            counts: Kept count of each group.
            settings: What the plan records beside the request.
        """
        kept = {
            g.name: best_units(s, n)
            for g, s, n in zip(self.coupling.groups, self.scores, counts, strict=True)
            if n < g.size
        }
        return make_plan(self.coupling, self.model, kept, {**settings, **self.request.settings})

    def _spaces(self) -> tuple[Space, Space]:
        """The steps under the preferences of the model's classes, and those without them."""
        taken = self.held | set(self.fixed) | self.absent
        if self.request.together is not None:
            left = (
                replace(tie, groups=tuple(i for i in tie.groups if i not in self.absent))
                for tie in self.request.together
            )
            together = [tie for tie in left if tie.groups]
            tied = space(self.coupling, self.request.align, taken, (), together)
            return tied, tied
        liked = preferences(self.coupling)
        ties = [pair for pair in liked.ties if self.absent.isdisjoint(pair)]
        align = self.request.align
        return (
            space(self.coupling, align, taken | (liked.holds - self.held), ties),
            space(self.coupling, align, taken),
        )

    def _remaining(self, quantity: Cost) -> Cost:
        """The quantity where what is fixed has its counts."""
        numbers = np.array(list(self.fixed), dtype=np.int64)
        return quantity.at(numbers, np.array(list(self.fixed.values())))

    def _with_fixed(self, counts: Counts) -> Counts:
        out = counts.copy()
        for index, count in self.fixed.items():
            out[index] = count
        return out

    def _allocation(self, of: str) -> str:
        return "uniform" if of == "channels" else self.request.allocation

    def _losses(self, where: Space, cost: Cost, of: str) -> Scores:
        return step_losses(self._allocation(of), where, self.scores, cost, self.additive)

    def _allocated(self, where: Space, cost: Cost, target: float, of: str) -> Counts:
        if of == "latency" and self.request.allocation == "global":
            counts = least_loss(where, self.scores, cost, target, of, self.additive)
        elif self.request.together is not None:
            # Few classes, some of large steps: of a mere order, most lengths miss the budget.
            counts = closest(where, self._losses(where, cost, of), cost, target, of)
        else:
            sequence = order(
                self._allocation(of), where, self.scores, cost, self.additive, of == "channels"
            )
            counts = meet(where, sequence, cost, target, of)
        # An alignment is worth more than the rest of a budget.
        if of != "latency" and self.request.align == 1:
            counts = spent(where, counts, self._losses(where, cost, of), cost, target)
        return along(where, counts, cost) if self.coupling.program.others else counts


def criterion_or_default(
    score: str | Score | Criterion | None, *, has_data: bool
) -> str | Score | Criterion:
    """The criterion asked for; left open, "obs" with data and "magnitude" without.

    Args:
        score: A criterion, or None.
        has_data: Whether there is calibration data.
    """
    if score is None:
        return "obs" if has_data else "magnitude"
    return score


def allocation_or_default(allocation: str | None, of: str = "") -> str:
    """The allocation asked for; left open, "global", but "uniform" for channels.

    Args:
        allocation: "uniform", "global" or None.
        of: What is budgeted.
    """
    if allocation is not None:
        return allocation
    return "uniform" if of == "channels" else "global"


def check_budget(ratio: float | None, of: str, latency_ms: float | None) -> str:
    """Refuse a budget that contradicts itself.

    Args:
        ratio: Fraction to remove, or None.
        of: What of.
        latency_ms: Milliseconds to come to, or None.

    Returns:
        The quantity that is budgeted.

    Raises:
        InputError: An argument has a wrong value, or two of them exclude each other.
    """
    if latency_ms is not None:
        if ratio is not None or of not in ("macs", "latency"):
            raise InputError(
                "latency_ms= stands for a budget of its own",
                where="latency_ms=",
                remedy="leave ratio and of= out, or use of='latency' with a ratio",
            )
        return "latency"
    check_ratio(ratio, "ratio=")
    return of


def check_ratio(ratio: object, where: str) -> None:
    """Refuse what is no fraction strictly between 0 and 1.

    Args:
        ratio: What the user passed.
        where: Name of the argument.

    Raises:
        InputError: It is something else.
    """
    what = f"the ratio is {shown(ratio)}; it is the fraction removed, between 0 and 1 exclusive"
    remedy = "pass e.g. 0.5 to remove half"
    check_number(ratio, "ratio", remedy, above=0, below=1, what=what, where=where)


def best_units(values: Any, count: int) -> Indices:
    """The highest-scored units, ascending; the earlier of equals.

    Args:
        values: Scores, [units], or [rows, units] where the group chooses row by row.
        count: How many (of each row).

    Returns:
        Kept indices, [count] or [rows, count].
    """
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def _held(coupling: Coupling, ignore: Iterable[str]) -> set[int]:
    return {i for p in ignore for i in matching(coupling, p, "ignore=")}


def _fixed(coupling: Coupling, request: Request, held: set[int]) -> dict[int, int]:
    fixed: dict[int, int] = {}
    for pattern, ratio in request.ratios.items():
        if ratio != 0:
            check_ratio(ratio, f"ratios[{pattern!r}]")
        for index in matching(coupling, pattern, "ratios="):
            group = coupling.groups[index]
            kept = max(1, group.size - round(group.size * ratio))
            fixed[index] = -(-kept // group.multiple) * group.multiple
    by_tie: dict[int, int] = {}
    for index, count in fixed.items():
        tie = coupling.groups[index].tied
        if tie is not None:
            by_tie[tie] = min(count, by_tie.get(tie, count))
    for group in coupling.groups:
        if group.tied in by_tie:
            fixed[group.index] = by_tie[group.tied]
    for each in request.together or ():
        sizes = {i: coupling.groups[i].size for i in each.groups}
        steps = [fixed[i] * each.steps // size for i, size in sizes.items() if i in fixed]
        if steps:
            fixed |= {i: size * max(1, min(steps)) // each.steps for i, size in sizes.items()}
    return {i: n for i, n in fixed.items() if i not in held}
