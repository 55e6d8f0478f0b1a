"""What the commands that make a smaller model write to their folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from depcut.apply.plan import Plan
from depcut.capture.inputs import Inputs
from depcut.deploy.export import export
from depcut.errors import InputError
from depcut.support import files
from depcut.support.checks import check_path
from depcut.support.weights import save_weights


def check_folder(path: Path) -> None:
    """Refuse, before the work, a folder that cannot be made because a file is in the way.

    Args:
        path: What `--out` names.

    Raises:
        InputError: There is one.
    """
    path = check_path(path, "out")
    try:
        there = next((p for p in (path, *path.parents) if p.exists()), path)
        obstacle = "" if there.is_dir() or there == path else f"{there} is no folder"
        obstacle = f"{path} is no folder" if path.is_file() else obstacle
    except OSError as error:
        obstacle = str(error)
    if obstacle:
        raise InputError(
            f"the folder cannot be made: {obstacle}",
            where="--out",
            remedy="choose a folder that can be written to",
        )


def write_slim(
    slim: nn.Module, plan: Plan, options: argparse.Namespace, inputs: Inputs
) -> list[Path]:
    """Write a plan, the smaller model and, if asked for, its ONNX file.

    Args:
        slim: The smaller model.
        plan: What it was made with.
        options: Of a command with `out` and `onnx`.
        inputs: Example inputs, for the ONNX file.

    Returns:
        The files.
    """
    out: Path = options.out
    files.make_folder(out, "--out")
    plan.save(out / "plan.json")
    save_weights(slim, out / "weights.safetensors")
    written = [out / "plan.json", out / "weights.safetensors"]
    if options.onnx:
        written.append(export(slim, out / "model.onnx", inputs).path)
    return written
