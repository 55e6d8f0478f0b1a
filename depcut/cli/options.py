"""The options that the commands of the command line share, and where their values come from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from depcut.cli.models import MODEL_HELP
from depcut.cli.option_file import converted
from depcut.cli.output import Output
from depcut.errors import InputError
from depcut.options import Options, ShrinkKeywords
from depcut.support.keywords import default_of, doc_of, names_of
from depcut.timing.runtimes import RUNTIMES, providers

# Flags that stand elsewhere: with the budget, and with what is timed.
_ELSEWHERE = ("latency_ms", "runtime", "threads")
# Tables, which a file holds and no flag.
_OF_FILES = ("workload",)
# Flags that say how to read and how to answer a command line: no file has them.
_OF_THE_LINE = ("json", "options", "debug")


@dataclass(frozen=True)
class Subcommand:
    """One command of the command line.

    Attributes:
        name: What it is called.
        summary: What it does, in a line.
        declare: Adds its options.
        run: Does it, with the options' values.
    """

    name: str
    summary: str
    declare: Callable[[Command], None]
    run: Callable[[argparse.Namespace, Output], None]


def options_of(arguments: argparse.Namespace) -> Options:
    """The options that the command line gives: those of the file, and the flags before them.

    Args:
        arguments: As `Command.settled` returns them, of a command with the flags of `pruning`.

    Raises:
        InputError: A value is wrong.
    """
    given = vars(arguments)
    flags = {n: given[n] for n in names_of(Options, ShrinkKeywords) if n in given}
    if "ratios" in flags:
        flags["ratios"] = dict(flags["ratios"])
    return Options(**{**arguments.of_file, **flags})


def _switch(text: str) -> bool | str:
    values: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, true, false")
    return values[text.lower()]


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor an integer") from error


def _ratio_by_glob(text: str) -> tuple[str, float]:
    glob, _, number = text.rpartition("=")
    try:
        return glob, float(number)
    except ValueError as error:
        raise InputError(
            f"cannot read {text!r}", where="--ratios", remedy='write, say, "layer3*=0.3"'
        ) from error


class Command:
    """One command under construction, and the settling of its values.

    argparse is asked for what was given alone: values of a file stand between that and defaults.

    Args:
        parser: Its parser.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._actions: dict[str, argparse.Action] = {}
        self._defaults: dict[str, Any] = {}
        self._pruning: tuple[str, ...] = ()
        self._groups: list[tuple[Any, list[str]]] = []
        self._common()

    def add(self, *flags: str, default: Any = None, target: Any = None, **given: Any) -> str:
        """Add a flag or a positional argument.

        Args:
            *flags: Its names.
            default: Its value where neither command line nor file give one.
            target: The group that it belongs to, if it does.
            **given: What `argparse` takes.

        Returns:
            The name of its value.
        """
        if given.get("action") == "store_true":
            default = False
        elif given.get("action") == "append":
            default = []
        elif default is not None:
            given["help"] = f"{given['help']} (default: {default})"
        added = target or self._parser
        action = added.add_argument(*flags, default=argparse.SUPPRESS, **given)
        self._actions[action.dest], self._defaults[action.dest] = action, default
        return str(action.dest)

    def exclusive(self) -> Callable[..., None]:
        """Adds options of which one must be given, and only one."""
        group = self._parser.add_mutually_exclusive_group(required=True)
        names: list[str] = []
        self._groups.append((group, names))

        def add(*flags: str, **given: Any) -> None:
            names.append(self.add(*flags, target=group, **given))

        return add

    def expect(self, values: Mapping[str, Any]) -> None:
        """Demand no more of the command line what a file gives.

        Args:
            values: Of the file, by name.
        """
        for name in values:
            if name in self._actions:
                self._actions[name].required = False
        for group, names in self._groups:
            group.required = not any(name in values for name in names)

    def settled(
        self, given: argparse.Namespace, values: Mapping[str, Any], path: Path | None
    ) -> argparse.Namespace:
        """All values: as the command line gives them, else as the file does, else the defaults.

        Args:
            given: What the parser returned.
            values: Of the file, by name.
            path: The file, for messages.

        Raises:
            InputError: The file gives what the command does not know, or what a flag does not take.
        """
        pruning = [name for name in self._pruning if name not in _ELSEWHERE]
        known = [name for name in (*self._actions, *pruning) if name not in _OF_THE_LINE]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InputError(
                f"unknown options: {', '.join(unknown)}",
                where=str(path),
                remedy=f"there are {', '.join(dict.fromkeys(known))}",
            )
        settled = dict(self._defaults)
        for name in values:
            rivals = {n for _, names in self._groups if name in names for n in names}
            if name in pruning or rivals & vars(given).keys():
                continue
            several = isinstance(self._defaults[name], list) or self._actions[name].nargs == "+"
            assert path is not None
            settled[name] = converted(self._actions[name], values[name], path, several=several)
        settled["of_file"] = {name: values[name] for name in pruning if name in values}
        return argparse.Namespace(**{**settled, **vars(given)})

    def _common(self) -> None:
        """What every command has."""
        self.add(
            "--json",
            action="store_true",
            help="write one JSON document to standard output, and nothing else there",
        )
        self.add(
            "--options",
            type=Path,
            metavar="FILE",
            help="TOML file of options by their names; the command line goes before it",
        )
        self.add(
            "--debug", action="store_true", help="show the traceback of an error, your code's first"
        )

    def model(self) -> None:
        """The options of all commands that build one model."""
        self.add("model", metavar="MODEL", help="see below")
        self.inputs()

    def selection(self) -> None:
        """Which part of the model is captured, and which of its outputs count."""
        self.add("--part", metavar="NAME", help="module to capture alone, such as backbone")
        self.add(
            "--outputs",
            action="append",
            metavar="NAME",
            help="an output that counts, by name or position; the others may become narrower",
        )

    def inputs(self) -> None:
        """Weights and example inputs."""
        self._parser.epilog = MODEL_HELP
        self.add(
            "--weights",
            type=Path,
            metavar="FILE",
            help="weights of the dense model: safetensors, an index of several, .pth, .pt or .bin",
        )
        self.add(
            "--input-shape",
            action="append",
            metavar="SHAPE",
            help="sizes of an input, such as 2,3,224,224 or 2,32:int64; once per positional "
            "argument; inferred from the model if left out",
        )

    def pruning(self) -> None:
        """The fields of `depcut.Options`."""
        self._pruning = tuple(names_of(Options, ShrinkKeywords))
        for name in self._pruning:
            if name not in (*_ELSEWHERE, *_OF_FILES):
                self._field(name)

    def _field(self, name: str) -> None:
        """The flag of one field; where it is not given, the namespace does not have it."""
        flag, default = "--" + name.replace("_", "-"), default_of(Options, name)
        kind = next(f.type for f in fields(Options) if f.name == name)
        text = doc_of(Options, name).replace("%", "%%").replace("`", "")
        text = f"{text[0].lower()}{text[1:].rstrip('.')}"
        if default is not None and default != () and not isinstance(default, bool):
            text += f" (default: {default})"
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        add = self._parser.add_argument
        if kind == "bool":
            add(flag, action=argparse.BooleanOptionalAction, **common)
        elif kind == "bool | str":
            add(flag, type=_switch, metavar="auto|true|false", **common)
        elif kind == "int | str":
            add(flag, type=_number_or_auto, metavar="auto|N", **common)
        elif name == "ratios":
            add(flag, type=_ratio_by_glob, action="append", metavar="GLOB=RATIO", **common)
        elif isinstance(default, tuple):
            add(flag, action="append", metavar="GLOB", **common)
        else:
            add(flag, type=int if isinstance(default, int) else str, **common)

    def plan(self) -> None:
        """The options of a plan to apply first, and of weights for the smaller model."""
        self.add("--plan", type=Path, metavar="FILE", help="plan to apply to the model first")
        self.add(
            "--slim-weights",
            type=Path,
            metavar="FILE",
            help="weights to load after the plan was applied",
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
        self.add("--peak-memory", action="store_true", help="measure peak memory too")
        self.timing()
