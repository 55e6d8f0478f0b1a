"""Tensors and models as safetensors files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from depcut.errors import DepcutError, InputError
from depcut.support import files

_LENGTH = struct.Struct("<Q")  # of the header, which begins a safetensors file
_METADATA = "__metadata__"


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill the model from a safetensors file; every tensor must be there and fit.

    Args:
        model: The model to fill. Tensors that it shares are stored once.
        path: The file.

    Raises:
        InputError: The file is missing or no safetensors file, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        with _readable(path) as file:
            load_model(model, os.fspath(file), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"the weights cannot be loaded: {error}",
            where=str(path),
            remedy="pass a safetensors file that was saved from this very model",
        ) from error


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state as safetensors; the file appears complete or not at all.

    Args:
        model: The model. Tensors that it shares are written once.
        path: The file to write.

    Raises:
        DepcutError: The file cannot be written.
    """
    from safetensors.torch import save_model

    with files.replacing(path, "weights") as draft, _storing():
        save_model(model, os.fspath(draft))


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    what: str = "tensors",
    error: type[DepcutError] = DepcutError,
    *,
    flush: bool = False,
) -> None:
    """Write tensors by name; the file appears complete or not at all.

    Args:
        tensors: Contiguous, none sharing the memory of another.
        path: The file to write.
        what: What they are, for messages.
        error: What to raise.
        flush: See `files.replacing`.

    Raises:
        DepcutError: The file cannot be written; as `error`.
    """
    from safetensors.torch import save_file

    with files.replacing(path, what, error, flush=flush) as draft, _storing():
        save_file(dict(tensors), draft)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    from safetensors.torch import load_file

    with _readable(path) as file:
        return load_file(file)


def open_tensors(path: Path) -> Any:
    """A safetensors file whose tensors are read by name: `keys()`, `get_tensor(name)`.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    from safetensors import safe_open

    with _readable(path) as file:
        return safe_open(file, framework="pt")


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of each of its tensors: dtype, shape and data_offsets.

    Args:
        path: The file; that it is one, and whole, `open_tensors` checks.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
        if len(first) < _LENGTH.size:
            raise ValueError("it ends within its header")
        (length,) = _LENGTH.unpack(first)
        if length > path.stat().st_size:
            raise ValueError("it ends within its header")
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop(_METADATA, None)
    return header


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that is to be written.

    Attributes:
        dtype: As safetensors spells it: "BF16".
        width: Bytes of an element.
        shape: Its sizes.
    """

    dtype: str
    width: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return self.width * math.prod(self.shape)


def write_part_by_part(
    layout: Mapping[str, Stored],
    parts: Callable[[str], Iterable[Tensor]],
    path: str | os.PathLike[str],
    what: str = "tensors",
    error: type[DepcutError] = DepcutError,
) -> str:
    """Write tensors of which one part is in memory at a time.

    The file appears complete, and on the disk, or not at all.

    Args:
        layout: The tensors, by name.
        parts: The elements of a tensor in order, part by part.
        path: The file to write.
        what: What they are, for messages.
        error: What to raise.

    Returns:
        The file's SHA-256.

    Raises:
        DepcutError: The file cannot be written; as `error`.
        ValueError: The parts are not of the size that was said.
    """
    names = sorted(layout, key=lambda name: (-layout[name].width, name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + layout[name].bytes
        shape = list(layout[name].shape)
        header[name] = {"dtype": layout[name].dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    digest = hashlib.sha256()
    with files.replacing(path, what, error, flush=True) as draft, draft.open("wb") as file:
        for block in (_LENGTH.pack(len(text)), text):
            digest.update(block)
            file.write(block)
        for name in names:
            written = 0
            for part in parts(name):
                elements: Any = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.update(elements)
                written += file.write(elements)
            if written != layout[name].bytes:
                raise ValueError(f"{name} has {written} bytes instead of {layout[name].bytes}")
    return digest.hexdigest()


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a file for safetensors, which reads only names that are UTF-8.

    Raises:
        ValueError: It is no safetensors file, as what reads it within the context finds.
    """
    from safetensors import SafetensorError

    with ExitStack() as stack:
        try:
            os.fspath(path).encode()
            file = Path(path)
        except UnicodeEncodeError:
            file = Path(stack.enter_context(TemporaryDirectory())) / "link.safetensors"
            file.symlink_to(Path(path).absolute())
        try:
            yield file
        except SafetensorError as error:
            raise ValueError(str(error)) from error


@contextmanager
def _storing() -> Iterator[None]:
    """Raise an error of safetensors (a full disk, for one) as an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
