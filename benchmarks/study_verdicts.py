"""Judges the claims of study_claims.py by the study's rows.

A claim compares two methods at the points that both have (task, seed and ratio), in pairs. It is
confirmed where the first is better (or as good, where the claim is only that) in at least three
quarters of the pairs and on the average of tasks; else it is not, and where the second is better by
that measure the reverse holds. Few pairs, or those of one task, are too few to say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, median

from measure import Row
from study_claims import CLAIMS, NOT_TESTABLE, Claim, Picks
from study_plot import of

Point = tuple[str, int, float]

SHARE = 0.75  # of the pairs
PAIRS, TASKS = 6, 2  # at least, to judge a claim by
ALIKE = 0.05  # of a task's range between dense and the worst: a difference that counts
HALF = 0.5  # of that range: what loses less still works


def table(good: Sequence[Row]) -> str:
    """Markdown: how many claims came out how, and a row a claim."""
    ranges = ranges_of(good)
    found = [(claim.text, claim.source, *judged(claim, good, ranges)) for claim in CLAIMS]
    found += [*timed(good), *((*what, "") for what in NOT_TESTABLE)]
    counts = Counter(verdict.partition(":")[0].replace("*", "") for _, _, verdict, _ in found)
    lines = [
        "; ".join(f"{verdict}: {count}" for verdict, count in counts.most_common()) + ".",
        "",
        "| claim | source | here | figures |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in found),
    ]
    return "\n".join(lines)


def timed(good: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """What the notes say of speed: the claim, its source, the verdict and its figures."""
    for text, part, faster in (
        (
            "unstructured zeros are not faster without special kernels (80 % zeros)",
            "sparse_times",
            False,
        ),
        ("whole units are faster on ordinary hardware at once (80 % of the MACs)", "times", True),
    ):
        found = [row["speedup"] for row in good if row["part"] == part and row["removed"] == 0.8]
        if not found:
            yield text, "the notes", "not measured yet", ""
            continue
        share = mean((speedup > 1 + ALIKE) == faster for speedup in found)
        verdict = "confirmed" if share >= SHARE else "not confirmed, mixed"
        least, most, middle = min(found), max(found), median(found)
        figures = (
            f"{least:.2f} to {most:.2f} times as fast on {len(found)} nets, median {middle:.2f}"
        )
        yield text, "the notes", verdict, f"{figures}; holds on {share:.0%}"


def ranges_of(good: Iterable[Row]) -> dict[str, float]:
    """How far a task can fall: the median loss of a random choice at the highest ratios."""
    losses: dict[str, list[float]] = defaultdict(list)
    for row in good:
        if of("criteria", "random", False)(row) and row["removed"] >= 0.8:
            losses[row["task"]].append(row["lost"])
    return {task: max(median(found), 1e-9) for task, found in losses.items()}


def judged(claim: Claim, good: Sequence[Row], ranges: Mapping[str, float]) -> tuple[str, str]:
    """The verdict, and the figures that it rests on."""
    first = losses(claim, good, claim.first)
    second = losses(claim, good, claim.second) if claim.second else dict.fromkeys(first, 0.0)
    # A control of which nothing is removed stands beside every ratio.
    second |= {p: second[whole] for p in first if (whole := (p[0], p[1], 0.0)) in second}
    pairs = [p for p in sorted(first.keys() & second.keys()) if p[0] in ranges]
    if not pairs:
        return "not measured yet", ""
    # positive: the second loses more, as a share of what the task can lose
    gains = {p: (second[p] - first[p]) / ranges[p[0]] for p in pairs}
    better = mean(gain > 0 for gain in gains.values())
    level = mean(gain > -ALIKE for gain in gains.values())
    by_task = [mean(g for p, g in gains.items() if p[0] == task) for task in {p[0] for p in pairs}]
    tasks = f"{sum(gain > 0 for gain in by_task)} of {len(by_task)} tasks"
    wins = level if claim.matches else better
    if len(pairs) < PAIRS or len(by_task) < TASKS:
        verdict = "too few yet"
    elif wins >= SHARE and (claim.matches or mean(by_task) > 0):
        verdict = "confirmed"
    elif 1 - wins >= SHARE and mean(by_task) < 0:
        verdict = "**not confirmed**, the reverse"
    else:
        verdict = "not confirmed, mixed"
    as_good = f"as good in {level:.0%} and " if claim.matches else ""
    figures = (
        f"{as_good}better in {better:.0%} of {len(pairs)} pairs and on {tasks}; "
        f"{mean(by_task):+.1%} of what a task can lose"
    )
    alive = [p for p in pairs if min(first[p], second[p]) < HALF * ranges[p[0]]]
    if alive and len(alive) < len(pairs):
        held = mean(gains[p] > (-ALIKE if claim.matches else 0) for p in alive)
        figures += f"; holds in {held:.0%} of the {len(alive)} pairs of which one still works"
    return verdict, figures


def losses(claim: Claim, good: Iterable[Row], picks: Picks) -> dict[Point, float]:
    return {
        (row["task"], row["seed"], row["removed"]): row["lost"]
        for row in good
        if picks(row)
        and "lost" in row
        and (not claim.ratios or row["removed"] in (0.0, *claim.ratios))
    }
