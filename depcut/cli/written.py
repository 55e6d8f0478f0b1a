"""What the commands that make a smaller model write to their folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from depcut.capture.inputs import Inputs
from depcut.cli.models import hub_folder
from depcut.cli.output import Output
from depcut.deploy.export import export
from depcut.errors import InputError
from depcut.integrations.pretrained import comes_back
from depcut.integrations.reload import stock_class
from depcut.storage import folder as folders
from depcut.storage.companions import carry_over
from depcut.storage.save import write_model, write_pretrained_card, write_record
from depcut.support import files
from depcut.support.checks import check_path


def check_folder(path: Path) -> None:
    """Refuse, before the work, a folder that cannot be made or must not be replaced.

    Args:
        path: What `--out` names.

    Raises:
        InputError: A file is in the way, or the folder holds what is not of an earlier run.
    """
    path = check_path(path, "out")
    try:
        there = next((p for p in (path, *path.parents) if p.exists()), path)
        obstacle = f"{there} is no folder" if there.exists() and not there.is_dir() else ""
    except OSError as error:
        obstacle = str(error)
    if obstacle:
        raise InputError(
            f"the folder cannot be made: {obstacle}",
            where="--out",
            remedy="choose a folder that can be written to",
        )
    folders.check_replaceable(path)


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: Where.
        loading: The call that loads the model.
        left: Folders beside the dense model that were not carried over.
    """

    folder: Path
    loading: str
    left: tuple[str, ...] = ()

    def say(self, output: Output) -> None:
        """Say it.

        Args:
            output: Of the command.
        """
        there = sorted(self.folder.iterdir())
        names = ", ".join(file.name for file in there)
        output.say("written", there, f"written: {self.folder} ({names})")
        output.say("load", self.loading, f"load it with {self.loading}")
        if self.left:
            output.say("left", self.left, f"not carried over: {', '.join(self.left)}")


def write_slim(slim: nn.Module, options: argparse.Namespace, inputs: Inputs) -> Written:
    """Write the smaller model with its plan and report, and its ONNX file if asked for.

    A model of transformers that its config can rebuild is written by its own `save_pretrained`, for
    a `from_pretrained` without depcut; all others by `depcut.save`. Files of an earlier run go.

    Args:
        slim: The smaller model.
        options: Of a command with `model`, `out` and `onnx`.
        inputs: Example inputs, for the ONNX file.
    """
    out: Path = options.out
    files.make_folder(out.parent, "--out")
    with folders.written(out) as draft:
        if comes_back(slim):
            model: Any = slim
            model.save_pretrained(draft)
            write_record(slim, draft)
            left = carry_over(hub_folder(options.model), draft)
            write_pretrained_card(slim, stock_class(slim), draft)
            loading = f"transformers.{type(slim).__name__}.from_pretrained({str(out)!r})"
        else:
            write_model(slim, draft)
            left, loading = (), f"depcut.load({str(out)!r})"
        if options.onnx:
            export(slim, draft / "model.onnx", inputs)
    return Written(out, loading, left)
