"""Results as HTML: a fragment for notebooks, and one self-contained page."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from depcut.pictures.alike import Record, line_of, repeated_frozen
from depcut.pictures.drawing import drawn
from depcut.pictures.plans import with_kept
from depcut.pictures.reports import changes, repeated_layers, shape_text
from depcut.pictures.summary import Summary
from depcut.plan.stacks import REBUILD
from depcut.support import files
from depcut.support.quantities import quantity
from depcut.support.repeats import collapsed
from depcut.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = resources.files("depcut.pictures") / "templates"


@cache
def _templates() -> Environment:
    """The templates; what is put into them is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quantity"] = quantity
    environment.filters["shape"] = shape_text
    environment.globals["verbatim"] = _text
    return environment


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def fragment(summary: Summary) -> str:
    """A result in short, for a notebook.

    Args:
        summary: The result.
    """
    return _templates().get_template("fragment.html").render(summary=summary)


def page(records: Record, title: str = "") -> str:
    """Results as one HTML page, that needs nothing else: no network, no other file.

    Args:
        records: What each result adds, by the part of the page: "analysis", "plan", "report",
            "layers", "measured".
        title: Of the page; the model's class when left out.
    """
    title = title or str(records.get("analysis", {}).get("model", "")) or "depcut"
    template = _templates().get_template("page.html")
    return template.render(title=title, version=__version__, **_sections(records))


def write_page(path: str | os.PathLike[str], records: Record, title: str = "") -> None:
    """Write `page` to a file.

    Args:
        path: The file to make or replace.
        records: See `page`.
        title: See `page`.

    Raises:
        DepcutError: The file cannot be written.
    """
    files.write_text(path, page(records, title), "page")


def _sections(records: Record) -> Record:
    """What the template takes, by the names that it has there."""
    analysis, plan, report = (records.get(name) for name in ("analysis", "plan", "report"))
    layers = records.get("layers", [])
    rows = _layer_rows(layers)
    groups = with_kept(analysis["groups"], plan) if analysis else []
    settings = (report or plan or {}).get("settings", {})
    return {
        "analysis": analysis,
        "plan": plan,
        "report": report,
        "measured": records.get("measured"),
        "is_cut": bool(plan or report),
        "totals": _totals(layers, report),
        "layers": rows,
        "most": max((row["macs"] for row in rows), default=0) or 1,
        "drawing": drawn(groups, layers) if groups else None,
        "frozen": _frozen_rows(analysis["frozen"] if analysis else []),
        "patches": changes(report["patched"]) if report else {},
        "rebuild": settings.get(REBUILD),
        "settings": {n: v for n, v in settings.items() if n != REBUILD and v not in ({}, [], None)},
        "unreached": collapsed(report["unreached"]) if report else [],
        "notes": _notes(analysis, report),
    }


def _totals(layers: list[Record], report: Record | None) -> Record:
    """MACs and parameters, dense and now."""
    out = {}
    for name in ("macs", "params"):
        dense, now = (sum(layer[key] for layer in layers) for key in (name, f"{name}_now"))
        out[name] = tuple(report[name]) if report else (dense, now)
    return out


def _layer_rows(layers: list[Record]) -> list[Record]:
    """A row for each kind of layer, with those of each layer below it."""
    rows = []
    for alike in repeated_layers(layers):
        sums = {
            name: sum(layer[name] for layer in alike.records)
            for name in ("params", "params_now", "macs", "macs_now")
        }
        rows.append(
            {
                **sums,
                "name": alike.label or "the model itself",
                "times": len(alike.records),
                "kind": alike.records[0]["kind"],
                "shapes": [layer["shape"] for layer in alike.records],
                "shapes_now": [layer["shape_now"] for layer in alike.records],
                "layers": alike.records if len(alike.records) > 1 else (),
            }
        )
    return rows


def _frozen_rows(frozen: list[Record]) -> list[Record]:
    """Reasons, the most frequent first, with what each freezes."""
    counts = Counter(record["reason"] for record in frozen)
    out = []
    for reason, count in counts.most_common():
        own = [record for record in frozen if record["reason"] == reason]
        rows = [
            {
                "name": alike.label,
                "times": len(alike.records),
                "dim": alike.records[0]["dim"],
                "size": alike.records[0]["size"],
                "line": line_of(alike.records[0]),
            }
            for alike in repeated_frozen(own)
        ]
        out.append({"reason": reason, "count": count, "rows": rows})
    return out


def _notes(analysis: Record | None, report: Record | None) -> list[str]:
    notes: list[Any] = [*(analysis or {}).get("notes", []), *(report or {}).get("notes", [])]
    if analysis:
        notes += [f"no example call uses {name}" for name in collapsed(analysis["unused"])]
        notes += [
            f"no working rule for {op}, at {', '.join(nodes[:3])}: what it touches is frozen"
            for op, nodes in analysis["unknown"].items()
        ]
    return list(dict.fromkeys(map(str, notes)))
