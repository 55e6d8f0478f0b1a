"""Tables, plots and claims of the study, from its rows alone."""

from __future__ import annotations

import fcntl
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import measure
import study_plot
import study_tables
from measure import Row

PATH = measure.RESULTS / "study.jsonl.gz"
GUIDES = measure.HERE.parent / "docs" / "guides"
PAGES = (GUIDES / "which_method.md", GUIDES / "study.md")  # what follows; every number
MARKS = re.compile(r"(<!-- study:(\w+) -->\n).*?(<!-- /study:\2 -->)", re.DOTALL)
POINT = ("task", "seed", "part", "method", "removed", "compensated")


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
    with locked(), PATH.open("ab") as file:
        file.write(member)


def repack() -> None:
    """Write the file anew, as one member without the rows that were measured again."""
    with locked():
        ordered = sorted(rows(), key=lambda row: [str(row.get(name)) for name in POINT])
        draft = PATH.with_name(f".{PATH.name}")
        draft.write_bytes(gzip.compress(_lines(ordered), mtime=0))
        draft.replace(PATH)


@contextmanager
def locked() -> Iterator[None]:
    """No other process writes the rows meanwhile."""
    with PATH.with_name(f".{PATH.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lines(found: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def main() -> int:
    """Rebuild all that follows from the rows."""
    repack()
    every = rows()
    good = [row for row in every if "error" not in row]
    tables = study_tables.tables(good)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    pictures = study_plot.main(good)
    print(f"{len(every)} rows, {study_tables.hours(every):.1f} hours of computing")
    for path in (*PAGES, *pictures):
        print(f"written: {path}")
    return 0


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The text with every table between its marks."""
    return MARKS.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}", text)
