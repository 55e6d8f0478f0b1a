"""What passes over the data have found so far, in files from which another process goes on.

At the end of a stretch, the values that the walk keeps, and what those who look at it have gathered
until then, are written; a manifest that names these files, with their hashes, takes the place of
the one before at last. A process that is killed leaves the last manifest and its files, or those of
a stretch before.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import fx

from depcut.calibration.packing import Packed, packed, read_runs
from depcut.calibration.plain_form import NotPlainError, from_plain_form, plain_form
from depcut.capture.program import Program
from depcut.errors import InputError
from depcut.support import files
from depcut.support.torch_private import pytree

_MANIFEST = "trail.json"
_MODE = 0o600  # activations tell what the data was
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_CHUNK = 2**24  # bytes
_SHARE = 0.1  # of the time that may be spent on writing


class Part(Protocol):
    """Something that has a state between two stretches."""

    def state(self) -> Any:
        """Nested plain values and tensors."""

    def restore(self, state: Any) -> bool:
        """Have a state that an earlier process had; False: it cannot, and has changed nothing."""


@dataclass(frozen=True)
class File:
    """Runs of bytes that were written.

    Attributes:
        path: Where.
        sizes: Of each run.
    """

    path: Path
    sizes: tuple[int, ...]


class Keeping(Protocol):
    """What keeps values between stretches: a store."""

    def kept(self) -> list[tuple[Hashable, Packed, File]]:
        """All that it keeps, of which the bytes are in files of the trail."""

    def restore(self, kept: Iterable[tuple[Hashable, Packed, File]]) -> None:
        """Keep what an earlier process kept."""


@dataclass
class Trail:
    """The folder of a trail.

    Attributes:
        folder: It exists, and no other process writes to it.
        parts: What has a state beside that of each pass, by name.
    """

    folder: Path
    parts: dict[str, Part] = field(default_factory=dict)
    _due: float = 0.0
    _listed: dict[str, str] = field(default_factory=dict)  # hashes of the manifest's files, by name

    def write(self, runs: Iterable[torch.Tensor]) -> File:
        """Write runs of bytes to a new file.

        Raises:
            InputError: It cannot be written.
        """
        sizes, path = [], self.folder / f"{os.urandom(8).hex()}.bin"
        with self._writing(), os.fdopen(os.open(path, _NEW, _MODE), "wb") as file:
            for run in runs:
                file.write(run.cpu().numpy().data)
                sizes.append(run.numel())
        return File(path, tuple(sizes))

    def drop(self, file: File) -> None:
        """Remove a file, unless the manifest names it: then, with that."""
        if file.path.name not in self._listed:
            file.path.unlink(missing_ok=True)

    def following(
        self, name: str, program: Program, stores: Sequence[Keeping], parts: Mapping[str, Part]
    ) -> Callable[[], None]:
        """Go on with a pass where an earlier process was with it, if one was.

        Args:
            name: Of the pass.
            program: The graph that it runs.
            stores: Where it keeps values.
            parts: What has a state, by name: the one of an earlier process is restored. After
                those of the trail, they can be restored whatever their state.

        Returns:
            What to call at the end of each stretch.
        """
        steps = _Following(self, name, program, stores, {**self.parts, **parts})
        if not steps.resume():
            self.clear()
        self._due = time.monotonic()
        return steps.write

    def clear(self) -> None:
        """Remove all of it."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        self.keep({})

    def keep(self, listed: Mapping[str, str]) -> None:
        """Remove files that the manifest does not name.

        Args:
            listed: Hashes of those that it does, by name.
        """
        self._listed = dict(listed)
        for path in self.folder.iterdir():
            if path.name not in listed and path.name != _MANIFEST:
                path.unlink(missing_ok=True)

    def hashed(self, file: File) -> str:
        """The hash of a file, all of which is on the disk then.

        Raises:
            InputError: It cannot be written.
        """
        known = self._listed.get(file.path.name)
        if known is not None:
            return known
        with self._writing(), file.path.open("rb+") as stream:
            os.fsync(stream.fileno())
            return _sha256_of(stream)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An OSError of the block as an error that names the folder."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"what the data showed cannot be kept: {error.strerror or error}",
                where=str(self.folder),
                remedy="free some space, and pass the same arguments again",
            ) from error


