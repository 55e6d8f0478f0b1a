"""What a command that plans starts from: the model, its analysis, data and loss."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from torch import nn

from depcut.analysis import Analysis, analyze
from depcut.calibration.data import read_with_inputs
from depcut.capture.inputs import Inputs
from depcut.cli.factories import called, import_function
from depcut.cli.inputs import example_inputs, outputs_of, say_inputs
from depcut.cli.models import dense_model
from depcut.cli.output import Output
from depcut.options import Options


class Analysed(NamedTuple):
    """The dense model, its analysis, items of the data if there are any, example inputs, loss."""

    dense: nn.Module
    analysis: Analysis
    data: list[Any] | None
    inputs: Inputs
    loss: Any


def analysed(options: argparse.Namespace, chosen: Options, output: Output) -> Analysed:
    """The model of a command, analysed; what it was captured with is said.

    Args:
        options: Of a command with `--data` and `--loss`.
        chosen: The options of pruning.
        output: Of the command.
    """
    dense = dense_model(options)
    loss: Any = options.loss
    if loss not in (None, "model"):
        loss = import_function(loss)
    data, inputs = read_with_inputs(
        called(options.data, "the data") if options.data else None,
        chosen.batches,
        example_inputs(options.input_shape),
        dense,
        loss is not None,
    )
    analysis = analyze(dense, inputs, outputs_of(options), part=options.part)
    say_inputs(output, options, analysis.program)
    return Analysed(dense, analysis, data, inputs, loss)
