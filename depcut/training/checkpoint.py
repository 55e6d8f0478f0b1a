"""Training states on disk, each complete or not there at all.

A folder `step-N` appears under its name when both files in it are written, and then the older ones
go.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.errors import TrainingError
from depcut.support import codec, files
from depcut.support.checks import check_path
from depcut.support.failures import first_line
from depcut.support.weights import read_tensors, write_tensors

_STEP = re.compile(r"step-(\d{9})")
_ENTRIES = {"run", "course", "model", "optimizer", "schedule", "scaler"}
_BEST = re.compile(r"best-(\d+)\.safetensors")


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
    hasher = hashlib.sha256()
    for name, tensor in model_tensors(model).items():
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return hasher.hexdigest()[:16]


class Checkpoints:
    """The states of one training in one folder.

    Args:
        folder: Where; it is made if need be.

    Raises:
        TrainingError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = check_path(folder, "checkpoint", TrainingError)
        files.make_folder(self.folder, f"checkpoint={self.folder}", TrainingError)

    def _folders(self) -> list[Path]:
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
        target = self.folder / f"step-{step:09d}"
        with files.new_folder(target, "checkpoint", flush=True) as draft:
            codec.save(state, draft)
        self._clean(target, best)

    def _clean(self, newest: Path, best: int | None) -> None:
        for path in self._folders():
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.iterdir():
            match = _BEST.fullmatch(path.name)
            if match and int(match[1]) != best:
                path.unlink(missing_ok=True)
        files.remove_drafts(self.folder)

    def latest(self) -> dict[str, Any] | None:
        """The newest state, None if there is none.

        Raises:
            TrainingError: It cannot be read.
        """
        folders = self._folders()
        if not folders:
            return None
        try:
            state = codec.load(folders[-1])
            missing = _ENTRIES - state.keys() if isinstance(state, dict) else _ENTRIES
            if missing:
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged(error) from error
        return dict(state)

    def damaged(self, error: Exception) -> TrainingError:
        """What to raise where the newest state cannot be used."""
        return TrainingError(
            f"the checkpoint cannot be read: {first_line(error)}",
            where=str(self._folders()[-1]),
            remedy="delete this folder, or pass resume=False to start anew",
        )

    def asked(self) -> dict[str, Any]:
        """The identity (`run`) of the training whose state is newest; empty if there is none."""
        folders = self._folders()
        try:
            return dict(codec.load_entry(folders[-1], "run")) if folders else {}
        except (OSError, ValueError, TypeError, RecursionError):
            return {}  # `latest`, which needs the tensors as well, says what is wrong with it

    def clear(self) -> None:
        """Remove all states.

        Raises:
            TrainingError: They cannot be removed.
        """
        try:
            for path in self._folders():
                shutil.rmtree(path)
            for path in self.folder.iterdir():
                if _BEST.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise TrainingError(
                f"the checkpoints of an earlier run cannot be removed: {error}",
                where=f"checkpoint={self.folder}",
                remedy="remove them, or choose another folder",
            ) from error

    def write_best(self, epoch: int, model: nn.Module) -> None:
        """Keep the weights of an epoch, beside those kept before until the next `write`."""
        tensors = {n: t.detach().cpu().clone() for n, t in model_tensors(model).items()}
        target = self.folder / f"best-{epoch}.safetensors"
        write_tensors(tensors, target, "best weights", flush=True)

    def load_best(self, epoch: int, model: nn.Module) -> None:
        """Fill a model with the weights of an epoch.

        Raises:
            TrainingError: They cannot be read.
        """
        path = self.folder / f"best-{epoch}.safetensors"
        try:
            load_tensors(model, read_tensors(path))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise TrainingError(
                f"the best weights cannot be read: {error}",
                where=str(path),
                remedy="pass resume=False to start anew",
            ) from error

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write history.json."""
        files.write_json(self.folder / "history.json", history, "history", indent=1)
