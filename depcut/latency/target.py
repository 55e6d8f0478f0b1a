"""A plan that meets a time: allocate by the model of time, measure the candidate, correct."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from depcut.allocate.choose import Chooser
from depcut.allocate.space import Counts
from depcut.apply.plan import Plan
from depcut.branches.branch import Residuals
from depcut.errors import BudgetError
from depcut.latency.branches import Widths, widths_without_branches, without
from depcut.latency.measure import temporary
from depcut.latency.workload import Benches, Together, Workload, recorded

_TRIES = 8
_CLOSE = 0.015  # a candidate this close to its target is not corrected
_MISSED = 0.05
_ROUNDS = 9
_MORE_ROUNDS = 21  # of a candidate that seems to be close


@dataclass(frozen=True)
class Goal:
    """What time to come to: a share removed of the dense model's, or a number of seconds.

    Attributes:
        ratio: Fraction of the dense model's time to remove, or None.
        seconds: Time to come to, or None.
    """

    ratio: float | None = None
    seconds: float | None = None

    @staticmethod
    def of(ratio: float | None, milliseconds: float | None) -> Goal:
        """A share to remove, or a time in milliseconds.

        Args:
            ratio: See `Goal`.
            milliseconds: To come to, or None.
        """
        return Goal(ratio, None if milliseconds is None else 1e-3 * milliseconds)

    def share(self, dense_seconds: float) -> float:
        """Share of the dense model's time that may be left."""
        if self.seconds is not None:
            return self.seconds / dense_seconds
        return 1 - (self.ratio or 0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """What a plan records of it."""
        if self.seconds is not None:
            return {"of": "latency", "latency_ms": 1e3 * self.seconds}
        return {"of": "latency", "ratio": self.ratio}


@dataclass(frozen=True)
class _Try:
    """One candidate: predicted seconds, and its measured time as a share of the dense one's."""

    plan: Plan
    counts: Counts
    predicted: float
    beside: Together
    miss: float


class _Attempts:
    """Candidates for one goal, each measured beside the dense model."""

    def __init__(self, model: nn.Module, benches: Benches, widths: Widths, goal: Goal) -> None:
        self.model, self.benches, self.goal = model, benches, goal
        self.widths, self.chooser = widths, widths.chooser
        self.tried: list[_Try] = []

    def measure(self, counts: Counts) -> _Try:
        """Make and time the model with these counts."""
        chosen = self.widths.plan(counts, self.goal.settings)
        plan = Plan.of(chosen, self.chooser.coupling, self.model)
        slim = plan.apply(self.model)
        beside = self.benches.beside(slim, _ROUNDS)
        if abs(self._miss(beside)) <= _CLOSE:
            beside = self.benches.beside(slim, _MORE_ROUNDS)  # chance, too, brings one close
        attempt = _Try(plan, counts, self.widths.cost(counts), beside, self._miss(beside))
        self.tried.append(attempt)
        return attempt

    def _miss(self, beside: Together) -> float:
        """By what share of the goal a candidate takes longer."""
        return beside.ratio / self.goal.share(beside.dense_seconds) - 1

    def knows(self, counts: Counts) -> bool:
        """Whether a candidate with these counts was measured."""
        return any((old.counts == counts).all() for old in self.tried)

    @property
    def best(self) -> _Try:
        """The candidate closest to the goal."""
        return min(self.tried, key=lambda attempt: abs(attempt.miss))

    def next_aim(self) -> float:
        """What to predict for the next candidate, in seconds of the model of time.

        Between the closest that is too fast and the closest that is too slow, where both are known
        and the model has them in that order; else what is predicted for the last, corrected by
        what that one missed.
        """
        fast = max((t for t in self.tried if t.miss < 0), key=lambda t: t.miss, default=None)
        slow = min((t for t in self.tried if t.miss >= 0), key=lambda t: t.miss, default=None)
        if fast is None or slow is None or fast.predicted >= slow.predicted:
            last = self.tried[-1]
            return last.predicted / (1 + last.miss)
        share = -fast.miss / (slow.miss - fast.miss)
        return fast.predicted + share * (slow.predicted - fast.predicted)


def plan_for_latency(
    model: nn.Module,
    chooser: Chooser,
    workload: Workload,
    goal: Goal,
    residuals: Residuals | None = None,
) -> Plan:
    """Choose counts by the model of time, then measure the candidate and correct what was off.

    Args:
        model: The dense model; it is only read.
        chooser: The request, resolved.
        workload: The calls that are timed, each with its model of time.
        goal: What time to come to, of all calls together.
        residuals: Branches that may go; None: widths alone meet the time.

    Returns:
        The candidate closest to the goal. Its settings hold what was predicted and measured.

    Raises:
        BudgetError: Not even the smallest widths are fast enough, or nothing has to go.
        ExportError: The model cannot be exported or run.
    """
    from rich.console import Console

    console = Console(stderr=True, quiet=not workload.progress)
    modelled, of_counts = workload.dense_seconds, workload.cost
    with temporary() as folder, console.status("measuring the dense model") as status:
        benches = Benches(model, workload, folder)
        dense = benches.beside(None, _ROUNDS).dense_seconds
        if goal.share(dense) >= 1:
            raise BudgetError(
                f"the model takes {1e3 * dense:.3g} ms as it is: nothing has to go",
                where=f"latency_ms={1e3 * (goal.seconds or 0):.4g}",
                remedy="pass less than that",
            )
        aim = goal.share(dense) * modelled
        widths = Widths(chooser, of_counts)
        if residuals is not None:
            status.update("measuring the model without its branches")
            aside = _aside(model, benches, widths, residuals, modelled)
            with suppress(BudgetError):  # too fast even so: what can be reached is measured
                widths = widths_without_branches(chooser, residuals, of_counts, aim, aside)
        attempts = _Attempts(model, benches, widths, goal)
        for number in range(_TRIES):
            status.update(f"measuring candidate {number + 1}")
            counts = _counts(attempts, aim)
            if counts is None:
                break
            attempt = attempts.measure(counts)
            if abs(attempt.miss) <= _CLOSE:
                break
            aim = attempts.next_aim()
        least = widths.chooser.smallest()
        if attempts.best.miss > _MISSED and not attempts.knows(least):
            attempts.measure(least)
    return _chosen(attempts, workload)


def _chosen(attempts: _Attempts, workload: Workload) -> Plan:
    """The candidate closest to the goal, with what was measured of it in its settings.

    Raises:
        BudgetError: All of them are too slow.
    """
    best, first = attempts.best, workload.calls[0]
    if all(attempt.miss > _MISSED for attempt in attempts.tried):
        fastest = min(attempts.tried, key=lambda attempt: attempt.beside.ratio)
        raise _unreachable(fastest.beside, attempts.goal)
    ratio, dense_seconds = best.beside.ratio, best.beside.dense_seconds
    if abs(best.miss) > _MISSED:
        warnings.warn(
            f"the closest of {len(attempts.tried)} candidates takes "
            f"{1e3 * ratio * dense_seconds:.3g} ms, {best.miss:+.1%} of the target: "
            "widths move in steps; align= sets how large they are",
            stacklevel=4,
        )
    measured: dict[str, Any] = {
        "dense_ms": 1e3 * dense_seconds,
        "measured_ms": 1e3 * ratio * dense_seconds,
        "predicted_ms": 1e3 * best.predicted / workload.dense_seconds * dense_seconds,
        "candidates": len(attempts.tried),
        "threads": first.model.threads,
        "runtime": first.model.runtime,
        "machine": first.model.machine,
    }
    if first.name:
        measured["workload"] = recorded(best.beside.parts)
        measured["threads"] = max(call.model.threads for call in workload.calls)
    return replace(best.plan, settings={**best.plan.settings, "latency": measured})


def _counts(attempts: _Attempts, aim: float) -> Counts | None:
    """What to measure next; None if nothing is left to try."""
    chooser, cost = attempts.chooser, attempts.widths.cost
    try:
        counts = chooser.meet(cost, aim, "latency")
    except BudgetError:
        counts = chooser.smallest()
    if attempts.knows(counts) and not _is_least(counts, chooser):
        best, tried = attempts.best, [attempt.counts for attempt in attempts.tried]
        goal = cost(best.counts) / (1 + best.miss)
        return chooser.nudged(cost, best.counts, goal, tried)
    return None if attempts.knows(counts) else counts


def _aside(
    model: nn.Module, benches: Benches, widths: Widths, residuals: Residuals, dense_seconds: float
) -> float:
    """Seconds that a branch saves beside its own widths' kernels, by measuring without any.

    Args:
        model: The dense model.
        benches: Time it beside others.
        widths: Those of the dense model.
        residuals: Its branches.
        dense_seconds: What it takes as a whole in the unit of the predictions.
    """
    chooser, cost = widths.chooser, widths.cost
    names = tuple(b.name for b in residuals.sparing(chooser.spares).branches)
    if not names:
        return 0.0
    bare = without(chooser, residuals, cost, names)
    plan = Plan.of(bare.plan(cost.dense.astype(np.int64), {}), chooser.coupling, model)
    measured = benches.beside(plan.apply(model), _ROUNDS).ratio * dense_seconds
    return max(0.0, bare.cost.total - measured) / len(names)


def _is_least(counts: Counts, chooser: Chooser) -> bool:
    """Whether nothing more can go."""
    return bool((counts == chooser.smallest()).all())


def _unreachable(fastest: Together, goal: Goal) -> BudgetError:
    reached = fastest.ratio * fastest.dense_seconds
    wanted = goal.share(fastest.dense_seconds) * fastest.dense_seconds
    return BudgetError(
        f"latency cannot fall to {1e3 * wanted:.3g} ms: the smallest widths take "
        f"{1e3 * reached:.3g} ms, measured, of {1e3 * fastest.dense_seconds:.3g} ms",
        where="of='latency'",
        remedy=f"ask for a ratio of at most {max(1 - fastest.ratio, 0.0):.2f} "
        f"(latency_ms={1e3 * reached:.3g}), or let more layers shrink (ignore=, ratios=)",
    )
