"""Tables and statements of the accuracy benchmark, made from the rows of results/accuracy.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from measure import Row
from rich.console import Console
from rich.table import Table

PEER = "Torch-Pruning"
BEST = f"{PEER}, best"
AT = 0.5  # the share of the MACs removed that the statements are about


def of_peer(row: Row) -> bool:
    return row["method"].startswith(f"{PEER} ")


def with_best(rows: Iterable[Row]) -> list[Row]:
    """depcut's rows, and of Torch-Pruning's the one that lost least at each point of each seed."""
    rows = list(rows)
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        point = row["name"], row["seed"], row["removed"]
        if not of_peer(row) or "error" in row:
            continue
        if point not in best or row["lost"] < best[point]["lost"]:
            best[point] = {**row, "method": BEST, "variant": row["method"]}
    return [r for r in rows if not of_peer(r)] + list(best.values())


def losses(rows: Iterable[Row], name: str, method: str, removed: float) -> dict[int, float]:
    """What was lost, by seed."""
    return {
        r["seed"]: r["lost"]
        for r in rows
        if (r["name"], r["method"], r["removed"]) == (name, method, removed) and "error" not in r
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def summary(rows: Iterable[Row]) -> dict[str, str]:
    """The statements that the benchmark is there to make, over the seeds that both sides have."""
    rows = with_best(rows)
    names = list(dict.fromkeys(r["name"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    facts: dict[str, str] = {}
    for name in names:
        other = BEST if losses(rows, name, BEST, AT) else "magnitude"
        facts[f"{name}: lost by default / by {other}, 50 % removed"] = _ratio(
            losses(rows, name, "default", AT), losses(rows, name, other, AT)
        )
    for method in methods:
        if method in ("random", BEST) or "+" in method or "," in method or method == "default":
            continue
        pairs = [_shared(losses(rows, n, method, AT), losses(rows, n, "random", AT)) for n in names]
        measured = [(mean(a), mean(b)) for a, b in pairs if a]
        won = sum(a < b for a, b in measured)
        facts[f"{method} loses less than random, 50 % removed"] = f"{won} of {len(measured)} tasks"
    for name in names:
        left = _ratio(
            losses(rows, name, "magnitude+compensate", AT), losses(rows, name, "magnitude", AT)
        )
        facts[f"{name}: of what magnitude lost, compensation alone recovers"] = (
            f"{1 - float(left):.2f}" if left != "not measured" else left
        )
    for name in names:
        reasons = failures([r for r in rows if r["name"] == name])
        if reasons:
            facts[f"{name}: failed"] = "; ".join(reasons)
    return facts


def _shared(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[float], list[float]]:
    seeds = sorted(set(a) & set(b))
    return [a[s] for s in seeds], [b[s] for s in seeds]


def _ratio(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """Of the means; "nan" where the other side lost nothing."""
    one, other = _shared(a, b)
    if not one:
        return "not measured"
    return f"{mean(one) / mean(other):.2f}" if mean(other) > 0 else "nan"


def failures(rows: Iterable[Row]) -> list[str]:
    """Why points of depcut's have no result, with their number."""
    own = (r for r in rows if not of_peer(r) and "error" in r)
    counted = Counter((r["method"], r["error"]) for r in own)
    return [f"{method}: {error} ({n} points)" for (method, error), n in counted.items()]


def peer_failures(rows: Iterable[Row]) -> list[str]:
    """The same for Torch-Pruning, by reason alone."""
    counted = Counter((r["name"], r["error"]) for r in rows if of_peer(r) and "error" in r)
    return [f"{name}: {error} ({n} points)" for (name, error), n in counted.most_common()]


def cells(rows: Iterable[Row], name: str) -> list[list[str]]:
    """Header and lines of one task's table: what is lost, mean and deviation over the seeds."""
    rows = [r for r in with_best(rows) if r["name"] == name]
    points = sorted({r["removed"] for r in rows})
    good = [r for r in rows if "error" not in r]
    dense = {r["seed"]: r["dense"] for r in good}
    out = [["method", *(f"{p:.0%} removed" for p in points)]]
    out.append([f"dense: {spread(list(dense.values()))}", *[""] * len(points)])
    for method in dict.fromkeys(r["method"] for r in rows):
        tried = {r["removed"] for r in rows if r["method"] == method}
        lost = {p: list(losses(rows, name, method, p).values()) for p in points}
        out.append([method, *(spread(lost[p]) or ("FAIL" if p in tried else "") for p in points)])
    variants = [
        Counter(r["variant"] for r in good if r.get("variant") and r["removed"] == p)
        for p in points
    ]
    if any(variants):
        out.append(["which that is", *(", ".join(v).replace(f"{PEER} ", "") for v in variants)])
    return out


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(r["name"] for r in rows):
        header, *lines = cells(rows, name)
        table = Table(title=f"{name}: lost without retraining")
        for i, column in enumerate(header):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for key, value in summary(rows).items():
        console.print(f"{key}: {value}", markup=False)
    for line in peer_failures(rows):
        console.print(f"{PEER} without a result: {line}", markup=False)


def markdown(rows: Sequence[Row]) -> str:
    """The same tables for README.md."""
    parts = []
    for name in dict.fromkeys(r["name"] for r in rows):
        header, *lines = cells(rows, name)
        made = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        text = "\n".join("| " + " | ".join(line) + " |" for line in made)
        parts.append(f"### {name}\n\n{text}")
    missing = peer_failures(rows)
    if missing:
        lines = "\n".join(f"- {line}" for line in missing)
        parts.append(f"{PEER} without a result:\n\n{lines}")
    return "\n\n".join(parts)
