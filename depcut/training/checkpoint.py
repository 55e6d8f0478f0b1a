"""Training states on disk: tensors as safetensors, the rest as JSON; complete or not there at all.

A folder `step-N` appears under its name when both files in it are written, and then the older ones
go. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from depcut.errors import DepcutError, TrainingError

_STEP = re.compile(r"step-(\d{9})")
_BEST = re.compile(r"best-(\d+)\.safetensors")
_TENSORS, _PLAIN = "tensors.safetensors", "state.json"


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once; buffers that are not persistent, too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a model with what `model_tensors` gave."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(tensors[name])


def digest(model: nn.Module) -> str:
    """A hash of a model's weights."""
    found = hashlib.sha256()
    for name, tensor in model_tensors(model).items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()[:16]


def flatten(tree: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as plain data, its tensors moved to `tensors` under their paths.

    Args:
        tree: Dicts, lists, tuples, tensors, numbers, strings.
        name: Path of the tree.
        tensors: Grows.

    Raises:
        TrainingError: It holds something else.
    """
    if isinstance(tree, torch.Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[k, flatten(v, f"{name}/{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TrainingError(
        f"a {type(tree).__name__} cannot be written to a checkpoint: nothing is pickled",
        where=name,
        remedy="use an optimizer and a schedule whose states are plain data, or no checkpoint=",
    )


def unflatten(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `flatten` was given."""
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unflatten(v, tensors) for k, v in value}
    items = [unflatten(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items


class Checkpoints:
    """The states of one training in one folder.

    Args:
        folder: Where; it is made if need be.

    Raises:
        TrainingError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"the folder cannot be made: {error}",
                where=f"checkpoint={self.folder}",
                remedy="choose another folder",
            ) from error

    def _found(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if _STEP.fullmatch(p.name))

    def write(self, step: int, state: Mapping[str, Any], best: int | None) -> None:
        """Write a state; older ones go once it is there.

        Args:
            step: Its number.
            state: Nested plain data and tensors.
            best: The epoch whose weights are the best so far, which stay.

        Raises:
            DepcutError: It cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        plain = flatten(state, "", tensors)
        target = self.folder / f"step-{step:09d}"
        try:
            draft = Path(tempfile.mkdtemp(dir=self.folder, prefix=".draft-"))
            try:
                save_file(tensors, draft / _TENSORS)
                (draft / _PLAIN).write_text(json.dumps(plain))
                for name in (_TENSORS, _PLAIN):
                    _flush(draft / name)
                if target.exists():
                    shutil.rmtree(target)
                draft.replace(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            raise DepcutError(
                f"the checkpoint cannot be written: {error}",
                where=str(target),
                remedy="free some space, or choose another folder",
            ) from error
        self._clean(target, best)

    def _clean(self, newest: Path, best: int | None) -> None:
        for path in self._found():
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            match = _BEST.fullmatch(path.name)
            if match and int(match[1]) != best:
                path.unlink(missing_ok=True)
            elif path.name.startswith(".draft-"):
                shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest state, None if there is none.

        Raises:
            TrainingError: It cannot be read.
        """
        found = self._found()
        if not found:
            return None
        try:
            tensors = load_file(found[-1] / _TENSORS)
            state = unflatten(json.loads((found[-1] / _PLAIN).read_text()), tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint cannot be read: {error}",
                where=str(found[-1]),
                remedy="delete this folder, or pass resume=False to start anew",
            ) from error
        assert isinstance(state, dict)
        return state

    def asked(self) -> dict[str, Any]:
        """What the training whose state is newest was asked for; empty if there is none."""
        found = self._found()
        try:
            state = json.loads((found[-1] / _PLAIN).read_text()) if found else {"dict": []}
            return dict(unflatten(dict(state["dict"]).get("run", {"dict": []}), {}))
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # `latest`, which needs the tensors as well, says what is wrong with it

    def clear(self) -> None:
        """Remove all states."""
        for path in self._found():
            shutil.rmtree(path)
        for path in self.folder.iterdir():
            if _BEST.fullmatch(path.name):
                path.unlink()

    def write_best(self, epoch: int, model: nn.Module) -> None:
        """Keep the weights of an epoch, beside those kept before until the next `write`."""
        tensors: dict[str, torch.Tensor] = {}
        flatten(model_tensors(model), "", tensors)
        draft = self.folder / f".draft-best-{epoch}"
        draft.mkdir(exist_ok=True)
        save_file(tensors, draft / "best")
        _flush(draft / "best")
        (draft / "best").replace(self.folder / f"best-{epoch}.safetensors")
        draft.rmdir()

    def load_best(self, epoch: int, model: nn.Module) -> None:
        """Fill a model with the weights of an epoch."""
        tensors = load_file(self.folder / f"best-{epoch}.safetensors")
        load_tensors(model, {name.removeprefix("/"): t for name, t in tensors.items()})

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write history.json."""
        draft = self.folder / ".history.json"
        draft.write_text(json.dumps(history, indent=1))
        draft.replace(self.folder / "history.json")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
