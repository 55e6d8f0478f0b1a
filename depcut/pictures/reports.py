"""A report on an applied plan in short, and its parts as a page shows them."""

from __future__ import annotations

from depcut.pictures.alike import Record, Repeated, repeated
from depcut.pictures.summary import Summary, Table
from depcut.support.quantities import quantity
from depcut.support.repeats import collapsed

_MOST = 60  # rows


def repeated_layers(layers: list[Record]) -> list[Repeated]:
    """Layers of one kind in repeated modules, as one: of one dense shape, if those are not many.

    Args:
        layers: See `depcut.pictures.record.layer_record`.
    """
    exact = repeated(layers, "layer", lambda layer: (layer["kind"], tuple(layer["shape"])))
    if len(exact) <= _MOST:
        return exact
    return repeated(layers, "layer", lambda layer: (layer["kind"], len(layer["shape"])))


def shape_text(layers: list[list[int]]) -> str:
    """Shapes as one text: `64..128 × 32 × 3 × 3`.

    Args:
        layers: Shapes of as many dimensions each; the empty ones are of layers without.
    """
    shapes = [shape for shape in layers if shape]
    if not shapes:
        return ""
    columns = [sorted(set(column)) for column in zip(*shapes, strict=True)]
    return " × ".join(str(c[0]) if len(c) == 1 else f"{c[0]}..{c[-1]}" for c in columns)


def changes(patched: Record) -> dict[str, list[str]]:
    """Modules by what was changed in them.

    Args:
        patched: The change of each module.
    """
    out: dict[str, list[str]] = {}
    for name, change in patched.items():
        out.setdefault(change, []).append(name or "the model itself")
    return {change: collapsed(names) for change, names in out.items()}


def layer_cells(layers: list[Record]) -> list[tuple[str, ...]]:
    """A row of cells for each kind of layer: name, class, shape before and after, parameters, MACs.

    Args:
        layers: See `depcut.pictures.record.layer_record`.
    """
    return [
        (
            f"{r.label or 'the model itself'}  {r.times}".rstrip(),
            r.records[0]["kind"],
            shape_text([layer["shape"] for layer in r.records]),
            shape_text([layer["shape_now"] for layer in r.records]) or "gone",
            quantity(sum(layer["params_now"] for layer in r.records)),
            quantity(sum(layer["macs_now"] for layer in r.records)),
        )
        for r in repeated_layers(layers)
    ]


def report_summary(report: Record) -> Summary:
    """A report in short, as notebooks show it.

    Args:
        report: See `Report.to_dict`.
    """
    facts = {}
    for name, text in (("macs", "MACs"), ("params", "parameters")):
        dense, now = report[name]
        share = f" ({now / dense:.1%})" if dense else ""
        facts[text] = f"{quantity(dense)} → {quantity(now)}{share}"
    error = report["error"]
    facts["largest difference"] = "no values" if error is None else f"{error:.2g} of the scale"
    columns = ("layer", "class", "shape", "now", "parameters", "MACs")
    tables = [Table(columns, layer_cells(report["layers"]), "layers")] if report["layers"] else []
    done = report["compensation"]
    if done:
        rows = [(r["layer"], f"{r['before']:.3g}", f"{r['after']:.3g}") for r in done["repairs"]]
        tables.append(Table(("layer", "missing", "after repair"), rows, "repairs on data"))
    notes = [
        f"generated: {name or 'the whole model'}: {why}"
        for name, why in report["generated"].items()
    ]
    notes += [f"not reached, as wide as it was: {name}" for name in collapsed(report["unreached"])]
    notes += report["notes"]
    patches = {", ".join(names): change for change, names in changes(report["patched"]).items()}
    return Summary(
        f"Report on plan {report['digest']}", facts, tuple(tables), tuple(notes), patches
    )
