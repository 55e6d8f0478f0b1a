"""`depcut shrink`: a plan and the smaller model, written to a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from depcut.allocate.choose import check_budget
from depcut.apply.report import report
from depcut.calibration.self_made import AUTO
from depcut.cli.analysed import analysed
from depcut.cli.options import Command, Subcommand, options_of
from depcut.cli.output import Output
from depcut.cli.streamed import shrink_streamed, too_large
from depcut.cli.timed import placed, timing_of
from depcut.cli.written import check_folder, write_slim
from depcut.errors import InputError
from depcut.shrinking.smaller import smaller
from depcut.timing.comparison import compare

_NONE = "none"


def _declare(command: Command) -> None:
    command.model()
    command.selection()
    budget = command.exclusive()
    budget("--ratio", type=float, help="share to remove, between 0 and 1")
    budget("--latency-ms", type=float, help="milliseconds to come to in --runtime on this CPU")
    command.add(
        "--data",
        metavar="DATA",
        help='calibration data, as package.module:factory; "auto" (the default): inputs made from '
        'the model itself, "none": weights alone',
    )
    command.add(
        "--loss",
        metavar="LOSS",
        help='of (output, target), as package.module:function; "model": the one that it returns',
    )
    command.pruning()
    command.add("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    command.add("--onnx", action="store_true", help="write the smaller model as ONNX too")
    command.add("--time", action="store_true", help="time both models, as below")
    command.runtime(several_batches=False)


def _run(options: argparse.Namespace, output: Output) -> None:
    timing = _timing(options)
    otherwise: Any = None if options.data == _NONE else AUTO
    options.data = None if options.data in (AUTO, _NONE) else options.data
    chosen = options_of(options)
    check_budget(options.ratio, chosen.of, chosen.latency_ms)
    streamed = too_large(options, chosen)
    if streamed is not None:
        shrink_streamed(streamed, options, chosen, output)
        return
    check_folder(options.out)
    dense, analysis, data, inputs, loss = analysed(options, chosen, output)
    found = otherwise if data is None else data
    plan, slim = smaller(analysis, dense, options.ratio, found, chosen, loss=loss)
    written = write_slim(slim, options, inputs)
    if "latency" in plan.settings:
        reached = plan.settings["latency"]
        parts = {"latency": reached, **reached.get("workload", {})}
        text = "{name}: {measured_ms:.3g} ms, dense {dense_ms:.3g} ms"
        lines = (text.format(name=name, **part) for name, part in parts.items())
        output.say("latency", reached, "\n".join(lines))
    output.say("report", report(slim))
    if options.time:
        dense, slim = placed(options, [dense, slim])
    compared = compare(dense, slim, inputs, batch_size=options.batch_size, **timing)
    output.say("comparison", compared)
    written.say(output)


def _timing(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `compare`; what only --time has a use for is refused without it."""
    timing = timing_of(options)
    if not options.time:
        timed = ("provider", "batch_size", "pin", "peak_memory")
        idle = [name for name in timed if vars(options)[name]]
        if idle:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise InputError(f"{names} without --time", remedy="add --time, or leave them out")
        timing["runtime"] = None
    return timing


SHRINK = Subcommand("shrink", "write a plan and the weights of the smaller model", _declare, _run)
