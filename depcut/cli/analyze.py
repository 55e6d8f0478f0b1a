"""`depcut analyze`: what can shrink, and why the rest cannot."""

from __future__ import annotations

import argparse

from depcut.analysis import analyze
from depcut.cli.inputs import example_inputs, outputs_of, say_inputs
from depcut.cli.models import dense_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output


def _declare(command: Command) -> None:
    command.model()
    command.selection()
    command.add("--explain", metavar="NAME", help="say all about one layer instead")


def _run(options: argparse.Namespace, output: Output) -> None:
    analysis = analyze(
        dense_model(options), example_inputs(options.input_shape), outputs_of(options)
    )
    say_inputs(output, options, analysis.program)
    if options.explain:
        output.say("explanation", analysis.explain(options.explain))
        return
    output.say("analysis", analysis)


ANALYZE = Subcommand("analyze", "show what can shrink, and why the rest cannot", _declare, _run)
