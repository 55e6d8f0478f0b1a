"""Do smaller models of transformers come back by `from_pretrained`, without depcut, as they are?

Every family of tests/families.py is shrunk with nothing but a ratio, saved with `save_pretrained`,
and loaded in one fresh process in which depcut cannot be imported. There the outputs and what
`generate` makes, with every kind of cache, beams and padding on the left, must be the same, bit by
bit.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import measure  # it puts the tests on the path, whose families are meant below

# isort: split
import families
import torch
import zoo
from families import FAMILIES, GENERATIONS, Family
from measure import HERE, Row
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import depcut

STOCK = HERE / "families_stock.py"
PAGE = HERE.parent / "docs" / "families.md"
BEGIN, END = "<!-- families: benchmarks/families.py -->", "<!-- families end -->"


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    zoo.libraries()["transformers"].utils.logging.disable_progress_bar()
    names = [n for n in FAMILIES if any(fnmatchcase(n, p) for p in options.only)]
    console = measure.console()
    with tempfile.TemporaryDirectory() as folder:
        made = [
            attempt(FAMILIES[name], options.ratio, Path(folder) / str(i), options.free)
            for i, name in enumerate(track(names, console=console))
        ]
        loaded = in_a_fresh_process(folder, {row["name"]: row.pop("folder", None) for row in made})
    rows = [row | loaded.get(row["name"], {}) for row in made]
    console.print(measure.table("Families of transformers", COLUMNS, rows))
    for row in rows:
        for key in ("error", "refused", "differs"):
            if row.get(key):
                console.print(f"{row['name']} {key}: {row[key]}", style="red")
    totals = summary(rows)
    console.print(" ".join(f"{name}: {number}" for name, number in totals.items()))
    if not options.free:
        known = {row["name"]: row for row in measure.read(options.results)["rows"]}
        known |= {row["name"]: row for row in rows}
        every = [known[name] for name in FAMILIES if name in known]
        for path in measure.write(options.results, every, summary(every)):
            console.print(f"written: {path}")
        write_page(every, options.ratio)
    return int(totals["as they were"] != f"{len(rows)}/{len(rows)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="globs over families; others keep their rows"
    )
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the MACs to remove")
    parser.add_argument("--free", action="store_true", help="cut freely: rebuildable=False")
    parser.add_argument("--results", default="families", help="name of the file under results/")
    return parser.parse_args()


# Here: shrink and save ----------------------------------------------------------------------------


def attempt(family: Family, ratio: float, folder: Path, free: bool) -> Row:
    """The row of one family; a failure becomes a row, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return examine(family, ratio, folder, free)
        except Exception as error:  # noqa: BLE001  (whatever a family does, the others still run)
            return {"name": family.name, "error": measure.first_line(error)}


def examine(family: Family, ratio: float, folder: Path, free: bool) -> Row:
    model = family.build()
    given = {"rebuildable": False} if free else {}
    seconds, slim = measure.timed(lambda: depcut.shrink(model, ratio, **given))
    report = depcut.report(slim)
    before, after = (macs(m, family.inputs(2)) for m in (model, slim))
    row = {
        "name": family.name,
        "class": type(model).__name__,
        "seconds": seconds,
        "same_class": type(slim) is type(model),
        "patched": len(report.patched),
        "generated": len(report.generated),
        "verified_error": report.error,
        "macs": sum(before.values()),
        "macs_kept": sum(after.values()) / sum(before.values()),
        "params_kept": measure.params_of(slim) / measure.params_of(model),
        "notes": list(report.notes),
    }
    row |= {f"{part}_kept": after[part] / before[part] for part in PARTS if before[part]}
    try:
        slim.save_pretrained(folder)
    except depcut.DepcutError as error:
        return row | {"refused": error.what}
    expected, impossible = computed(family, model, slim)
    save_file(expected, folder / "expected.safetensors")
    return row | {"folder": str(folder), "impossible": impossible}


