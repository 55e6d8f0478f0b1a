"""The points of the retraining benchmark, part by part."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from accuracy_summary import of_peer
from measure import read
from retrain_summary import AT, AUTO, BY, FT_SHARE
from retrain_tasks import EARLY, Subject
from torch import nn

import depcut
from depcut.training.schedules import SCHEDULES

REMOVED = (0.5, 0.7, 0.9)
BUDGETS = (0.025, 0.1, 0.25)
SMALLEST = 0.1  # the least budget that is shared among cycles or masks
CYCLES = 3
MASKED = 0.5  # share of gradual training in which masks grow
MASK_STEPS = 20
NAMES = (*SCHEDULES, FT_SHARE)
LONG = 1 - EARLY


@dataclass(frozen=True)
class Point:
    """One model to train and to measure.

    Attributes:
        part: What it belongs to.
        method: What is done.
        removed: Share of the MACs.
        budget: Share of T.
        steps: Of training.
        run: Does it.
        wide: Whether it trains the dense net for most of the time.
        rewinds: Whether it needs snapshots.
    """

    part: str
    method: str
    removed: float
    budget: float
    steps: int
    run: Callable[[], nn.Module]
    wide: bool = False
    rewinds: bool = False


Points = Iterator[Point]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    ratios: Sequence[float]
    budgets: Sequence[float]
    schedules: Sequence[str]


def schedules(subject: Subject, wanted: Wanted) -> Points:
    """All schedules from the same start, and two from the default's."""
    for removed in wanted.ratios:
        yield Point("schedules", "none", removed, 0.0, 0, partial(subject.magnitude, removed))
        yield Point(
            "schedules", "default, none", removed, 0.0, 0, partial(subject.default, removed)
        )
        for budget in wanted.budgets:
            steps = subject.steps(budget)
            for name in wanted.schedules:

                def run(
                    removed: float = removed, name: str = name, steps: int = steps
                ) -> nn.Module:
                    start, d = subject.magnitude(removed), subject.distance(removed)
                    return subject.retrain(start, name, steps, distance=d)

                yield Point("schedules", name, removed, budget, steps, run)

            for name in BY:

                def default(
                    removed: float = removed, name: str = name, steps: int = steps
                ) -> nn.Module:
                    d = subject.default_distance(removed) if name == AUTO else None
                    return subject.retrain(subject.default(removed), name, steps, distance=d)

                yield Point("schedules", f"default, {name}", removed, budget, steps, default)


def rewinding(subject: Subject, wanted: Wanted) -> Points:
    """Weights and rates go back to step T - T_rt (Renda et al. 2020)."""
    for removed in wanted.ratios:
        for budget in wanted.budgets:
            steps = subject.steps(budget)

            def run(removed: float = removed, steps: int = steps) -> nn.Module:
                back = subject.length - steps
                slim = depcut.training.rewind(
                    subject.model, subject.plan(removed), subject.snapshots, back
                )
                return subject.retrain(slim, "lrw", steps)

            yield Point("rewinding", "weight rewinding", removed, budget, steps, run, rewinds=True)


def long(subject: Subject, wanted: Wanted) -> Points:
    """What the same training makes of the trained weights as of those of the early snapshot."""
    steps = subject.length - subject.steps(EARLY)
    for removed in wanted.ratios:
        for name in ("lrw", FT_SHARE):

            def run(removed: float = removed, name: str = name) -> nn.Module:
                return subject.retrain(subject.magnitude(removed), name, steps)

            yield Point("long", name, removed, LONG, steps, run)


def iterative(subject: Subject, wanted: Wanted) -> Points:
    """Equal steps in all, in one cycle or several; every cycle ends at a rate of zero."""
    for removed in wanted.ratios:
        for budget in wanted.budgets:
            if budget < SMALLEST:
                continue
            steps = subject.steps(budget)
            for method, cycles in (("one shot", 1), (f"iterative, {CYCLES} cycles", CYCLES)):

                def run(
                    removed: float = removed, steps: int = steps, cycles: int = cycles
                ) -> nn.Module:
                    return _iterated(subject, removed, steps, cycles)

                yield Point("iterative", method, removed, budget, steps, run)


