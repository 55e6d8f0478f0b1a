"""Markdown tables of the study's rows: what the page shows, and every number behind it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

import study_verdicts
from measure import Row
from study_equal import equal_accuracy
from study_prune import DEFAULT

AT = (0.5, 0.8)  # removed, of the tables
TRAINED_AT = (0.5, 0.8, 0.9)


def tables(good: Sequence[Row]) -> dict[str, str]:
    """Markdown, by name."""
    return {
        "dense": dense(good),
        "claims": study_verdicts.table(good),
        "criteria": criteria(good),
        "rivals": rivals(good),
        "unstructured": unstructured(good),
        "as_many": as_many(good),
        "equal_accuracy": equal_accuracy(good),
        "times": times(good),
        "tickets": summary(good, "tickets", TRAINED_AT),
        "sparse_dense": summary(good, "sparse_dense", TRAINED_AT),
        "sparse_tickets": summary(good, "sparse_tickets", TRAINED_AT),
        "before_training": summary(good, "before_training", TRAINED_AT),
        "papers": papers(good),
        "cost": cost(good),
        "all_criteria": by_task(good, "criteria", AT),
        "all_rivals": by_task(good, "rivals", AT),
        "all_unstructured": by_task(good, "unstructured", (0.5, 0.65, 0.8, 0.9)),
        "all_tickets": by_task(good, "tickets", TRAINED_AT),
        "all_sparse_dense": by_task(good, "sparse_dense", TRAINED_AT),
        "all_sparse_tickets": by_task(good, "sparse_tickets", TRAINED_AT),
        "all_before_training": by_task(good, "before_training", TRAINED_AT),
    }


def part_of(good: Iterable[Row], part: str) -> list[Row]:
    return [row for row in good if row["part"] == part]


def tasks_of(good: Iterable[Row]) -> list[str]:
    return sorted({row["task"] for row in good})


def seeds_of(good: Iterable[Row]) -> str:
    """How many nets stand behind a row."""
    return str(len({(row["task"], row["seed"]) for row in good}))


def grouped(good: Iterable[Row], *names: str) -> Mapping[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in good:
        found[tuple(row.get(name) for name in names)].append(row)
    return found


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(lines)


def lost(found: Iterable[Row]) -> list[float]:
    return [row["lost"] for row in found]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 5 else 2
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    return f"{mean(values):.{digits}f}±{stdev(values):.{digits}f}"


def share_lost(found: Iterable[Row], ranges: Mapping[str, float]) -> float | None:
    """The mean over tasks of what is lost, as a share of what the task can lose."""
    by = grouped((row for row in found if row["task"] in ranges), "task")
    return mean(mean(lost(rows)) / ranges[task] for (task,), rows in by.items()) if by else None


def percent(share: float | None) -> str:
    return "-" if share is None else f"{round(100 * share, 1) + 0.0:.1f}"  # no -0.0


def dense(good: Sequence[Row]) -> str:
    """The dense nets, and what one can lose."""
    seen = {(r["task"], r["seed"]): r["dense"] for r in good if "dense" in r}
    ranges = study_verdicts.ranges_of(good)
    return markdown(
        ("task", "dense metric", "can lose"),
        [
            (
                task,
                spread([value for (name, _), value in seen.items() if name == task]),
                f"{ranges[task]:.1f}" if task in ranges else "-",
            )
            for task in sorted({name for name, _ in seen})
        ],
    )


def criteria(good: Sequence[Row]) -> str:
    """Every criterion over all tasks, as it is and repaired, and what a plan takes."""
    part, ranges = part_of(good, "criteria"), study_verdicts.ranges_of(good)
    by, every = grouped(part, "method", "compensated", "removed"), grouped(part, "method")
    body = []
    for (method,), rows in every.items():
        cells = [
            share_lost(by[method, compensated, removed], ranges)
            for compensated in (False, True)
            for removed in AT
        ]
        seconds = [median(row["seconds"] for row in by[method, c, AT[0]]) for c in (False, True)]
        body.append(
            (
                cells[-1] or 0.0,
                (method, *map(percent, cells), *map("{:.1f}".format, seconds), seeds_of(rows)),
            )
        )
    head = [f"{removed:.0%}{how}" for how in ("", ", repaired") for removed in AT]
    return markdown(
        ("criterion", *head, "s", "s, repaired", "nets"), [cells for _, cells in sorted(body)]
    )


def rivals(good: Sequence[Row]) -> str:
    """depcut's default beside the best and the median of Torch-Pruning's variants, by task."""
    part = part_of(good, "rivals")
    by = grouped(part, "task", "removed", "method")
    ours = grouped(part_of(good, "criteria"), "task", "removed", "method", "compensated")
    body = []
    for name in tasks_of(part):
        for removed in AT:
            theirs = {
                method: mean(lost(rows))
                for (task, at, method), rows in by.items()
                if (task, at) == (name, removed)
            }
            if not theirs:
                continue
            best = min(theirs, key=theirs.__getitem__)
            own = [ours[name, removed, DEFAULT, flag] for flag in (True, False)]
            body.append(
                (
                    name,
                    f"{removed:.0%}",
                    *(spread(lost(rows)) for rows in own),
                    f"{theirs[best]:.2f} ({best.removeprefix('Torch-Pruning ')})",
                    f"{median(theirs.values()):.2f} of {len(theirs)}",
                )
            )
    head = (
        "task",
        "removed",
        f"{DEFAULT}, repaired",
        DEFAULT,
        "best of Torch-Pruning",
        "its median",
    )
    return markdown(head, body)


def summary(good: Sequence[Row], kind: str, ratios: Sequence[float]) -> str:
    """A part's methods over all tasks: what is lost, of what can be; seconds beside steps."""
    part, ranges = part_of(good, kind), study_verdicts.ranges_of(good)
    by = grouped(part, "method", "removed")
    body = []
    for (method,), every in grouped(part, "method").items():
        # A control of which nothing is removed stands beside every ratio.
        found = [by[method, removed] or by[method, 0.0] for removed in ratios]
        cells = [percent(share_lost(rows, ranges)) for rows in found]
        body.append(
            (method, *cells, f"{median(row['seconds'] for row in every):.0f}", seeds_of(every))
        )
    return markdown(("method", *(f"{r:.0%}" for r in ratios), "median s", "nets"), body)


