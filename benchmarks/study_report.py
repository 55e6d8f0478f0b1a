"""Tables, plots and claims of the study, from its rows alone."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import measure
import study_claims
import study_plot
from measure import Row

PATH = measure.RESULTS / "study.jsonl.gz"
PAGE = measure.HERE.parent / "docs" / "guides" / "which_method.md"
POINT = ("task", "seed", "part", "method", "removed", "compensated")
AT = (0.5, 0.8)  # removed, of the tables


def rows() -> list[Row]:
    """All rows of the last dense net of each task and seed; of those of one point, the last."""
    if not PATH.exists():
        return []
    found: dict[tuple[Any, ...], Row] = {}
    nets: dict[tuple[str, int], str] = {}
    with gzip.open(PATH, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found[tuple(row.get(name) for name in POINT)] = row
            nets[row["task"], row["seed"]] = row["key"]
    return [row for row in found.values() if nets[row["task"], row["seed"]] == row["key"]]


def append(found: Iterable[Row]) -> None:
    """Put rows behind those of the file: a gzip file may have any number of members."""
    member = gzip.compress(_lines(found))
    with PATH.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(member)


def repack() -> None:
    """Write the file anew, as one member without the rows that were measured again."""
    ordered = sorted(rows(), key=lambda row: [str(row.get(name)) for name in POINT])
    draft = PATH.with_name(f".{PATH.name}")
    draft.write_bytes(gzip.compress(_lines(ordered), mtime=0))
    draft.replace(PATH)


def _lines(found: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def main() -> int:
    """Rebuild all that follows from the rows."""
    repack()
    every = rows()
    good = [row for row in every if "error" not in row]
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(good).items():
        text = between(text, name, table)
    PAGE.write_text(text, encoding="utf-8")
    pictures = study_plot.main(good)
    print(f"{len(every)} rows, {hours(every):.1f} hours of computing; written: {PAGE}")
    for path in pictures:
        print(f"written: {path}")
    return 0


def hours(every: Iterable[Row]) -> float:
    return sum(row.get("job_seconds", 0.0) for row in every) / 3600


def between(text: str, name: str, table: str) -> str:
    """The text with what stands between two marks replaced."""
    pattern = re.compile(f"(<!-- study:{name} -->\n).*?(<!-- /study:{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE} has no marks for the table {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def tables(good: Sequence[Row]) -> dict[str, str]:
    """Markdown, by name."""
    return {
        "dense": dense(good),
        "criteria": criteria(good),
        "unstructured": unstructured(good),
        "times": times(good),
        "tickets": by_method(good, "tickets", (0.5, 0.8, 0.9)),
        "sparse_dense": by_method(good, "sparse_dense", (0.5, 0.8, 0.9)),
        "before_training": by_method(good, "before_training", (0.5, 0.8, 0.9)),
        "papers": papers(good),
        "claims": study_claims.table(good),
        "cost": cost(good),
    }


def tasks_of(good: Iterable[Row]) -> list[str]:
    return sorted({row["task"] for row in good})


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "-"
    digits = 1 if max(map(abs, values)) >= 5 else 3
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    return f"{mean(values):.{digits}f}±{stdev(values):.{digits}f}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in body]
    return "\n".join(lines)


def grouped(good: Iterable[Row], *names: str) -> Mapping[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in good:
        found[tuple(row.get(name) for name in names)].append(row)
    return found


def lost(found: Iterable[Row]) -> list[float]:
    return [row["lost"] for row in found]


def dense(good: Sequence[Row]) -> str:
    """The dense nets."""
    seen = {(r["task"], r["seed"]): r["dense"] for r in good if "dense" in r}
    return markdown(
        ("task", "dense metric"),
        [
            (task, spread([value for (name, _), value in seen.items() if name == task]))
            for task in sorted({name for name, _ in seen})
        ],
    )


def criteria(good: Sequence[Row]) -> str:
    """Loss of every criterion, without and with compensation, at two ratios."""
    part = [row for row in good if row["part"] == "criteria"]
    by = grouped(part, "method", "compensated", "removed", "task")
    names = tasks_of(part)
    body = []
    for method in sorted({row["method"] for row in part}):
        for compensated in (False, True):
            for removed in AT:
                cells = [spread(lost(by[method, compensated, removed, name])) for name in names]
                label = method + (" + repair" if compensated else "")
                body.append((label, f"{removed:.0%}", *cells))
    return markdown(("criterion", "removed", *names), body)


def by_method(good: Sequence[Row], kind: str, ratios: Sequence[float]) -> str:
    """Metrics of a part: methods down, tasks across."""
    part = [row for row in good if row["part"] == kind]
    by, names = grouped(part, "method", "removed", "task"), tasks_of(part)
    methods = list(dict.fromkeys(row["method"] for row in part))
    return markdown(
        ("method", "removed", *names),
        [
            (method, f"{removed:.0%}", *(spread(lost(by[method, removed, n])) for n in names))
            for method in methods
            for removed in ratios
        ],
    )


def unstructured(good: Sequence[Row]) -> str:
    """Loss and bytes of zeros anywhere, by sparsity."""
    part = [r for r in good if r["part"] == "unstructured" and "as many" not in r["method"]]
    by, names = grouped(part, "method", "removed", "task"), tasks_of(part)
    sizes = grouped(part, "method", "removed")
    body = []
    for method, removed in sorted({(row["method"], row["removed"]) for row in part}):
        found = sizes[method, removed]
        shares = [
            geometric(r[k] / r["bytes"] for r in found) for k in ("zip_bytes", "bitmap_bytes")
        ]
        cells = [spread(lost(by[method, removed, name])) for name in names]
        body.append((method, f"{removed:.0%}", *(f"{s:.2f}" for s in shares), *cells))
    return markdown(("zeros", "share", "zipped", "bitmap", *names), body)


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


def cost(good: Sequence[Row]) -> str:
    """Hours by part, and points."""
    return markdown(
        ("part", "points", "hours"),
        [
            (part, str(len(found)), f"{hours(found):.1f}")
            for (part,), found in sorted(grouped(good, "part").items())
        ],
    )
