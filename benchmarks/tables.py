"""Write the tables of README.md from the JSON files under results/."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping

import accuracy_summary
import export
import gradual_cost
import latency
import retrain_summary
import scaling
import speed
from measure import HERE, RESULTS, Row

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
    parser.add_argument("names", nargs="*", help=f"sections, of {', '.join(SECTIONS)}")
    wanted = parser.parse_args().names
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, build in SECTIONS.items():
        source = RESULTS / f"{name}.json"
        if source.exists() and (not wanted or name in wanted):
            data = json.loads(source.read_text())
            made = build(data["rows"]) + "\n\n" + points(data)
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


SECTIONS = {
    "zoo": zoo_table,
    "speed": speed_table,
    "scaling": scaling_tables,
    "latency": latency_table,
    "export": export_table,
    "accuracy": accuracy_summary.markdown,
    "retrain": retrain_summary.markdown,
    "gradual_cost": gradual_table,
}

if __name__ == "__main__":
    main()
