"""Write a smaller model into a folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.apply.carried import PLANS, carried
from depcut.apply.report import REPORT, report, report_record
from depcut.capture.plain import plain, spread_over_processes
from depcut.capture.refusals import check_module
from depcut.deploy.program import write_program
from depcut.errors import InputError
from depcut.plan.fingerprint import example_of
from depcut.storage import folder as folders
from depcut.storage.card import model_card
from depcut.storage.dense import architecture_of
from depcut.storage.tensors import REST, STATE
from depcut.storage.values import Description, class_name
from depcut.support import files
from depcut.support.checks import check_kind, check_names
from depcut.support.processes import processes, together
from depcut.timing.comparison import Comparison

STANDALONE = ("program",)
_HOLDS = {
    STATE: "weights and buffers by the names of `state_dict()`, what is tied once",
    REST: "tensors that `state_dict()` leaves out",
    folders.MODEL: "every module: class, patches (positions, numbers, hash of the source), sizes",
    folders.REPORT: "what `depcut.report` prints",
    "config.json": "configuration from which transformers builds the dense model",
    "program.pt2": "the model as a program of torch.export, for inference without depcut",
    folders.INDEX: "format, and a hash of each file",
    folders.CARD: "this text",
}
_PRETRAINED = {
    **{name: _HOLDS[name] for name in (folders.REPORT, folders.INDEX, folders.CARD)},
    "config.json": "configuration from which transformers builds the model",
}
_PLAN = "which units stay, as `depcut.Plan`"


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    standalone: str | Collection[str] = (),
    inputs: Any = None,
    comparison: Comparison | None = None,
) -> None:
    """Write a model that depcut made into a folder, from which `depcut.load` reads it.

    The folder holds the weights (safetensors; what is shared is stored once), the plan, the
    modules with their patches as data, the report, and a model card. Nothing is pickled.

    Args:
        model: What `depcut.shrink`, `Plan.apply`, `depcut.compact` or a training run returned, or a
            copy of it; it is only read. Of what torch.compile returned, the model inside. One
            that `fully_shard` has sharded is passed by all processes; the first one writes.
        folder: A new or empty folder, or one that an earlier call wrote, which is replaced as a
            whole.
        standalone: What else is written, for processes without depcut: "program", the file of
            `torch.export.load`, which needs the model's class neither.
        inputs: Example inputs of the program: a tensor, a tuple of positional or a dict of keyword
            arguments; left out, of the shapes that the plan was made with.
        comparison: What `depcut.compare` measured, for the model card.

    Raises:
        PlanError: No plan was applied to the model.
        InputError: The folder holds something else, or the model what cannot be stored: a tensor
            without values, a sparse one, a function of the graph without a name.
        ExportError: The program cannot be made.
        ProcessError: Another of several processes failed.
        DepcutError: The folder cannot be written; what was there is there still.
    """
    given = check_module(model)
    model = plain(given)
    report(model)
    wanted = _checked(standalone)
    if comparison is not None:
        check_kind(comparison, Comparison, "comparison", "pass what depcut.compare returned")
    in_parts = spread_over_processes(given)
    with together(in_parts):
        if in_parts and processes().rank:
            return
        with folders.written(folder) as draft:
            write_model(model, draft, wanted, inputs, comparison)


def write_model(
    model: nn.Module,
    draft: Path,
    standalone: tuple[str, ...] = (),
    inputs: Any = None,
    comparison: Comparison | None = None,
) -> None:
    """Write all but the index of what `save` writes.

    Args:
        model: See `save`.
        draft: An empty folder.
        standalone: See `save`.
        inputs: See `save`.
        comparison: See `save`.

    Raises:
        DepcutError: See `save`.
    """
    description, plans = Description(model), carried(model)
    description.tensors.write(draft)
    data = description.data()
    for note in (REPORT, PLANS):  # they have files of their own
        data["modules"][0]["attributes"].pop(note, None)
    shapes = plans[0]["shapes"] if plans else {}
    data["architecture"] = architecture_of(model, class_name(description), data, shapes, draft)
    data["torch"] = str(torch.__version__)
    files.write_json(draft / folders.MODEL, data)
    write_record(model, draft)
    if "program" in standalone:
        if inputs is None and plans:
            inputs = example_of(plans[-1]["inputs"], model)
        write_program(model, draft / "program.pt2", inputs)
    entries = _entries(draft, len(plans))
    card = model_card(report(model), data["architecture"], data["torch"], entries, comparison)
    files.write_text(draft / folders.CARD, card, "model card")


def write_record(model: nn.Module, folder: Path) -> None:
    """Write what was done to a model: its report, and the plans that made it.

    Args:
        model: The smaller model.
        folder: Where; it exists.
    """
    files.write_json(folder / folders.REPORT, report_record(model), indent=1)
    plans = carried(model)
    for number, plan in enumerate(plans):
        files.write_json(folder / folders.plan_name(number, len(plans)), plan, indent=1)


def write_pretrained_card(model: nn.Module, kind: type[nn.Module], folder: Path) -> None:
    """Write the model card of a folder that `from_pretrained` of transformers loads.

    Args:
        model: The smaller model.
        kind: Its class, as the library has it.
        folder: With all other files.

    Raises:
        DepcutError: It cannot be written.
    """
    plans = {folders.plan_name(i, len(carried(model))) for i in range(len(carried(model)))}
    there = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    entries = {
        name: _PLAN if name in plans else _PRETRAINED.get(name) or _kind_of(name)
        for name in sorted({*there, folders.INDEX, folders.CARD})
    }
    architecture = {"class": f"{kind.__module__}:{kind.__name__}", "library": "transformers"}
    version = str(torch.__version__)
    card = model_card(report(model), architecture, version, entries, None, "transformers")
    files.write_text(folder / folders.CARD, card, "model card")


def _kind_of(name: str) -> str:
    """What a file of `save_pretrained` holds that has no name of its own."""
    if name.endswith(".safetensors"):
        return "weights and buffers by the names of `state_dict()`"
    return (
        "which file holds which weights"
        if name.endswith(".index.json")
        else "as transformers has it"
    )


def _checked(standalone: str | Collection[str]) -> tuple[str, ...]:
    remedy = f"pass of {', '.join(map(repr, STANDALONE))}"
    names = check_names(standalone, "standalone", remedy)
    unknown = [name for name in names if name not in STANDALONE]
    if unknown:
        raise InputError(f"standalone is {unknown[0]!r}", where="standalone=", remedy=remedy)
    return names


def _entries(draft: Path, plans: int) -> dict[str, str]:
    """What is in each file, by name."""
    named = {folders.plan_name(i, plans) for i in range(plans)}
    found = sorted({*(p.name for p in draft.iterdir()), folders.INDEX, folders.CARD})
    return {n: _PLAN if n in named else _HOLDS[n] for n in found}
