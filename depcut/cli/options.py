"""The options that the commands of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from depcut.timing.runtimes import RUNTIMES, providers


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and leaves the lines of the epilog as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Command:
    """One command under construction.

    Args:
        parser: Its parser.
        run: What it runs.
    """

    def __init__(
        self, parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]
    ) -> None:
        self.add = parser.add_argument
        self._parser = parser
        parser.set_defaults(run=run)

    def exclusive(self) -> Callable[..., argparse.Action]:
        """Adds options of which one must be given, and only one."""
        return self._parser.add_mutually_exclusive_group(required=True).add_argument

    def model(self) -> None:
        """The options of all commands that build one model."""
        self.add("model", metavar="MODEL", help="package.module:factory")
        self.inputs()

    def inputs(self) -> None:
        """Weights and example inputs."""
        self.add(
            "--weights", type=Path, metavar="FILE", help="safetensors file for the dense model"
        )
        self.add(
            "--input-shape",
            action="append",
            default=[],
            metavar="SHAPE",
            help="sizes of an input, such as 2,3,224,224 or 2,32:int64; once per positional "
            "argument; inferred from the first layer if left out",
        )

    def plan(self) -> None:
        """The options that make the model slim before it is used."""
        self.add("--plan", type=Path, metavar="FILE", help="plan to apply to the model first")
        self.add(
            "--slim-weights",
            type=Path,
            metavar="FILE",
            help="safetensors file to load after the plan was applied",
        )

    def timing(self) -> None:
        """The options of timing."""
        self.add("--threads", type=int, default=1, help="threads that one operator may use")
        self.add("--rounds", type=int, default=30, help="turns that every candidate has")

    def runtime(self, *, several_batches: bool) -> None:
        """The options that say what is timed, where and how."""
        self.add(
            "--runtime",
            choices=sorted(RUNTIMES),
            default="onnxruntime",
            help="what runs the models",
        )
        self.add(
            "--provider",
            choices=providers(),
            help="what computes in it; the CPU if left out; tensorrt is onnxruntime's",
        )
        self.add(
            "--batch-size",
            type=int,
            action="append" if several_batches else "store",
            metavar="N",
            help="batch size to time at, that of the inputs if left out"
            + ("; may be repeated" if several_batches else ""),
        )
        self.add(
            "--pin", metavar="CPUS", help='CPUs to stay on while timing, such as 2,3, or "auto"'
        )
        self.add("--memory", action="store_true", help="measure peak memory too")
        self.timing()
