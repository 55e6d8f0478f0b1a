"""`depcut frontier`: what is lost at several ratios, from one scoring."""

from __future__ import annotations

import argparse
from pathlib import Path

from depcut.allocate.choose import check_budget
from depcut.cli.analysed import analysed
from depcut.cli.options import Command, Subcommand, options_of
from depcut.cli.output import Output
from depcut.frontiers.scan import RATIOS
from depcut.options import ONNXRUNTIME
from depcut.timing.runtimes import RUNTIMES


def _declare(command: Command) -> None:
    command.model()
    command.selection()
    command.add(
        "--at",
        nargs="+",
        type=float,
        metavar="RATIO",
        help=f"shares to remove, between 0 and 1 (default: {RATIOS[0]} to {RATIOS[-1]})",
    )
    command.add("--data", metavar="DATA", help="calibration data, as package.module:factory")
    command.add(
        "--loss",
        metavar="LOSS",
        help='of (output, target), as package.module:function; "model": the one that it returns',
    )
    command.pruning()
    command.add("--latency", action="store_true", help="predict the time of each row, on this CPU")
    command.add(
        "--runtime",
        choices=sorted(RUNTIMES),
        default=ONNXRUNTIME,
        help="what runs the models whose time --latency is made from",
    )
    command.add("--threads", type=int, default=1, help="threads that one operator may use there")
    command.add("--plot", type=Path, metavar="FILE", help="image to write, such as frontier.png")


def _run(options: argparse.Namespace, output: Output) -> None:
    chosen, ratios = options_of(options), options.at or RATIOS
    for ratio in ratios:
        check_budget(ratio, chosen.of, chosen.latency_ms)
    _, analysis, data, _, loss = analysed(options, chosen, output)
    frontier = analysis.frontier(
        ratios, data=data, loss=loss, latency=options.latency, options=chosen
    )
    output.say("frontier", frontier)
    if options.plot is not None:
        frontier.plot(options.plot)
        output.say("plot", str(options.plot), f"plot: {options.plot}")


FRONTIER = Subcommand(
    "frontier", "show what is lost at several ratios, from one scoring", _declare, _run
)
