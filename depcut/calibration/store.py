"""What a walk keeps between its stretches: in memory up to a budget, the rest in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from depcut.calibration.packing import Packed, packed, read_runs
from depcut.calibration.trail import File, Trail
from depcut.errors import DepcutError

_PREFIX = "depcut-walk-"
_MODE = 0o600  # activations tell what the data was
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@dataclass
class _Kept:
    """One entry.

    Attributes:
        packed: The values; of an entry on the disk, without their bytes.
        sizes: Bytes of each run.
        path: The file with the bytes of all runs; None: they are in memory.
        aside: Whether they are in the memory of another device than the CPU.
        read: The bytes that are being read ahead, if any.
        file: Of the trail, with the same bytes.
    """

    packed: Packed
    sizes: tuple[int, ...]
    path: Path | None = None
    aside: bool = False
    read: Future[list[torch.Tensor]] | None = None
    file: File | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


class Store:
    """Nested values by key: in memory up to a number of bytes, then in files.

    Values on a GPU stay there while half of its free memory suffices. Files are in a temporary
    folder that only its owner can read and that is removed with the store (`with`, or `close`).
    For one thread.

    Args:
        budget: Bytes to hold in the CPU's memory.
        trail: Where to have files, if they are to outlast the process.

    Attributes:
        held: Bytes in memory now.
        most: The most that there were.
        spilled: Bytes written to files so far.
    """

    def __init__(self, budget: int, trail: Trail | None = None) -> None:
        self.trail = trail
        self.budget, self.held, self.most, self.spilled = budget, 0, 0, 0
        self._entries: dict[Hashable, _Kept] = {}
        self._aside = 0  # bytes on other devices, and how many there may be
        self._room: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._files = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @property
    def folder(self) -> Path | None:
        """Where the files are; None: there are none yet."""
        return None if self._folder is None else Path(self._folder.name)

    def reserve(self, nbytes: int) -> None:
        """Count memory that something else of the walk takes (negative: gives back)."""
        self.held += nbytes
        self.most = max(self.most, self.held)

    def put(self, key: Hashable, tree: Any) -> None:
        """Keep nested values; they may share memory with the caller's, who lets go of them.

        Args:
            key: What to ask for them by; nothing is kept by it yet.
            tree: The values.

        Raises:
            DepcutError: The files cannot be written.
        """
        assert key not in self._entries
        found = packed(tree)
        sizes = tuple(run.numel() for run in found.runs)
        if self._fits_aside(found):
            self._aside += sum(sizes)
            self._entries[key] = _Kept(found, sizes, aside=True)
        elif self.held + sum(sizes) <= self.budget:
            self.reserve(sum(sizes))
            here = replace(found, runs=tuple(run.cpu() for run in found.runs))
            self._entries[key] = _Kept(here, sizes)
        elif self.trail is not None:
            self._entries[key] = _in_file(found, self.trail.write(found.runs))
        else:
            path = self._written(found.runs)
            self._entries[key] = _Kept(replace(found, runs=()), sizes, path)

    def kept(self) -> list[tuple[Hashable, Packed, File]]:
        """All entries, of which the bytes are in files of the trail.

        Raises:
            InputError: They cannot be written.
        """
        assert self.trail is not None
        for kept in self._entries.values():
            if kept.file is None:
                kept.file = self.trail.write(kept.packed.runs)
        entries = self._entries.items()
        return [(key, kept.packed, kept.file) for key, kept in entries if kept.file is not None]

    def restore(self, kept: Iterable[tuple[Hashable, Packed, File]]) -> None:
        """Keep what the store of an earlier process kept."""
        for key, found, file in kept:
            self._entries[key] = _in_file(found, file)

    def look(self, key: Hashable) -> Any:
        """The values, which stay kept."""
        kept = self._entries[key]
        return kept.packed.unpacked(None if kept.path is None else self._bytes(kept))

    def take(self, key: Hashable) -> Any:
        """The values, which are not kept any more."""
        out = self.look(key)
        self.drop(key)
        return out

    def drop(self, key: Hashable) -> None:
        """Forget values, if there are any."""
        kept = self._entries.pop(key, None)
        if kept is None:
            return
        if kept.aside:
            self._aside -= kept.nbytes
        elif kept.path is None:
            self.held -= kept.nbytes
        else:
            self._release(kept)
            if self.trail is not None and kept.file is not None:
                self.trail.drop(kept.file)
            else:
                kept.path.unlink(missing_ok=True)

    def read_ahead(self, key: Hashable) -> None:
        """Begin to read values from their file, where there is memory for them."""
        kept = self._entries.get(key)
        if kept is None or kept.path is None or kept.read is not None:
            return
        if self.held + kept.nbytes > self.budget:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="depcut-walk")
        self.reserve(kept.nbytes)
        kept.read = self._reader.submit(read_runs, kept.path, kept.sizes)

    def close(self) -> None:
        """Remove everything."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._entries.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self.held = 0

    def _fits_aside(self, found: Packed) -> bool:
        """Whether values are on a GPU, and can stay in half of what is free there."""
        devices = {device for device in found.devices if device.type == "cuda"}
        if len(devices) != 1:
            return False
        if self._room is None:
            self._room = torch.cuda.mem_get_info(devices.pop())[0] // 2
        return self._aside + found.nbytes <= self._room

    def _release(self, kept: _Kept) -> None:
        """Forget what was read ahead."""
        if kept.read is not None:
            kept.read = None
            self.held -= kept.nbytes

    def _bytes(self, kept: _Kept) -> list[torch.Tensor]:
        assert kept.path is not None
        try:
            return kept.read.result() if kept.read is not None else read_runs(kept.path, kept.sizes)
        except (OSError, ValueError) as error:
            raise DepcutError(
                f"what was kept of the data's activations cannot be read again: {error}",
                where=str(kept.path),
                remedy="leave the temporary folder alone, or pass a larger memory=",
            ) from error
        finally:
            self._release(kept)

    def _written(self, runs: tuple[torch.Tensor, ...]) -> Path:
        """A new file with the bytes of some runs."""
        where = tempfile.gettempdir()
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX)
            path = Path(self._folder.name) / f"{self._files}.bin"
            self._files += 1
            with os.fdopen(os.open(path, _NEW, _MODE), "wb") as f:
                for run in runs:
                    f.write(run.cpu().numpy().data)
                    self.spilled += run.numel()
        except OSError as error:
            raise DepcutError(
                f"the data's activations cannot be kept in a file: {error.strerror or error}",
                where=where,
                remedy="free some space, point TMPDIR to a folder on a larger disk, or pass a "
                "larger memory=",
            ) from error
        return path


def _in_file(found: Packed, file: File) -> _Kept:
    """An entry whose bytes are in a file of the trail."""
    return _Kept(replace(found, runs=()), file.sizes, file.path, file=file)
