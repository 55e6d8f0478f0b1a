"""Options of a command from a TOML file; what the command line says goes before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depcut.errors import InputError
from depcut.support.failures import shown
from depcut.support.toml_files import read_options


def named_file(arguments: Sequence[str]) -> Path | None:
    """The file that `--options` names, found before the command's own parser reads anything.

    Args:
        arguments: The command line, after the program's name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--options", type=Path)
    try:
        file = parser.parse_known_args(arguments)[0].options
    except argparse.ArgumentError:  # nothing follows it, as the command's own parser will say
        return None
    return file if isinstance(file, Path) else None


def read(path: Path) -> dict[str, Any]:
    """The names and values of a TOML file, names as Python writes them.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, or names an option twice.
    """
    values = read_options(path)
    names = {name: name.replace("-", "_") for name in values}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    if twice:
        raise InputError(
            f"{', '.join(sorted(twice))} is given twice",
            where=str(path),
            remedy="write each option once, with - or with _",
        )
    return {names[name]: value for name, value in values.items()}


def converted(action: argparse.Action, value: Any, path: Path, *, several: bool) -> Any:
    """What a flag makes of a value of the file.

    Args:
        action: The flag.
        value: From the file.
        path: The file, for messages.
        several: Whether the flag may be repeated, or takes several values.

    Raises:
        InputError: The flag does not take it.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _refusal(action, value, path, "write true or false")
        return value
    if several:
        return [_one(action, v, path) for v in (value if isinstance(value, list) else [value])]
    return _one(action, value, path)


def _one(action: argparse.Action, value: Any, path: Path) -> Any:
    """One value as the flag's type, which reads text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refusal(action, value, path, "write one value, as after the flag")
    read_text: Any = action.type or str
    try:
        result = read_text(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise _refusal(action, value, path, "write what the flag takes") from error
    if action.choices is not None and result not in action.choices:
        allowed = ", ".join(map(str, action.choices))
        raise _refusal(action, value, path, f"use one of {allowed}")
    return result


def _refusal(action: argparse.Action, value: Any, path: Path, remedy: str) -> InputError:
    return InputError(f"{action.dest} is {shown(value)}", where=str(path), remedy=remedy)
