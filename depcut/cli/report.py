"""`depcut report`: one HTML page on a model, or on what was done to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from depcut.analysis import analyze
from depcut.apply.plan import Plan
from depcut.apply.report import report, report_of_record
from depcut.cli.inputs import example_inputs, outputs_of, say_inputs
from depcut.cli.models import dense_model, hub_folder
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.cli.timed import placed, timing_of
from depcut.cli.weights import fill
from depcut.errors import InputError
from depcut.pictures.shown import Shown
from depcut.storage.folder import REPORT, plan_name
from depcut.support import files
from depcut.support.failures import first_line
from depcut.timing.comparison import compare


def _declare(command: Command) -> None:
    command.model()
    command.selection()
    command.plan()
    command.add("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    command.add("--time", action="store_true", help="time both models, as below; with --plan")
    command.runtime(several_batches=False)


def _run(options: argparse.Namespace, output: Output) -> None:
    files.target_of(options.out, "page")  # before the work
    folder = hub_folder(options.model) or Path(options.model)
    results = _of_folder(folder) if (folder / REPORT).is_file() else _of_model(options, output)
    results[0].to_html(options.out, *results[1:])
    for result in results:
        output.say(type(result).__name__.lower(), result, result.headline)
    output.say("written", options.out, f"written: {options.out}")


def _of_folder(folder: Path) -> list[Shown]:
    """What the folder of a smaller model says of it; the model is not built."""
    try:
        found: list[Shown] = [report_of_record(files.read_json(folder / REPORT))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"no report can be read: {first_line(error)}",
            where=str(folder / REPORT),
            remedy="pass a folder that depcut.save or depcut shrink wrote",
        ) from error
    plan = folder / plan_name(0, 1)
    return [Plan.load(plan), *found] if plan.is_file() else found


def _of_model(options: argparse.Namespace, output: Output) -> list[Shown]:
    """The analysis of a model, and with --plan what that plan makes of it."""
    if options.plan is None and (options.slim_weights or options.time):
        raise InputError(
            "--slim-weights and --time are of a smaller model",
            where="--plan",
            remedy="name the plan that makes it, or leave them out",
        )
    timing = timing_of(options)
    dense = dense_model(options)
    inputs = example_inputs(options.input_shape)
    plan = Plan.load(options.plan) if options.plan else None
    analysis = analyze(dense, inputs, outputs_of(options), part=options.part)
    say_inputs(output, options, analysis.program)
    if plan is None:
        return [analysis]
    slim = plan.apply(dense, inputs)
    if options.slim_weights:
        fill(slim, options.slim_weights)
    found: list[Shown] = [analysis, plan.bind(dense, inputs), report(slim)]
    if options.time:
        dense, slim = placed(options, [dense, slim])
        found.append(compare(dense, slim, inputs, batch_size=options.batch_size, **timing))
    return found


REPORT_COMMAND = Subcommand(
    "report", "write one HTML page on a model, or on what was done to it", _declare, _run
)
