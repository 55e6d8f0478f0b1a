"""`depcut analyze`: what can shrink, and why the rest cannot."""

from __future__ import annotations

import argparse

from depcut.analysis import analyze
from depcut.cli.inputs import example_inputs, say_inputs
from depcut.cli.models import dense_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output


def _declare(command: Command) -> None:
    command.model()
    command.add("--explain", metavar="NAME", help="say all about one layer instead")


def _run(options: argparse.Namespace, output: Output) -> None:
    analysis = analyze(dense_model(options), example_inputs(options.input_shape))
    say_inputs(output, options, analysis.program)
    if options.explain:
        output.say("explanation", analysis.explain(options.explain))
        return
    groups = [
        {"name": g.name, "units": g.size, "layers": g.layers, "tie": g.tied}
        for g in analysis.groups
    ]
    document = {
        "macs": analysis.macs,
        "params": analysis.params,
        "frozen_share": analysis.frozen_share,
        "groups": groups,
        "frozen": analysis.frozen,
        "branches": [branch.name for branch in analysis.branches],
        "notes": analysis.program.notes,
    }
    output.say("analysis", document, str(analysis))


ANALYZE = Subcommand("analyze", "show what can shrink, and why the rest cannot", _declare, _run)