def by_task(good: Sequence[Row], kind: str, ratios: Sequence[float]) -> str:
    """Losses of a part in the metric's unit: methods down, tasks across."""
    part = part_of(good, kind)
    by, names = grouped(part, "method", "compensated", "removed", "task"), tasks_of(part)
    methods = dict.fromkeys((row["method"], row.get("compensated")) for row in part)
    return markdown(
        ("method", "removed", *names),
        [
            (
                method + (", repaired" if compensated else ""),
                f"{removed:.0%}",
                *(spread(lost(by[method, compensated, removed, name])) for name in names),
            )
            for method, compensated in methods
            for removed in (0.0, *ratios)
            if any(by[method, compensated, removed, name] for name in names)
        ],
    )


def unstructured(good: Sequence[Row]) -> str:
    """What zeros anywhere lose and save, by share, over all tasks."""
    part = [r for r in part_of(good, "unstructured") if "as many" not in r["method"]]
    ranges, by = study_verdicts.ranges_of(good), grouped(part, "method", "removed")
    body = []
    for (method, removed), rows in sorted(by.items()):
        shares = [geometric(r[k] / r["bytes"] for r in rows) for k in ("zip_bytes", "bitmap_bytes")]
        lose = percent(share_lost(rows, ranges))
        body.append((method, f"{removed:.0%}", lose, *(f"{s:.2f}" for s in shares), seeds_of(rows)))
    return markdown(("zeros", "share", "lost", "zipped", "bitmap", "nets"), body)


def as_many(good: Sequence[Row]) -> str:
    """Whole units, and zeros that leave as many parameters, at the points that both have."""
    ranges, wanted = study_verdicts.ranges_of(good), (0.2, 0.35, *TRAINED_AT)
    units = [r for r in part_of(good, "criteria") if r["method"] == DEFAULT and r["compensated"]]
    zeros = [r for r in part_of(good, "unstructured") if "as many" in r["method"]]
    shared = set(grouped(units, "task", "seed", "removed"))
    for rows in grouped(zeros, "method").values():
        shared &= set(grouped(rows, "task", "seed", "removed"))
    found = [r for r in units + zeros if (r["task"], r["seed"], r["removed"]) in shared]
    by = grouped(found, "method", "removed")
    body = [
        (
            "whole units: obs, repaired" if method == DEFAULT else method,
            *(percent(share_lost(by[method, removed], ranges)) for removed in wanted),
            seeds_of(rows),
        )
        for (method,), rows in grouped(found, "method").items()
    ]
    return markdown(("MACs removed by obs", *(f"{r:.0%}" for r in wanted), "nets"), body)


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(mean(logs))


def times(good: Sequence[Row]) -> str:
    """Speedup in onnxruntime and bytes of the files."""
    part = [row for row in good if row["part"] in ("times", "sparse_times")]
    by = grouped(part, "part", "removed", "task")
    names = tasks_of(part)
    body = []
    for kind, removed in sorted({(row["part"], row["removed"]) for row in part}):
        cells = []
        for name in names:
            found = by[kind, removed, name]
            cells.append(
                f"{found[0]['speedup']:.2f}x, {found[0]['bytes'] / found[0]['dense_bytes']:.2f}"
                if found
                else "-"
            )
        label = "zeros by magnitude" if kind == "sparse_times" else "depcut's default"
        body.append((label, f"{removed:.0%}", *cells))
    return markdown(("faster, and size of the file", "removed", *names), body)


def papers(good: Sequence[Row]) -> str:
    """Loss of published recipes, with the MACs that they came to."""
    part = [row for row in good if row["part"] == "papers"]
    names = tasks_of(part)
    by = grouped(part, "method", "removed", "task")
    body = []
    for method in dict.fromkeys(row["method"] for row in part):
        for removed in sorted({row["removed"] for row in part if row["method"] == method}):
            found = [r for n in names for r in by[method, removed, n]]
            kept = mean(row["macs"] for row in found)
            cells = [spread(lost(by[method, removed, name])) for name in names]
            body.append((method, f"{1 - kept:.0%}", *cells))
    return markdown(("recipe", "MACs removed", *names), body)


def hours(every: Iterable[Row]) -> float:
    """Of one core."""
    return sum(row.get("job_seconds", 0.0) for row in every) / 3600


def cost(good: Sequence[Row]) -> str:
    """Hours by part, and points."""
    return markdown(
        ("part", "points", "hours"),
        [
            (part, str(len(found)), f"{hours(found):.1f}")
            for (part,), found in sorted(grouped(good, "part").items())
        ],
    )
