"""What of a checkpoint is written already: kept in its folder until all of it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depcut.errors import DepcutError, InputError, listed
from depcut.storage import folder as folders
from depcut.support import files
from depcut.support.checks import check_path
from depcut.support.failures import first_line

NAME = ".depcut-progress.json"
PLAN = ".depcut-plan.json"  # until all is written
TRAIL = ".depcut-trail"  # of what passes over the data have found so far
_FORMAT = 1
_ANEW = "pass the same arguments again, or choose a new folder"


def digest(request: Any) -> str:
    """Of a request and what it is of.

    Args:
        request: Plain data.
    """
    text = json.dumps(request, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Journal:
    """What is written of one request.

    Attributes:
        folder: Where.
        request: Digest of what was asked for, and of the depcut that does it.
        source: Fingerprint of the dense checkpoint.
        done: Size and hash of each finished file, by name.
        complete: Whether all of it was written by an earlier run.
    """

    folder: Path
    request: str
    source: str
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    def write(self) -> None:
        """Keep it in the folder.

        Raises:
            InputError: It cannot be written.
        """
        data = {
            "format": _FORMAT,
            "request": self.request,
            "source": self.source,
            "finished": self.done,
        }
        files.write_json(self.folder / NAME, data, "progress", InputError, indent=1)

    def finished(self, name: str) -> bool:
        """Whether a file is written, and is what was written.

        Args:
            name: Of the file.
        """
        path = self.folder / name
        return name in self.done and path.is_file() and folders.entry(path) == self.done[name]

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        """Note that a file is written.

        Args:
            name: Of the file.
            entry: Its size and hash.

        Raises:
            InputError: The journal cannot be written.
        """
        self.done[name] = entry
        self.write()

    def close(self) -> None:
        """Index all files; the journal goes, and what else was kept under a hidden name.

        Raises:
            DepcutError: The index cannot be written.
        """
        found = sorted(self.folder.iterdir())
        shown = [p for p in found if not p.name.startswith(".") and p.name != folders.INDEX]
        entries = {p.name: self.done.get(p.name) or folders.entry(p) for p in shown}
        folders.write_index(self.folder, entries, {"request": self.request, "source": self.source})
        _remove(self.folder)


def _remove(folder: Path) -> None:
    """Remove what is of a run that has ended; the journal last, without which nothing goes on."""
    for path in folder.glob(".depcut-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != NAME:
            path.unlink()
    (folder / NAME).unlink(missing_ok=True)


@contextmanager
def journal(path: Path, request: str, source: str) -> Iterator[Journal]:
    """The journal of a folder, which no other process writes to meanwhile.

    Args:
        path: The folder; it is made where it is not there.
        request: See `Journal`.
        source: See `Journal`.

    Raises:
        InputError: It holds something else, or what another request wrote.
    """
    folder = check_path(path, "dst", InputError)
    files.make_folder(folder, "dst=", InputError)
    with files.claimed(folder, "dst=", InputError):
        opened = _opened(folder, request, source)
        try:
            yield opened
        except DepcutError as error:
            if not isinstance(error.__cause__, OSError):  # a full disk is no refusal
                _forget(folder, opened)
            raise


def _forget(folder: Path, opened: Journal) -> None:
    """Leave nothing of a request that was refused before a file of it was written."""
    if opened.complete or opened.done.keys() - {PLAN}:
        return
    _remove(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def _opened(folder: Path, request: str, source: str) -> Journal:
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith(files.DRAFT))
    opened = Journal(folder, request, source)
    if not found:
        opened.write()
        return opened
    name = NAME if NAME in found else folders.INDEX
    if name not in found:
        raise InputError(
            f"the folder holds other files: {listed(found, 3)}", where=str(folder), remedy=_ANEW
        )
    try:
        said = files.read_json(folder / name)
        before = said.get("request"), said.get("source")
        opened.done = dict(said.get("finished", {}))
        opened.complete = name == folders.INDEX
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{name} is damaged: {first_line(error)}",
            where=str(folder),
            remedy="remove the folder, or choose another",
        ) from error
    if before[1] != source and before[0] == request:
        raise InputError(
            "the dense checkpoint changed since this folder was begun",
            where=str(folder),
            remedy="remove the folder, or choose another",
        )
    if before != (request, source):
        raise InputError(
            "the folder was begun with another request", where=str(folder), remedy=_ANEW
        )
    files.remove_drafts(folder)
    return opened
