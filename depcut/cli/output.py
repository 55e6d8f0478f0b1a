"""What a command says: lines of text, or one JSON document on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from depcut.pictures.record import plain
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
            value: What has a `to_dict`, or what JSON can hold.
            text: What is printed; by default the result as text.
        """
        self.document[name] = value
        if not self.as_json:
            sys.stdout.write(f"{value if text is None else text}\n")

    def entry(self, name: str, value: Any) -> None:
        """Add to the document what the printed text says elsewhere, or not at all.

        Args:
            name: Its name in the document.
            value: What has a `to_dict`, or what JSON can hold.
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
            document = {name: _plain(value) for name, value in self.document.items()}
            json.dump(document, sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    """A result as JSON holds it."""
    return value.to_dict() if callable(getattr(value, "to_dict", None)) else plain(value)
