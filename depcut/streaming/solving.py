"""Weights re-solved on data, each kept in a file of its own until its shard is due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depcut.calibration.data import Calibration
from depcut.calibration.shelf import Shelf
from depcut.capture.random_state import preserved
from depcut.errors import InputError
from depcut.plan.keep import Keep
from depcut.reference.run import cast
from depcut.reference.slices import take
from depcut.repair.compensate import Compensation, Repair, re_solve
from depcut.storage.folder import entry
from depcut.streaming.journal import Journal
from depcut.streaming.weights import PRECISION, Single
from depcut.support import files
from depcut.support.weights import read_tensors, write_tensors

FOLDER = ".depcut-solved"


class Solved(MutableMapping[str, Tensor]):
    """Narrowed tensors: the kept parts of the dense ones, and from files those that were changed.

    Args:
        folder: Of the files.
        keep: What stays.
        weights: The dense tensors, as they are stored.
        changed: Names of those that have files.
    """

    def __init__(
        self, folder: Path, keep: Keep, weights: Mapping[str, Tensor], changed: set[str]
    ) -> None:
        self.folder, self.keep, self.weights, self.changed = folder, keep, weights, changed
        self._numbers = {name: i for i, name in enumerate(weights)}
        self._hashes: dict[str, dict[str, Any]] = {}

    def stored(self, name: str) -> Tensor:
        """A tensor that was changed, in the precision of the checkpoint.

        Args:
            name: Of the tensor.
        """
        return read_tensors(self._file(name))["tensor"]

    def __getitem__(self, name: str) -> Tensor:
        if name in self.changed:
            converted: Tensor = cast(self.stored(name), PRECISION)
            return converted
        dense, picked = self.weights[name], self.keep.tensors.get(name)
        kept: Tensor = cast(dense if picked is None else take(dense, picked), PRECISION)
        # What is re-solved is written to in place.
        return kept.clone() if kept.data_ptr() == dense.data_ptr() else kept

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        stored = tensor.detach().to(self.weights[name].dtype).contiguous()
        path = self._file(name)
        write_tensors({"tensor": stored}, path, "re-solved weights", InputError, flush=True)
        self._hashes[name] = entry(path)
        self.changed.add(name)

    def state(self) -> Any:
        """Hashes of the files that there are, by the name of the tensor."""
        return {name: self._hashes[name] for name in sorted(self.changed)}

    def restore(self, state: Any) -> bool:
        """Have the files that an earlier process wrote; False: they are not what it wrote."""
        paths = {name: self._file(name) for name in state}
        if not all(p.is_file() and entry(p) == state[name] for name, p in paths.items()):
            return False
        self._hashes.update(state)
        self.changed.update(state)
        return True

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def _file(self, name: str) -> Path:
        return self.folder / f"{self._numbers[name]}.safetensors"


@dataclass(frozen=True)
class Solution:
    """What data changed.

    Attributes:
        tensors: The narrowed tensors.
        done: Layer by layer.
    """

    tensors: Solved
    done: Compensation


def solution(
    keep: Keep, weights: Mapping[str, Tensor], calibration: Calibration, begun: Journal
) -> Solution:
    """Re-solve the weights that read what goes, from where an earlier run was with it.

    Args:
        keep: What stays.
        weights: The dense tensors, as they are stored.
        calibration: Batches to reproduce the dense outputs on.
        begun: What is written.

    Raises:
        InputError: A file cannot be written.
    """
    folder = begun.folder / FOLDER
    known = begun.done.get(FOLDER)
    if known is not None:
        repairs = tuple(Repair(**repair) for repair in known["repairs"])
        tensors = Solved(folder, keep, weights, set(known["changed"]))
        return Solution(tensors, Compensation(repairs, dict(known["left"])))
    files.make_folder(folder, "dst=", InputError)
    files.remove_drafts(folder)
    tensors, trail = Solved(folder, keep, weights, set()), calibration.trail
    if trail is not None:
        trail.parts["solved"] = tensors
    with torch.no_grad(), preserved():
        done, _ = re_solve(Shelf(Single(weights)), Shelf(tensors), keep, calibration)
    begun.finish(FOLDER, {**asdict(done), "changed": sorted(tensors.changed)})
    if trail is not None:
        trail.clear()
    return Solution(tensors, done)
