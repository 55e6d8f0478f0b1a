"""Write the short tables of README.md from the files under results/, or print the whole ones."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping

import accuracy_summary
import export
import gradual_cost
import latency
import retrain_summary
import scaling
import short_tables
import speed
from measure import HERE, Row, read

ZOO = {
    "name": lambda r: r["name"],
    "groups": lambda r: str(r["groups"]),
    "frozen": lambda r: f"{r['frozen_share']:.1%} {r['frozen_reason']}".strip(),
    "capture s": lambda r: f"{r['capture_s']:.2f}",
    "analysis ms": lambda r: f"{r['analysis_ms']:.1f}",
    "plan s": lambda r: f"{r['plan_s']:.3f}",
    "rewrite + verify s": lambda r: f"{r['apply_s']:.2f}",
    "MACs kept": lambda r: f"{r['macs_kept']:.4f}",
    "by torch's count": lambda r: f"{r['counted_kept']:.4f}",
    "params kept": lambda r: f"{r['params_kept']:.3f}",
    "generated submodules": lambda r: str(len(r["generated"])) if r["other_types"] else "none",
}
REFUSED = {
    "name": lambda r: r["name"],
    "Torch-Pruning": lambda r: r["peer"],
    "how": lambda r: r["peer_detail"][:140],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"sections, of {', '.join(short_tables.SECTIONS)}")
    parser.add_argument(
        "--full", action="store_true", help="print every row and statement, and write nothing"
    )
    options = parser.parse_args()
    names = options.names or list(FULL if options.full else short_tables.SECTIONS)
    if options.full:
        for name in names:
            data = read(name)
            print(f"## {name}\n\n{FULL[name](data['rows'])}\n\n{points(data)}\n")
        return
    readme = HERE / "README.md"
    text = readme.read_text()
    for name in names:
        data = read(name)
        if data["rows"]:
            made = short_tables.SECTIONS[name](data["rows"], data["summary"])
            pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
            text = re.sub(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.S)
    readme.write_text(text)


def markdown(columns: Mapping[str, Callable[[Row], str]], rows: list[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        if "error" in row:
            lines.append([row["name"], f"FAIL {row['error']}", *[""] * (len(columns) - 2)])
        else:
            lines.append([show(row) for show in columns.values()])
    return "\n".join(
        "| " + " | ".join(c.replace("|", "/") for c in cells) + " |" for cells in lines
    )


def points(data: Row) -> str:
    """The summary, and what it was measured on, as a list."""
    items = {
        **data["summary"],
        "machine": ", ".join(f"{k} {v}" for k, v in data["machine"].items()),
    }
    texts = (
        ", ".join(map(str, v)) or "none" if isinstance(v, list) else _rounded(v)
        for v in items.values()
    )
    return "\n".join(f"- {k.replace('_', ' ')}: {v}" for k, v in zip(items, texts, strict=True))


def _rounded(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def zoo_table(rows: list[Row]) -> str:
    return markdown(ZOO, rows)


def speed_table(rows: list[Row]) -> str:
    columns = {k: v for k, v in speed.COLUMNS.items() if k != "detail"}
    refused = [r for r in rows if r.get("peer", "works") != "works"]
    return markdown(columns, rows) + "\n\n" + markdown(REFUSED, refused)


def scaling_tables(rows: list[Row]) -> str:
    parts = ("blocks", scaling.DEPTH), ("width", scaling.WIDTH), ("analyze_s", scaling.DECODER)
    tables = [markdown(columns, [r for r in rows if key in r]) for key, columns in parts]
    return "\n\n".join([*tables, *(f"FAIL {r['name']}: {r['error']}" for r in failed(rows))])


def failed(rows: list[Row]) -> list[Row]:
    return [r for r in rows if "error" in r]


def latency_table(rows: list[Row]) -> str:
    missing = [r for r in rows if "error" in r]
    parts = [markdown(latency.COLUMNS, [r for r in rows if "error" not in r])]
    if missing:
        lines = (f"- {r['name']}, {r.get('candidate', 'all')}: {r['error']}" for r in missing)
        parts.append("Without a result:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def export_table(rows: list[Row]) -> str:
    return markdown(export.COLUMNS, rows)


def gradual_table(rows: list[Row]) -> str:
    return markdown(gradual_cost.COLUMNS, rows)


def options_table(rows: list[Row]) -> str:
    lost = {(r["method"], r["name"]): r["lost"] for r in rows}
    choices = dict.fromkeys(r["method"].partition(" ")[2] for r in rows)
    made: list[list[str]] = []
    for choice in choices:
        cells = [
            ", ".join(
                f"{lost[key, n]:.1f}" if n.startswith("digits") else f"{lost[key, n]:.2f}"
                for n in short_tables.TASKS
            )
            if (key, short_tables.TASKS[0]) in lost
            else short_tables.ABSENT
            for key in (f"magnitude {choice}", f"taylor {choice}")
        ]
        if all(cells != known for _, *known in made):  # some choices come to the same plan
            made.append([choice, *cells])
    return short_tables.lines(["choice", "magnitude", "Taylor"], made)


FULL = {
    "zoo": zoo_table,
    "speed": speed_table,
    "scaling": scaling_tables,
    "latency": latency_table,
    "export": export_table,
    "accuracy": accuracy_summary.markdown,
    "accuracy_options": options_table,
    "retrain": retrain_summary.markdown,
    "gradual_cost": gradual_table,
}

if __name__ == "__main__":
    main()
