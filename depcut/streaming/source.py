"""The tensors of a checkpoint, each read from its file when it is asked for."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from depcut.errors import InputError, listed
from depcut.integrations.pretrained_folder import CONFIG, INDEX, Shards, shards_of
from depcut.support.failures import first_line
from depcut.support.weights import header_of, open_tensors

# Of fewer bits than a byte, or scaled by numbers that stand elsewhere.
_PLAIN = frozenset("BOOL U8 I8 I16 U16 I32 U32 I64 U64 F16 BF16 F32 F64 C64".split())
_COPY = "copy the file again: what was downloaded or written is not whole"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: Name of its file.
        dtype: As safetensors spells it: "BF16".
        shape: Its sizes.
        bytes: How many it takes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Source(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files by name; none is kept.

    A file is opened for each tensor anew: the pages of one that stays open count as memory of the
    process for as long.

    Args:
        folder: What `save_pretrained` wrote.
        shards: Its files; left out, as its index says.

    Raises:
        InputError: The folder has no config, its weights are missing, pickled, quantized or
            damaged, or the index says otherwise than the files.
    """

    def __init__(self, folder: Path, shards: Shards | None = None) -> None:
        self.folder = folder
        self.shards = shards_of(folder) if shards is None else shards
        self.entries: dict[str, Entry] = {}
        for file, names in self.shards.files.items():
            self.entries.update(self._read(file, names))

    def _read(self, file: str, names: frozenset[str] | None) -> dict[str, Entry]:
        """The entries of a file, as its header has them."""
        path = self.folder / file
        if not path.is_file():
            raise InputError(
                f"the shard {file} is missing", where=str(self.folder), remedy="copy it, too"
            )
        try:
            header, held = header_of(path), set(open_tensors(path).keys())
        except (OSError, ValueError, struct.error) as error:
            raise InputError(
                f"the shard {file} is damaged: {first_line(error)}", where=str(path), remedy=_COPY
            ) from error
        wrong = sorted(names ^ held) if names is not None else []
        if wrong:
            what = "does not hold" if wrong[0] not in held else "holds, which the index does not,"
            raise InputError(
                f"the shard {file} {what} {listed(wrong, 3)}",
                where=str(self.folder / INDEX),
                remedy="copy the index and the shards again, from one place",
            )
        found = {}
        for name in sorted(held):
            said = header[name]
            start, end = said["data_offsets"]
            found[name] = Entry(file, said["dtype"], tuple(said["shape"]), end - start)
            if said["dtype"] not in _PLAIN:
                raise InputError(
                    f"a tensor is of {said['dtype']}: the weights are quantized",
                    where=f"{name} in {file}",
                    remedy="shrink the model that they were made from, and quantize the result",
                )
        return found

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor: Tensor = self._open(entry, name).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Some indices of a tensor's first dimension.

        Args:
            name: Of the tensor, which has a dimension.
            start: The first of them.
            end: Behind the last.
        """
        rows: Tensor = self._open(self.entries[name], name).get_slice(name)[start:end]
        return rows

    def _open(self, entry: Entry, name: str) -> Any:
        try:
            return open_tensors(self.folder / entry.file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"a shard changed while it was read: {first_line(error)}",
                where=f"{name} in {self.folder / entry.file}",
                remedy=_COPY,
            ) from error

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    @cached_property
    def fingerprint(self) -> str:
        """Of the config, the index, and each file's size, time of change and header."""
        digest = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for file in self.shards.files:
            path = self.folder / file
            state = path.stat()
            digest.update(f"{file} {state.st_size} {state.st_mtime_ns}".encode())
        for name, entry in self.entries.items():
            digest.update(f"{name} {entry}".encode())
        return digest.hexdigest()