@dataclass
class _Following:
    """One pass over the data. The attributes are the arguments of `Trail.following`."""

    trail: Trail
    name: str
    program: Program
    stores: Sequence[Keeping]
    parts: Mapping[str, Part]

    def write(self) -> None:
        """Write what there is, unless writing would take more than a share of the time."""
        trail, start = self.trail, time.monotonic()
        if start < trail._due:
            return
        try:
            self._write()
        except NotPlainError:
            return  # the manifest before stays, and what it names
        now = time.monotonic()
        trail._due = now + (now - start) * (1 / _SHARE - 1)

    def _write(self) -> None:
        trail = self.trail
        states = packed({name: part.state() for name, part in self.parts.items()})
        form = _form(states)
        kept = [
            [[number, plain_form(key)], _form(values), file]
            for number, store in enumerate(self.stores)
            for key, values, file in store.kept()
        ]
        entries = [[None, form, trail.write(states.runs)], *kept]
        hashes = {f.path.name: trail.hashed(f) for _, _, f in entries}
        held = [[k, form, [f.path.name, list(f.sizes)]] for k, form, f in entries]
        digest = _digest(self.program)
        manifest = {"pass": self.name, "graph": digest, "entries": held, "files": hashes}
        path = trail.folder / _MANIFEST
        text = json.dumps({"sha256": _sha256(manifest), **manifest})
        with files.replacing(path, "progress", InputError, flush=True) as draft:
            draft.write_text(text, encoding="utf-8")
        trail.keep(hashes)

    def resume(self) -> bool:
        """Restore what an earlier process was with; False: nothing of this pass is there, whole."""
        try:
            manifest = files.read_json(self.trail.folder / _MANIFEST)
            known = manifest.pop("sha256")
            if known != _sha256(manifest) or manifest["pass"] != self.name:
                return False
            if manifest["graph"] != _digest(self.program):
                return False
            nodes = {node.name: node for node in self.program.graph.graph.nodes}
            hashes = dict(manifest["files"])
            state_form, *others = (
                (key, _packed(form, nodes), self._file(*file))
                for key, form, file in manifest["entries"]
            )
            kept: list[list[tuple[Hashable, Packed, File]]] = [[] for _ in self.stores]
            for (number, key), values, file in others:
                kept[number].append((from_plain_form(key, nodes), values, file))
            whole = all(_is_whole(self.trail.folder / n, digest) for n, digest in hashes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
        _, states, file = state_form
        if not whole or {f.path.name for _, _, f in (state_form, *others)} != hashes.keys():
            return False
        state = states.unpacked(read_runs(file.path, file.sizes))
        if state.keys() != self.parts.keys():
            return False
        if not all(part.restore(state[name]) for name, part in self.parts.items()):
            return False
        for store, found in zip(self.stores, kept, strict=True):
            store.restore(found)
        self.trail.keep(hashes)
        return True

    def _file(self, name: str, sizes: list[int]) -> File:
        if Path(name).name != name:
            raise ValueError(name)
        return File(self.trail.folder / name, tuple(sizes))


def _is_whole(path: Path, digest: str) -> bool:
    with path.open("rb") as file:
        return _sha256_of(file) == digest


def _sha256_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _form(values: Packed) -> Any:
    """The plain form of packed values, without their bytes."""
    return plain_form((values.devices, pytree.tree_unflatten(list(values.leaves), values.spec)))


def _packed(form: Any, nodes: Mapping[str, fx.Node]) -> Packed:
    """Packed values, without their bytes."""
    devices, tree = from_plain_form(form, nodes)
    leaves, spec = pytree.tree_flatten(tree)
    return Packed((), devices, tuple(leaves), spec)


def _digest(program: Program) -> str:
    """Of the operators of a graph, in their order."""
    return _sha256([[node.op, node.name] for node in program.graph.graph.nodes])


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
