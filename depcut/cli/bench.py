"""`depcut bench`: models or ONNX files, timed in turns."""

from __future__ import annotations

import argparse

from torch import nn

from depcut.cli.inputs import example_inputs, given_or_made
from depcut.cli.models import build_model, slim_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.cli.timed import placed, timing_of
from depcut.cli.weights import fill
from depcut.errors import InputError
from depcut.timing.backends import Candidate
from depcut.timing.bench import bench


def _declare(command: Command) -> None:
    command.add(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="MODEL, see below, or an .onnx file; the first is what the others are compared with",
    )
    command.inputs()
    command.plan()
    command.runtime(several_batches=True)


def _run(options: argparse.Namespace, output: Output) -> None:
    timing = timing_of(options)
    inputs = example_inputs(options.input_shape)
    candidates: dict[str, Candidate] = {}
    for target in options.targets:
        candidates[target] = target if target.endswith(".onnx") else build_model(target)
    first = next(iter(candidates.values()))
    if isinstance(first, nn.Module):
        if options.weights:
            fill(first, options.weights)
        given_or_made(output, options, first)
    if options.plan:
        if not isinstance(first, nn.Module):
            raise InputError(
                f"{first} is a file: no plan applies to it",
                where="--plan",
                remedy="name the model first, as package.module:factory",
            )
        candidates[f"{options.targets[0]} after {options.plan}"] = slim_model(options, first)
    candidates = placed(options, candidates)
    result = bench(candidates, inputs, batch_sizes=options.batch_size or None, **timing)
    output.say("bench", result)


BENCH = Subcommand("bench", "time models or ONNX files in turns", _declare, _run)
