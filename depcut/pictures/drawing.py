"""The coupling graph as a drawing: layers, the groups between them, and what each stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from depcut.pictures.alike import Record, Repeated, repeated, repeated_groups
from depcut.pictures.layered import Layout, layered
from depcut.pictures.reports import shape_text
from depcut.support.repeats import collapsed

_CHARACTER = 6.7  # pixels of one in the font of the boxes
_MOST = 40  # characters of a line in a box
_HEIGHT, _PITCH = 40.0, 92.0  # of a box, and from row to row


@dataclass(frozen=True)
class Box:
    """A layer or group, or several alike, in the drawing.

    Attributes:
        id: Names it in the page.
        kind: "layer" or "group".
        lines: Two lines of text.
        name: All of the first line.
        x: Left end.
        y: Upper end.
        width: In pixels, as all lengths.
        kept: Share that stays.
        detail: What is shown of it when it is chosen.
    """

    id: str
    kind: str
    lines: tuple[str, str]
    name: str
    x: float
    y: float
    width: float
    kept: float
    detail: Record
    height: float = _HEIGHT


@dataclass(frozen=True)
class Line:
    """An edge: `source` and `target` are boxes, `path` is SVG's."""

    source: str
    target: str
    path: str
    upward: bool


@dataclass(frozen=True)
class Drawing:
    """A graph that is placed.

    Attributes:
        boxes: Layers and groups.
        lines: From a layer to the groups that it produces, from these to their readers.
        width: Of all of it.
        height: Of all of it.
        tensors: Names that the details give by their number.
    """

    boxes: list[Box]
    lines: list[Line]
    width: float
    height: float
    tensors: list[str]


@dataclass
class _Node:
    kind: str
    name: str
    second: str
    kept: float
    detail: Record


def drawn(groups: list[Record], layers: list[Record]) -> Drawing:
    """The coupling graph, with what is alike in repeated layers as one box.

    Vectors (norms, scales, biases of their own) stand in the box of their group.

    Args:
        groups: See `depcut.pictures.plans.with_kept`.
        layers: See `depcut.pictures.record.layer_record`.
    """
    numbers: dict[str, int] = {}
    nodes, edges = _nodes(groups, layers, numbers)
    widths = {
        key: _CHARACTER * max(len(_short(node.name)), len(node.second)) + 24
        for key, node in nodes.items()
    }
    layout = layered(widths, edges)
    left = min((layout.x[k] - widths[k] / 2 for k in nodes), default=0.0) - 20
    right = max((layout.x[k] + widths[k] / 2 for k in nodes), default=0.0) + 20
    boxes = [
        Box(
            key,
            node.kind,
            (_short(node.name), node.second),
            node.name,
            round(layout.x[key] - widths[key] / 2 - left, 1),
            _PITCH * layout.rank[key] + 20,
            round(widths[key], 1),
            node.kept,
            node.detail,
        )
        for key, node in nodes.items()
    ]
    height = _PITCH * (max(layout.rank.values(), default=0) + 1)
    return Drawing(boxes, list(_lines(layout, left)), right - left, height, list(numbers))


