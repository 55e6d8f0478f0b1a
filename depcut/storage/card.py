"""The model card: what a stored model is, how it was made, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depcut.apply.report import Report
from depcut.errors import listed
from depcut.timing.comparison import Comparison
from depcut.version import __version__

_REQUEST = ("ratio", "of", "allocation", "align", "latency_ms", "depth", "seed", "units")


def model_card(
    done: Report,
    architecture: Mapping[str, Any],
    torch_version: str,
    entries: Mapping[str, str],
    comparison: Comparison | None,
    library: str = "depcut",
) -> str:
    """The text of README.md.

    Args:
        done: The report on the model.
        architecture: How its dense architecture is built.
        torch_version: Of the process that saves it.
        entries: What is in each file, by name.
        comparison: What was measured, if anything.
        library: What loads the model.
    """
    module, _, name = architecture["class"].rpartition(":")
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- pruned\n---",
        f"# {name}, made smaller",
        f"A `{name}` of `{module or '(no module)'}`, pruned by depcut {__version__} with torch "
        f"{torch_version}. It is the same class with smaller layers; plan `{done.digest}`.",
        _sizes(done),
        "## How to load it",
        _loading(name, module, architecture, entries)
        if library == "depcut"
        else _code(f"import {library}", f"model = {library}.{name}.from_pretrained(folder)"),
        "## How it was made",
        _making(done),
    ]
    if comparison is not None and comparison.speedup is not None:
        parts += ["## Measured speed", _speed(comparison)]
    parts += ["## Files", _table(("file", "holds"), [(f"`{n}`", t) for n, t in entries.items()])]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _sizes(done: Report) -> str:
    rows = [
        (label, f"{dense:,}", f"{now:,}", f"{now / dense:.1%}" if dense else "")
        for label, (dense, now) in (
            ("parameters", done.params),
            ("MACs of one example", done.macs),
        )
    ]
    return _table(("", "dense", "here", "kept"), rows)


def _loading(
    name: str, module: str, architecture: Mapping[str, Any], entries: Mapping[str, str]
) -> str:
    known = architecture["library"] is not None
    call = "depcut.load(folder)" if known else f"depcut.load(folder, {name})"
    lines = [_code("import depcut", f"model = {call}")]
    if not known:
        lines += [
            "",
            f"`{name}` stands for what makes the dense model: its class (of `{module}`) or a "
            "function, called without arguments. Left out, the class is imported by its name.",
        ]
    if "why" in architecture:
        lines += ["", f"Its library does not build it alone: {architecture['why']}."]
    if "program.pt2" in entries:
        lines += [
            "",
            "Without depcut and without the class, for inference:",
            "",
            _code("import torch", 'model = torch.export.load("program.pt2").module()'),
        ]
    return "\n".join(lines)


def _code(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _making(done: Report) -> str:
    settings = done.settings
    rows = [(key, str(settings[key])) for key in _REQUEST if key in settings]
    if "score" in settings:
        rows.insert(0, ("criterion", str(settings["score"])))
    rows += [(f"option `{k}`", str(v)) for k, v in dict(settings.get("options", {})).items()]
    examples = settings.get("examples")
    rows.append(("calibration", f"{examples:,} examples" if examples else "no data"))
    if done.compensation is not None:
        rows.append(("re-solved on them", f"{len(done.compensation.repairs)} layers"))
    patched = [n or "the model itself" for n in done.patched]
    generated = [n or "the model itself" for n in done.generated]
    rows += [("patched in their source", listed(patched))] if patched else []
    rows += [("generated from the graph", listed(generated))] if generated else []
    rows.append(("largest difference that verification saw", f"{done.error:.2g} of the scale"))
    return _table(("", ""), rows)


def _speed(comparison: Comparison) -> str:
    rows = [
        (f"latency, batch {comparison.batch_size}", str(comparison.dense.latency),
         str(comparison.slim.latency), str(comparison.speedup)),
    ]  # fmt: skip
    note = f"\n\n{comparison.conditions}" if comparison.conditions else ""
    return _table(("", "dense", "here", "speedup"), rows) + note