def computed(
    family: Family, model: nn.Module, slim: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the smaller model computes, and the ways to generate that the dense one does not know.

    Raises:
        AssertionError: A way makes other tokens with a cache than without.
    """
    found = {f"outputs/{k}": v for k, v in families.outputs(family, slim).items()}
    impossible = {}
    for way in GENERATIONS if family.generates else ():
        try:
            families.generated(family, model, way)
        except Exception as error:  # noqa: BLE001  (the library's word on what is supported)
            impossible[way] = measure.first_line(error)
            continue
        made = families.generated(family, slim, way)
        found |= {f"{way}/{name}": tensor for name, tensor in made.items()}
    for way in {"no cache", "static cache"} - {*impossible} if family.generates else ():
        gap = (found[f"{way}/logits"] - found["greedy/logits"]).abs().max()
        assert gap < 1e-4, f"{way}: its logits are {gap:.2g} from those with a cache"
    return {name: tensor.contiguous() for name, tensor in found.items()}, impossible


# What a block's modules that mix positions are called, in every family; the rest feeds forward.
ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
PARTS = ("attention", "feed_forward", "around")


def macs(model: nn.Module, inputs: dict[str, Tensor]) -> Counter[str]:
    """Multiply-accumulates in attention, in the rest of the blocks, and around the blocks."""
    counter = FlopCounterMode(display=False)
    model = copy.deepcopy(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's counter knows no grouped product
    with measure.plain_attention(), measure.without_gradients(model), torch.no_grad(), counter:
        model(**inputs)
    of = {n: sum(c.values()) / 2 for n, c in counter.get_flop_counts().items() if n != "Global"}
    names = {n: n.partition(".")[2] for n in of}
    total: Counter[str] = Counter()
    total["attention"] = sum(of[n] for n, at in names.items() if outermost(at, ATTENTION))
    total["feed_forward"] = sum(
        of[n] for n, at in names.items() if outermost(at, re.compile(r"^\d+$"))
    )
    total["feed_forward"] -= total["attention"]
    whole = sum(sum(c.values()) / 2 for c in [counter.get_flop_counts()["Global"]])
    total["around"] = whole - total["attention"] - total["feed_forward"]
    return total


def outermost(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the last part of a module's name matches, and none before it."""
    *above, last = name.split(".")
    return bool(pattern.search(last)) and not any(pattern.search(part) for part in above)


# There: load and compare --------------------------------------------------------------------------


def in_a_fresh_process(at: str, folders: dict[str, str | None]) -> dict[str, Row]:
    """What each saved model computes in a process that cannot import depcut."""
    work = {name: folder for name, folder in folders.items() if folder}
    done = subprocess.run(
        [sys.executable, str(STOCK), json.dumps(work)],
        capture_output=True,
        text=True,
        check=False,
        cwd=at,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Row] = json.loads(done.stdout.splitlines()[-1])
    return found


# Results ------------------------------------------------------------------------------------------


def as_it_was(row: Row) -> bool:
    return bool(row.get("equal")) and not row.get("differs") and not row.get("error")


def summary(rows: list[Row]) -> Row:
    done = [row for row in rows if "error" not in row]
    count = f"{{}}/{len(rows)}"
    return {
        "first call": count.format(sum("class" in row for row in rows)),
        "same class": count.format(sum(row.get("same_class", False) for row in rows)),
        "25 % of the MACs gone": count.format(sum(row["macs_kept"] <= 0.75 for row in done)),
        "as they were": count.format(sum(map(as_it_was, rows))),
    }


def kept(row: Row, part: str) -> str:
    return f"{row[f'{part}_kept']:.0%}" if f"{part}_kept" in row else "-"


def came_back(row: Row, way: str) -> str:
    if row.get("refused"):
        return "refused"
    if way in row.get("impossible", {}):
        return "-"
    if way in row.get("differs", {}):
        return str(row["differs"][way])
    return "0" if way in row.get("equal", ()) else "-"


WAYS = ("outputs", *GENERATIONS)
COLUMNS = {
    "family": lambda r: r["name"],
    "class": lambda r: r["class"] + ("" if r["same_class"] else " (another)"),
    "MACs kept": lambda r: kept(r, "macs"),
    "attention": lambda r: kept(r, "attention"),
    "feed-forward": lambda r: kept(r, "feed_forward"),
    "parameters": lambda r: kept(r, "params"),
    **{way: lambda r, way=way: came_back(r, way) for way in WAYS},
}


def reasons(row: Row) -> list[str]:
    """Why a family, or a way to generate, is left out."""
    name = row["name"]
    found = [f"{name}: {row['refused']}"] if row.get("refused") else []
    return found + [f"{name}, {way}: {why}" for way, why in row.get("impossible", {}).items()]


def write_page(rows: list[Row], ratio: float) -> None:
    """The table in the docs, between its marks."""
    lines = [f"Asked for {1 - ratio:.0%} of the MACs.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} |" + " |" * (len(COLUMNS) - 2))
        else:
            lines.append("| " + " | ".join(show(row) for show in COLUMNS.values()) + " |")
    lines += ["", *(f"- {reason}" for row in rows for reason in reasons(row))]
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text("\n".join([f"{head}{BEGIN}", "", *lines, "", f"{END}{tail}"]))


if __name__ == "__main__":
    sys.exit(main())
