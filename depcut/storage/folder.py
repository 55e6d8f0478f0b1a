"""The folder of a stored model: which files, that they are whole, and that no others are lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depcut.errors import DepcutError, InputError, listed
from depcut.support import files
from depcut.support.checks import check_path
from depcut.support.failures import first_line
from depcut.version import __version__

INDEX, MODEL, CARD = "depcut.json", "model.json", "README.md"
REPORT = "report.json"
FORMAT = 1
_CHUNK = 2**24  # bytes


def plan_name(number: int, plans: int) -> str:
    """The file of a plan: its number says which one it was, where there are several.

    Args:
        number: From 0.
        plans: How many there are.
    """
    return "plan.json" if plans == 1 else f"plan.{number + 1}.json"


def plan_names(folder: Path) -> list[str]:
    """The files of the plans of a stored model, in the order in which they were applied.

    Args:
        folder: The folder, which `checked` returned.
    """
    held = files.read_json(folder / INDEX)["files"]
    for plans in range(len(held) + 1):
        names = [plan_name(number, plans) for number in range(plans)]
        if plans and all(n in held for n in names) and plan_name(plans, plans + 1) not in held:
            return names
    return []


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which takes the place of an earlier one when the block ends.

    An index of all files, with their hashes, is added.

    Args:
        path: The folder to make, or to replace if `depcut.save` made it and nothing was added.

    Yields:
        The draft.

    Raises:
        InputError: There is something that is none of a stored model's files.
        DepcutError: It cannot be written. Nothing has changed then.
    """
    target = check_path(path, "folder")
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    check_replaceable(target)
    with files.new_folder(target, "model", InputError) as draft:
        yield draft
        write_index(draft, {file.name: entry(file) for file in sorted(draft.iterdir())})
        if target.is_dir():
            draft.chmod(target.stat().st_mode & 0o777)
        check_replaceable(target)


def write_index(
    folder: Path, entries: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Write the index of a stored model.

    Args:
        folder: Where.
        entries: What `entry` says of each file, by name.
        more: Further entries of the index.

    Raises:
        DepcutError: It cannot be written.
    """
    index = {"format": FORMAT, "depcut": __version__, **(more or {}), "files": dict(entries)}
    files.write_json(folder / INDEX, index, indent=1)


def check_replaceable(target: Path) -> None:
    """Refuse to replace a folder that holds anything but a stored model.

    Args:
        target: The folder, if there is one.

    Raises:
        InputError: It does.
    """
    if not target.is_dir():
        return
    found = sorted(p.name for p in target.iterdir() if not p.name.startswith(files.DRAFT))
    known: Any = ()
    if found and INDEX in found:
        try:
            known = {INDEX, *files.read_json(target / INDEX)["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the folder's {INDEX} is damaged: {first_line(error)}",
                where=str(target),
                remedy="remove the folder, or choose another",
            ) from error
    others = [name for name in found if name not in known]
    if others:
        raise InputError(
            f"the folder holds what is no stored model's: {listed(others)}",
            where=str(target),
            remedy="choose a new folder, or move these files away",
        )


def entry(file: Path) -> dict[str, Any]:
    """What the index says of a file.

    Args:
        file: The file.
    """
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checked(path: str | os.PathLike[str]) -> Path:
    """A folder whose files are all there and whole.

    Args:
        path: The folder.

    Raises:
        InputError: It is no stored model, of another format, or a file is missing or damaged.
    """
    folder = check_path(path, "folder")
    try:
        index = files.read_json(folder / INDEX)
        version, entries, writer = index["format"], dict(index["files"]), index["depcut"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no stored model can be read: {first_line(error)}",
            where=str(folder),
            remedy="pass a folder that depcut.save wrote",
        ) from error
    if version != FORMAT:
        raise InputError(
            f"the folder has format {version} (of depcut {writer}), this depcut reads {FORMAT}",
            where=str(folder),
            remedy="load it with that depcut, or save the model again",
        )
    for name, known in entries.items():
        problem = _problem(folder / name, known) if Path(name).name == name else "no file's name"
        if problem and name != CARD:
            raise InputError(
                f"{name} {problem}",
                where=str(folder),
                remedy="copy the folder again, or save again",
            )
    return folder


def _problem(file: Path, known: Any) -> str | None:
    try:
        if not file.is_file():
            return "is missing"
        whole = entry(file) == known
    except OSError as error:
        return f"cannot be read: {error}"
    return None if whole else "is damaged: it is not the file that was saved"


def reading(error: Exception, folder: Path) -> DepcutError:
    """The error about a file whose content cannot be.

    Args:
        error: What was raised.
        folder: The folder.
    """
    return InputError(
        f"the stored model is damaged: {first_line(error)}",
        where=str(folder),
        remedy="copy the folder again, or save the model again",
    )
