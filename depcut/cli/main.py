"""The `depcut` command: its parser, its exit codes, and what it says of errors."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import shtab
from rich_argparse import RawDescriptionRichHelpFormatter

from depcut.cli import option_file
from depcut.cli.analyze import ANALYZE
from depcut.cli.bench import BENCH
from depcut.cli.compact import COMPACT
from depcut.cli.demo import DEMO
from depcut.cli.export import EXPORT
from depcut.cli.frontier import FRONTIER
from depcut.cli.options import Command
from depcut.cli.output import Output
from depcut.cli.report import REPORT_COMMAND
from depcut.cli.shrink import SHRINK
from depcut.errors import DepcutError, InputError, LatencyError, RuleError, VerificationError
from depcut.support.failures import first_line
from depcut.version import __version__

_COMMANDS = {
    c.name: c for c in (DEMO, ANALYZE, FRONTIER, SHRINK, COMPACT, EXPORT, BENCH, REPORT_COMMAND)
}

DONE, FAILED, MISTAKE, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
# Nothing that the user gave is wrong; depcut's other errors say what is.
_FAILURES = (VerificationError, RuleError, LatencyError)
_EPILOG = """\
Exit codes: 0 done; 1 failed, although what was given is right (the result does not verify, time
cannot be measured, an error of depcut itself); 2 what was given is wrong, and standard error says
where; 130 interrupted; 141 standard output was closed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; `sys.argv` when left out.

    Returns:
        The exit code, see `depcut --help`.
    """
    given = sys.argv[1:] if arguments is None else [*arguments]
    name = given[0] if given and given[0] in _COMMANDS else ""
    output = Output(name, as_json="--json" in given)
    try:
        code = _guarded(given, output, debug="--debug" in given)
        output.finish()
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would raise again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _guarded(given: list[str], output: Output, *, debug: bool) -> int:
    """Run a command, and say what went wrong if something did; the exit code."""
    try:
        options = _read(given)
        with output.alone(), _short_warnings(output):
            _COMMANDS[options.command].run(options, output)
    except BrokenPipeError:
        raise
    except DepcutError as error:
        code = FAILED if isinstance(error, _FAILURES) else MISTAKE
        return _failed(error, error, code, output, debug=debug)
    except MemoryError as error:
        remedy = "use smaller inputs or batches, or --memory 1GiB"
        return _failed(
            error, DepcutError("memory ran out", remedy=remedy), FAILED, output, debug=debug
        )
    except Exception as error:  # noqa: BLE001  (it is said, as what it is)
        last = traceback.extract_tb(error.__traceback__)[-1]
        unexpected = DepcutError(
            f"an error of depcut itself: {first_line(error)}",
            where=f"{last.filename}:{last.lineno}",
            remedy="please report it, with what --debug shows",
        )
        return _failed(error, unexpected, FAILED, output, debug=debug)
    return DONE


def _failed(cause: Exception, error: DepcutError, code: int, output: Output, *, debug: bool) -> int:
    """Say an error: as text on standard error, and in the document."""
    if debug:
        traceback.print_exception(cause)
    sys.stderr.write(f"{output.title}: {error}\n")
    kind = type(cause).__name__
    said = {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}
    output.entry("error", said)
    return code


def _read(given: list[str]) -> argparse.Namespace:
    """The options of a command line, and of the file that it names."""
    parser, commands = _parser()
    path = option_file.named_file(given)
    values = {} if path is None else option_file.read(path)
    if given and given[0] in commands:
        commands[given[0]].expect(values)
    found = parser.parse_args(given)
    return commands[found.command].settled(found, values, path)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as depcut says it, in place of all that would have been right."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, where="the command line", remedy=f"see {self.prog} --help")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    """The parser, and its commands by name."""
    shared: dict[str, Any] = {
        "formatter_class": RawDescriptionRichHelpFormatter,
        "allow_abbrev": False,
    }
    parser = _Parser(
        prog="depcut",
        description="Structured pruning of PyTorch models, verified: a smaller dense model out.",
        epilog=_EPILOG,
        **shared,
    )
    parser.add_argument("--version", action="version", version=f"depcut {__version__}")
    shtab.add_argument_to(parser, ["--print-completion"], help="print a script for a shell's tab")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}
    for name, one in _COMMANDS.items():
        text = f"{one.summary[0].upper()}{one.summary[1:]}."
        commands[name] = Command(
            added.add_parser(name, help=one.summary, description=text, **shared)
        )
        one.declare(commands[name])
    return parser, commands


@contextmanager
def _short_warnings(output: Output) -> Iterator[None]:
    """Warnings as lines of the command, without the code that gave them."""

    def show(message: Warning | str, *_: Any) -> None:
        sys.stderr.write(f"{output.title}: warning: {message}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]  # it has no use for the rest
        yield
