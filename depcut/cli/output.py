"""What a command says: lines of text, or one JSON document on standard output."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from depcut.version import __version__


class Output:
    """Collects the results of one command.

    Args:
        command: Its name.
        as_json: Whether standard output gets one JSON document in place of text.
    """

    def __init__(self, command: str, *, as_json: bool) -> None:
        self.command, self.as_json = command, as_json
        self.document: dict[str, Any] = {"command": command, "version": __version__}

    @property
    def title(self) -> str:
        """What messages begin with."""
        return f"depcut {self.command}".rstrip()

    def say(self, name: str, value: Any, text: str | None = None) -> None:
        """Add a result to the document, or print it.

        Args:
            name: Its name in the document.
            value: The result, see `plain`.
            text: What is printed; by default the result as text.
        """
        self.document[name] = value
        if not self.as_json:
            sys.stdout.write(f"{value if text is None else text}\n")

    def entry(self, name: str, value: Any) -> None:
        """Add to the document what the printed text says elsewhere, or not at all.

        Args:
            name: Its name in the document.
            value: The result, see `plain`.
        """
        self.document[name] = value

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What other code prints goes to standard error where the document is to stand alone."""
        with contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext():
            yield

    def finish(self) -> None:
        """Write the document, if there is to be one."""
        if self.as_json:
            json.dump(plain(self.document), sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")


def plain(value: Any) -> Any:
    """A result as JSON holds it.

    Args:
        value: Names and values, lists, numbers, text, arrays, paths; what has a `to_dict` gives
            that, another dataclass its fields, all else its text. NaN and infinity become None.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return str(value)
