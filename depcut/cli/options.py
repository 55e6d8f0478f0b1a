"""The options that the commands of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from depcut.errors import InputError
from depcut.options import Options, ShrinkKeywords
from depcut.support.keywords import default_of, doc_of, names_of
from depcut.timing.runtimes import RUNTIMES, providers

# Flags that stand elsewhere: with the budget, and with what is timed.
_ELSEWHERE = ("latency_ms", "threads")


def threads_of(arguments: argparse.Namespace) -> int:
    """What `--threads` says, 1 where it was left out."""
    return int(getattr(arguments, "threads", 1))


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the command line gives: those of the file, and the flags before them.

    Args:
        arguments: Parsed, of a command with the flags of `Command.pruning`.

    Raises:
        InputError: The file cannot be read, or a value is wrong.
    """
    given = vars(arguments)
    flags = {n: given[n] for n in names_of(Options, ShrinkKeywords) if n in given}
    if flags.get("latency_ms", 0) is None:
        del flags["latency_ms"]
    if "ratios" in flags:
        flags["ratios"] = dict(flags["ratios"])
    base = Options.read(arguments.options) if arguments.options else Options()
    return replace(base, **flags)


def _switch(text: str) -> bool | str:
    values: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, true, false")
    return values[text.lower()]


def _ratio_by_glob(text: str) -> tuple[str, float]:
    glob, _, number = text.rpartition("=")
    try:
        return glob, float(number)
    except ValueError as error:
        raise InputError(
            f"cannot read {text!r}", where="--ratios", remedy='write, say, "layer3*=0.3"'
        ) from error


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

    def pruning(self) -> None:
        """The fields of `depcut.Options`, and a file of them; a flag goes before the file."""
        self.add(
            "--options", type=Path, metavar="FILE", help="TOML file of the options that follow"
        )
        for name in names_of(Options, ShrinkKeywords):
            if name not in _ELSEWHERE:
                self._field(name)

    def _field(self, name: str) -> None:
        """The flag of one field; where it is not given, the namespace does not have it."""
        flag, default = "--" + name.replace("_", "-"), default_of(Options, name)
        text = doc_of(Options, name).replace("%", "%%").replace("`", "")
        text = f"{text[0].lower()}{text[1:].rstrip('.')}"
        if default is not None and default != () and not isinstance(default, bool):
            text += f" (default: {default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if isinstance(default, bool):
            self.add(flag, action=argparse.BooleanOptionalAction, **common)
        elif name == "compensate":
            self.add(flag, type=_switch, metavar="auto|true|false", **common)
        elif name == "ratios":
            self.add(flag, type=_ratio_by_glob, action="append", metavar="GLOB=RATIO", **common)
        elif isinstance(default, tuple):
            self.add(flag, action="append", metavar="GLOB", **common)
        else:
            self.add(flag, type=int if isinstance(default, int) else str, **common)

    def plan(self) -> None:
        """The options of a plan to apply first, and of weights for the smaller model."""
        self.add("--plan", type=Path, metavar="FILE", help="plan to apply to the model first")
        self.add(
            "--slim-weights",
            type=Path,
            metavar="FILE",
            help="safetensors file to load after the plan was applied",
        )

    def timing(self) -> None:
        """The options of timing."""
        self.add(
            "--threads",
            type=int,
            default=argparse.SUPPRESS,
            help="threads that one operator may use (default: 1)",
        )
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
