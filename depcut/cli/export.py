"""`depcut export`: a model as ONNX, in floating point or int8, checked in onnxruntime."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from depcut.calibration.data import BATCHES, read_with_inputs
from depcut.calibration.self_made import AUTO
from depcut.capture.inputs import Inputs
from depcut.cli.factories import called, import_function
from depcut.cli.inputs import example_inputs, given_or_made
from depcut.cli.models import dense_model, slim_model
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.deploy.export import export
from depcut.deploy.quantization import SCHEMES, checked_request
from depcut.errors import ExportError
from depcut.support import files


def _declare(command: Command) -> None:
    command.model()
    command.plan()
    command.add("--out", type=Path, required=True, metavar="FILE", help="ONNX file to write")
    command.add(
        "--quantize",
        choices=list(SCHEMES),
        help=f"have it compute in int8; int8: {SCHEMES['int8']}",
    )
    command.add(
        "--data",
        metavar="DATA",
        help='calibration data of an int8 file, as package.module:factory; "auto": inputs made '
        "from the model itself",
    )
    command.add("--batches", type=int, default=BATCHES, help="items of the data to read at most")
    command.add(
        "--metric",
        metavar="METRIC",
        help="of (output, target), as package.module:function, to be reported on the data",
    )


def _run(options: argparse.Namespace, output: Output) -> None:
    files.target_of(options.out, "ONNX file", ExportError)  # before the work
    data: Any = options.data
    if data not in (None, AUTO):
        data = called(data, "the data")
    metric: Any = import_function(options.metric) if options.metric else None
    checked_request(options.quantize, data, options.batches, metric)
    model = slim_model(options, dense_model(options))
    given: Inputs = example_inputs(options.input_shape)
    if data not in (None, AUTO):
        data, given = read_with_inputs(data, options.batches, given, model, pairs=False)
    inputs = given_or_made(output, options, model) if data in (None, AUTO) else given
    chosen = {"quantize": options.quantize, "data": data, "metric": metric}
    output.say("export", export(model, options.out, inputs, batches=options.batches, **chosen))


EXPORT = Subcommand("export", "write a model as ONNX, checked in onnxruntime", _declare, _run)