def _nodes(
    groups: list[Record], layers: list[Record], numbers: dict[str, int]
) -> tuple[dict[str, _Node], list[tuple[str, str]]]:
    """Boxes by their names in the page, layers in their order, and edges between them."""
    alike = repeated_groups(groups)
    produced: dict[str, set[str]] = {}
    read: dict[str, set[str]] = {}
    for i, kind in enumerate(alike):
        for group in kind.records:
            for layer in group["narrows"]:
                produced.setdefault(layer, set()).add(f"g{i}")
            for layer in group["read_by"]:
                read.setdefault(layer, set()).add(f"g{i}")
    sizes = {layer["layer"]: layer for layer in layers}
    coupled = dict.fromkeys([*sizes, *produced, *read])
    known = [sizes.get(n, _unknown(n)) for n in coupled if n in produced or n in read]
    vectors = {r["layer"] for r in known if len(r["shape"]) < 2 and r["layer"] not in read}

    def key(layer: Record) -> tuple[Any, ...]:
        name = layer["layer"]
        ends = (frozenset(produced.get(name, ())), frozenset(read.get(name, ())))
        return layer["kind"], len(layer["shape"]), *ends

    nodes: dict[str, _Node] = {}
    edges: list[tuple[str, str]] = []
    boxed = [r for r in known if r["layer"] not in vectors]
    for i, rows in enumerate(repeated(boxed, "layer", key)):
        nodes[f"l{i}"] = _layer_node(rows)
        name = rows.records[0]["layer"]
        edges += [(f"l{i}", group) for group in sorted(produced.get(name, ()))]
        edges += [(group, f"l{i}") for group in sorted(read.get(name, ()))]
    for i, kind in enumerate(alike):
        own = [n for g in kind.records for n in g["narrows"] if n in vectors]
        nodes[f"g{i}"] = _group_node(kind, collapsed(dict.fromkeys(own)), numbers)
    return nodes, list(dict.fromkeys(edges))


def _unknown(name: str) -> Record:
    return {"layer": name, "kind": "", "shape": [], "shape_now": [], "params": 0, "params_now": 0}


def _layer_node(rows: Repeated) -> _Node:
    shapes = [layer["shape"] for layer in rows.records]
    now = [layer["shape_now"] for layer in rows.records]
    second = f"{rows.records[0]['kind']} {shape_text(shapes)}".strip()
    if now != shapes:
        second += f" → {shape_text(now) or 'gone'}"
    params = sum(layer["params"] for layer in rows.records)
    kept = sum(layer["params_now"] for layer in rows.records) / params if params else 1.0
    items = [
        [
            r["layer"],
            " × ".join(map(str, r["shape"])),
            " × ".join(map(str, r["shape_now"])) or "gone",
        ]
        for r in rows.records
    ]
    name = f"{rows.label} {rows.times}".rstrip()
    return _Node("layer", name, second, kept, {"kind": "layer", "title": name, "items": items})


def _group_node(kind: Repeated, vectors: list[str], numbers: dict[str, int]) -> _Node:
    units, kept = (sum(g[n] for g in kind.records) for n in ("units", "kept"))
    name = f"{kind.span('units')} units" + (f" {kind.times}" if kind.times else "")
    if kept < units:
        name = f"{kind.span('units')} → {kind.span('kept')} units {kind.times}".rstrip()
    items = [
        [
            group["group"],
            group["units"],
            group["kept"],
            [
                [numbers.setdefault(tensor, len(numbers)), dim, int(role == "consumer")]
                for tensor, dim, role in group["members"]
            ],
        ]
        for group in kind.records
    ]
    title = f"{kind.label} {kind.times}".rstrip()
    detail = {"kind": "group", "title": title, "items": items, "vectors": vectors}
    return _Node("group", name, _short(kind.label), kept / units if units else 1.0, detail)


def _short(text: str) -> str:
    """A text that fits a box, without its middle where it is too long."""
    if len(text) <= _MOST:
        return text
    half = (_MOST - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _lines(layout: Layout, left: float) -> Iterator[Line]:
    for (a, b), points in layout.paths.items():
        upward = (a, b) in layout.upward
        ends = []
        for i, (x, rank) in enumerate(points):
            top = _PITCH * rank + 20
            first, last = i == 0, i == len(points) - 1
            y = top + _HEIGHT / 2
            if first:
                y = top if upward else top + _HEIGHT
            elif last:
                y = top + _HEIGHT + 5 if upward else top - 5
            ends.append((round(x - left, 1), y))
        path = "M{:g} {:g}".format(*ends[0])
        for (x0, y0), (x1, y1) in pairwise(ends):
            middle = (y0 + y1) / 2
            path += f"C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1:g}"
        yield Line(str(a), str(b), path, upward)
