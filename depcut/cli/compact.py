"""`depcut compact`: without the units that are dead, and nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path

from depcut.apply.report import report
from depcut.cli.inputs import example_inputs, say_inputs
from depcut.cli.models import dense_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.cli.written import check_folder, write_slim
from depcut.dead_units import compaction


def _declare(command: Command) -> None:
    command.model()
    command.add("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    command.add("--onnx", action="store_true", help="write the smaller model as ONNX too")


def _run(options: argparse.Namespace, output: Output) -> None:
    check_folder(options.out)
    inputs = example_inputs(options.input_shape)
    dead = compaction(dense_model(options), inputs)
    say_inputs(output, options, dead.plan.keep().coupling.program)
    output.say("dead", dead)
    slim = dead.apply()
    output.entry("report", report(slim))
    write_slim(slim, options, inputs).say(output)


COMPACT = Subcommand("compact", "remove the units that are dead, and nothing else", _declare, _run)
