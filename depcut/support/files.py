"""Files and folders that appear complete or not at all.

What is new is written under a hidden name in the folder of its target and renamed when it is
finished. A reader, or a process that is killed, meets the old content or the new one. A new file
has the mode that the umask gives, a replaced one keeps its own; a symbolic link stays one, and what
it points to is replaced.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depcut.errors import DepcutError
from depcut.support.checks import check_path

if sys.platform != "win32":
    import fcntl

DRAFT = ".draft-"  # what the names of unfinished files and folders begin with

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


_PATIENCE = 6.0  # seconds; the workers of a data loader outlive a process that is killed by five


@contextmanager
def claimed(folder: Path, where: str, error: type[DepcutError] = DepcutError) -> Iterator[None]:
    """A folder that no other process, or thread, claims for the time of the context.

    Args:
        folder: It exists.
        where: The argument that names it.
        error: What to raise.

    Raises:
        DepcutError: Another one has claimed it; as `error`.
    """
    if sys.platform == "win32":  # it has no such locks
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise error(
                        "another run is writing to the folder",
                        where=where,
                        remedy="wait until it has ended, or choose another folder",
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def target_of(
    path: str | os.PathLike[str], what: str = "file", error: type[DepcutError] = DepcutError
) -> Path:
    """The regular file that writing to a path makes or replaces; links are followed.

    Args:
        path: Where to write.
        what: What is written, for messages.
        error: What to raise.

    Raises:
        DepcutError: There is something else than a file, or no folder to hold one; as `error`.
    """
    target = check_path(path, what, error)
    with _translated(target, what, error):
        if target.is_symlink():
            target = Path(os.path.realpath(target))
        kind = _kind(target)
        if kind not in (None, "file"):
            raise error(
                f"the {what} cannot be written: {target} is a {kind}",
                where=str(path),
                remedy="pass the name of a file in it"
                if kind == "folder"
                else "pass the name of a file that is new or may be replaced",
            )
        if kind is None and not target.parent.is_dir():
            raise error(
                f"the {what} cannot be written: the folder {target.parent} does not exist",
                where=str(path),
                remedy="create it first",
            )
    return target


@contextmanager
def replacing(
    path: str | os.PathLike[str],
    what: str = "file",
    error: type[DepcutError] = DepcutError,
    *,
    flush: bool = False,
) -> Iterator[Path]:
    """A draft to write to, which takes the place of a file when the block ends without an error.

    Args:
        path: The file to make or replace.
        what: What is written, for messages.
        error: What to raise.
        flush: Whether to wait until the content is on the disk, so that a machine that loses its
            power keeps it.

    Yields:
        The draft: an empty file in the same folder.

    Raises:
        DepcutError: It cannot be written, see `target_of`; as `error`. Nothing has changed then.
    """
    target = target_of(path, what, error)
    draft = _draft_in(target.parent)
    with _translated(path, what, error):
        try:
            old = _mode(target)
            descriptor = os.open(
                draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, (old or 0o666) | 0o600
            )
            os.close(descriptor)
            mode = _mode(draft) if old is None else old
            yield draft
            _finish(draft, target, mode, flush)
        finally:
            draft.unlink(missing_ok=True)


def write_json(
    path: str | os.PathLike[str],
    data: Any,
    what: str = "file",
    error: type[DepcutError] = DepcutError,
    *,
    indent: int | None = None,
) -> None:
    """Write plain data as JSON; the file is the old one or the new one at any time.

    Args:
        path: The file to make or replace.
        data: What `json` takes.
        what: What is written, for messages.
        error: What to raise.
        indent: Spaces a level; None: on one line.

    Raises:
        DepcutError: See `replacing`.
    """
    write_text(path, json.dumps(data, indent=indent), what, error)


def write_text(
    path: str | os.PathLike[str], text: str, what: str, error: type[DepcutError] = DepcutError
) -> None:
    """Write text as UTF-8, in the way of `write_json`."""
    with replacing(path, what, error) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The plain data of a JSON file; what is no regular file is not opened.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else: bad syntax, a name twice, nesting beyond all need.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file; what is no regular file (a device, a FIFO) is not opened.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no UTF-8.
    """
    file = check_path(path, "path")
    kind = _kind(file)
    if kind not in (None, "file"):
        raise OSError(f"{file} is a {kind}")
    return file.read_text(encoding="utf-8")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of JSON, each of whose names occurs once."""
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"{name!r} occurs twice in one object")
        names[name] = value
    return names


def move(draft: Path, target: Path) -> None:
    """Give a finished file the name of another, which it replaces and whose mode it takes.

    Args:
        draft: A file on the file system of `target`.
        target: What `target_of` returned.

    Raises:
        OSError: It cannot be moved.
    """
    _finish(draft, target, _mode(target), flush=False)


@contextmanager
def workplace(
    path: str | os.PathLike[str], what: str = "file", error: type[DepcutError] = DepcutError
) -> Iterator[tuple[Path, Path]]:
    """A hidden folder beside a file that is put together from several; removed afterwards.

    Args:
        path: The file to make or replace.
        what: What is written, for messages.
        error: What to raise for an OSError in the block, too.

    Yields:
        What to `move` to, see `target_of`, and the folder, on its file system.

    Raises:
        DepcutError: It cannot be made; as `error`.
    """
    target = target_of(path, what, error)
    draft = _draft_in(target.parent)
    with _translated(path, what, error):
        try:
            draft.mkdir()
            yield target, draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_folder(
    path: str | os.PathLike[str],
    what: str = "folder",
    error: type[DepcutError] = DepcutError,
    *,
    flush: bool = False,
) -> Iterator[Path]:
    """A draft folder to fill, which takes the place of `path` when the block ends without an error.

    Args:
        path: The folder to make or replace.
        what: What is written, for messages.
        error: What to raise.
        flush: Whether to wait until its files are on the disk.

    Yields:
        The draft, an empty folder beside it.

    Raises:
        DepcutError: It cannot be written, or what is there is no folder; as `error`.
    """
    target = Path(path)
    draft, old = _draft_in(target.parent), _draft_in(target.parent)
    with _translated(path, what, error):
        kind = _kind(target)
        if kind not in (None, "folder") or target.is_symlink():
            raise error(
                f"the {what} cannot be written: {target} is no folder",
                where=str(path),
                remedy="remove it, or choose another folder",
            )
        try:
            draft.mkdir()
            yield draft
            if flush:
                for file in filter(Path.is_file, draft.rglob("*")):
                    _flush(file)
            if kind == "folder":
                target.rename(old)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


def make_folder(path: Path, where: str, error: type[DepcutError] = DepcutError) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        path: The folder.
        where: The argument that names it.
        error: What to raise.

    Raises:
        DepcutError: It cannot be made; as `error`.
    """
    path = check_path(path, where.removesuffix("="), error)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as refusal:
        raise error(
            f"the folder cannot be made: {refusal}",
            where=where,
            remedy="choose a folder that can be written to",
        ) from refusal


def remove_drafts(folder: Path) -> None:
    """Remove what a process that was killed left unfinished in a folder that no other one uses.

    Args:
        folder: The folder.
    """
    for path in folder.glob(f"{DRAFT}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _translated(
    path: str | os.PathLike[str], what: str, error: type[DepcutError]
) -> Iterator[None]:
    """An OSError of the block as a DepcutError that names the path."""
    try:
        yield
    except OSError as refusal:
        raise error(
            f"the {what} cannot be written: {refusal}",
            where=os.fspath(path),
            remedy="free some space, or choose a folder that can be written to",
        ) from refusal


def _draft_in(folder: Path) -> Path:
    return folder / f"{DRAFT}{secrets.token_hex(8)}"


def _kind(path: Path) -> str | None:
    """What a path leads to; None: nothing."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "file")


def _mode(path: Path) -> int | None:
    """The permissions of a file; None if there is none."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def _finish(draft: Path, target: Path, mode: int | None, flush: bool) -> None:
    if flush:
        _flush(draft)
    if mode is not None:
        draft.chmod(mode)
    draft.replace(target)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