def _iterated(subject: Subject, removed: float, steps: int, cycles: int) -> nn.Module:
    bounds = [steps * cycle // cycles for cycle in range(cycles + 1)]

    def retrain(model: nn.Module, cycle: int) -> None:
        subject.retrain(model, "llr", bounds[cycle + 1] - bounds[cycle])

    return depcut.training.iterate(
        subject.model,
        removed,
        subject.inputs,
        steps=cycles,
        retrain=retrain,
        score="magnitude",
        compensate=False,
        align=1,
        progress=False,
    ).model.eval()


def gradual(subject: Subject, wanted: Wanted) -> Points:
    """Masks grow in the first half, and the schedule goes over all of it."""
    for removed in wanted.ratios:
        for budget in wanted.budgets:
            if budget < SMALLEST:
                continue
            steps = subject.steps(budget)

            def run(removed: float = removed, steps: int = steps) -> nn.Module:
                model, end = copy.deepcopy(subject.model), round(MASKED * steps)
                masks = depcut.training.Gradual(
                    model,
                    removed,
                    subject.inputs,
                    start=0,
                    end=end,
                    every=max(1, end // MASK_STEPS),
                    score="magnitude",
                    align=1,
                )
                subject.retrain(
                    model, "llr", steps, hook=lambda _, step: masks.step() if step else None
                )
                masks.step()  # the hook comes before a step, and so not after the last one
                return masks.commit().eval()

            yield Point("gradual", "gradual", removed, budget, steps, run, wide=True)


def scratch(subject: Subject, wanted: Wanted) -> Points:
    """The same architecture newly drawn; also the control of the winning tickets."""
    for removed in wanted.ratios:
        for control in ("E", "B"):
            steps = depcut.training.scratch_epochs(subject.plan(removed), subject.length, control)

            def run(removed: float = removed, steps: int = steps) -> nn.Module:
                return subject.from_scratch(subject.drawn(removed), steps)

            share = round(steps / subject.length, 3)
            yield Point("scratch", f"scratch-{control}", removed, share, steps, run)


def lottery(subject: Subject, wanted: Wanted) -> Points:
    """Kept weights of the initialisation, and of the early snapshot, on the original schedule."""
    for removed in wanted.ratios:
        for method, step in (("ticket of step 0", 0), ("early ticket", subject.steps(EARLY))):
            steps = subject.length - step

            def run(removed: float = removed, step: int = step, steps: int = steps) -> nn.Module:
                slim = depcut.training.rewind(
                    subject.model, subject.plan(removed), subject.snapshots, step
                )
                return subject.retrain(slim, "lrw", steps)

            share = 1 - step / subject.length
            yield Point("lottery", method, removed, share, steps, run, rewinds=True)


def rival(subject: Subject, wanted: Wanted) -> Points:
    """Torch-Pruning's best variants, retrained as the default is."""
    if AT not in wanted.budgets:
        return
    steps = subject.steps(AT)
    for removed in wanted.ratios:
        for name in best_variants(subject.task.name, removed):
            for by in BY:

                def run(removed: float = removed, name: str = name, by: str = by) -> nn.Module:
                    slim = subject.of_peer(name, removed)
                    d = subject.distance_of_peer(slim) if by == AUTO else None
                    return subject.retrain(slim, by, steps, distance=d)

                method = name if by == "llr" else f"{name}, {by}"
                yield Point("rival", method, removed, AT, steps, run)


def best_variants(task: str, removed: float, count: int = 2) -> list[str]:
    """Those that lost least one-shot at the operating point nearest to this one, by the mean."""
    rows = read("accuracy")["rows"]
    rows = [r for r in rows if r["name"] == task and of_peer(r) and "error" not in r]
    nearest = min({r["removed"] for r in rows}, key=lambda p: abs(p - removed))
    lost: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["removed"] == nearest:
            lost[row["method"]].append(row["lost"])
    most = max(map(len, lost.values()))
    usable = {name: mean(values) for name, values in lost.items() if len(values) == most}
    return sorted(usable, key=lambda name: usable[name])[:count]


# in the order in which they are measured
PARTS: Mapping[str, Callable[[Subject, Wanted], Points]] = {
    part.__name__: part
    for part in (schedules, rewinding, iterative, gradual, rival, scratch, lottery, long)
}
