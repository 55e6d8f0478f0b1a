"""Tensors whose values are in files of the temporary folder, mapped into memory."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from depcut.errors import DepcutError
from depcut.support.failures import first_line
from depcut.support.processes import ALONE, Processes

_BLOCK = 1 << 26  # bytes that are written at once
_TOKEN = "here"  # the file by which a process knows the folder of another


class MappedTensors:
    """Tensors in files that the processes of a host share, and that vanish with the last of them.

    What is not being read or written need not be in memory: the system drops the pages of a file,
    or writes them back, where it would have to swap other memory out.

    Args:
        everyone: The processes that put the same tensors, in the same order.
    """

    def __init__(self, everyone: Processes = ALONE) -> None:
        self._everyone = everyone
        self._number = 0
        with _named(tempfile.gettempdir()):
            self._own = Path(tempfile.mkdtemp(prefix="depcut-"))
        self._folder = self._own if everyone.size == 1 else self._shared()

    def _shared(self) -> Path:
        """The folder of the first process of this host, if this one can read there."""
        token = secrets.token_hex(16)
        with _named(self._own):
            (self._own / _TOKEN).write_text(token, encoding="ascii")
        host = socket.gethostname()
        said = self._everyone.exchanged("folders", [host, str(self._own), token])
        _, folder, expected = next(each for each in said if each[0] == host)
        try:
            seen = (Path(folder) / _TOKEN).read_text(encoding="ascii") == expected
        except OSError:  # of another container, or another user
            seen = False
        return Path(folder) if seen else self._own

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU with the values of another, to be read only.

        Args:
            tensor: The values; the same in all processes.

        Raises:
            DepcutError: There is no room for the file.
            ProcessError: Another process has failed.
        """
        path = self._folder / f"{self._number}.bin"
        self._number += 1
        if self._folder == self._own:
            _write(path, tensor)
        self._everyone.exchanged("a tensor of the model")  # it is written
        return _mapped(path, tensor, writable=False)

    def close(self) -> None:
        """Remove the names of the files, once all processes have mapped them."""
        self._everyone.exchanged("the tensors of the model")
        self.remove()

    def remove(self) -> None:
        """Remove the names of the files of this process."""
        for path in self._own.iterdir():
            path.unlink()
        self._own.rmdir()


def in_file(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU with the values of another, in a file of its own; it may be changed.

    Args:
        tensor: The values.

    Raises:
        DepcutError: There is no room for the file.
    """
    with _named(tempfile.gettempdir()):
        handle, name = tempfile.mkstemp(prefix="depcut-", suffix=".bin")
        os.close(handle)
    path = Path(name)
    try:
        _write(path, tensor)
        return _mapped(path, tensor, writable=True)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _named(folder: str | Path) -> Iterator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch.from_file's
        why = getattr(error, "strerror", None) or first_line(error)
        raise DepcutError(
            f"the model's tensors cannot be put together in a file: {why}",
            where=str(folder),
            remedy="free some space, or point TMPDIR to a folder on a larger disk",
        ) from error


def _write(path: Path, tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    with _named(path.parent), path.open("wb") as file:
        for start in range(0, len(flat), _BLOCK):
            file.write(flat[start : start + _BLOCK].cpu().numpy().data)


def _mapped(path: Path, like: torch.Tensor, writable: bool) -> torch.Tensor:
    size = like.numel() * like.element_size()
    if not size:
        return torch.empty(like.shape, dtype=like.dtype)
    with _named(path.parent):
        raw = torch.from_file(str(path), shared=writable, size=size, dtype=torch.uint8)
    return raw.view(like.dtype).reshape(like.shape)
