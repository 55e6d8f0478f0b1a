"""`depcut export`: a model as ONNX, checked in onnxruntime."""

from __future__ import annotations

import argparse
from pathlib import Path

from depcut.cli.inputs import given_or_made
from depcut.cli.models import dense_model, slim_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.deploy.export import export
from depcut.errors import ExportError
from depcut.support import files


def _declare(command: Command) -> None:
    command.model()
    command.plan()
    command.add("--out", type=Path, required=True, metavar="FILE", help="ONNX file to write")


def _run(options: argparse.Namespace, output: Output) -> None:
    files.target_of(options.out, "ONNX file", ExportError)  # before the work
    model = slim_model(options, dense_model(options))
    inputs = given_or_made(output, options, model)
    output.say("export", export(model, options.out, inputs))


EXPORT = Subcommand("export", "write a model as ONNX, checked in onnxruntime", _declare, _run)
