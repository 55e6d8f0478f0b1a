"""Steps of a repeated pruning on disk, each a folder that is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.apply.plan import Plan
from depcut.errors import InputError
from depcut.support import codec, files
from depcut.support.checks import check_path
from depcut.support.weights import load_weights, save_weights

FORMAT = 2


class RunFolder:
    """A folder with one sub-folder a finished step.

    Args:
        folder: Where; made if it does not exist.
        request: What the run is asked for; a folder of another request is refused.
        resume: Whether steps that are there may be taken over.

    Raises:
        InputError: The folder holds another run, or is no folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], request: Mapping[str, Any], resume: bool
    ) -> None:
        self.folder = check_path(folder, "checkpoint")
        self.request = json.loads(json.dumps(request))
        files.make_folder(self.folder, "checkpoint=", InputError)
        if not resume and self._path(0).exists():
            raise InputError(
                "the folder holds the steps of an earlier run",
                where=f"checkpoint={os.fspath(folder)!r}",
                remedy="pass resume=True to go on from there, or another folder",
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:03d}"

    def finished(self) -> int:
        """How many steps are there.

        Raises:
            InputError: They are of another request, or cannot be read.
        """
        files.remove_drafts(self.folder)  # of a run that was killed while it wrote
        count = 0
        while self._path(count).exists():
            state = self._state(count)
            if state["format"] != FORMAT or state["request"] != self.request:
                raise InputError(
                    "the checkpoints are of another run: " + _difference(state, self.request),
                    where=str(self._path(count)),
                    remedy="pass the same arguments as then, or another folder",
                )
            count += 1
        return count

    def _state(self, step: int) -> dict[str, Any]:
        path = self._path(step)
        try:
            return {name: codec.load_entry(path, name) for name in ("format", "request")}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"the checkpoint cannot be read: {error}",
                where=str(path),
                remedy="remove the folder of this step and of all later ones, and run again",
            ) from error

    def plan(self, step: int) -> Plan:
        """The plan of a finished step."""
        return Plan.load(self._path(step) / "plan.json")

    def write(
        self,
        step: int,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        record: Mapping[str, Any],
    ) -> None:
        """Write a finished step; it appears complete or not at all.

        Args:
            step: Its number.
            plan: What it removed.
            model: The model as it was retrained.
            optimizer: Whose state goes along, if there is one.
            record: What else there is to say, as JSON.
        """
        with files.new_folder(self._path(step), "checkpoint") as draft:
            plan.save(draft / "plan.json")
            save_weights(model, draft / "weights.safetensors")
            state = {
                "format": FORMAT,
                "request": self.request,
                "record": dict(record),
                "training": [name for name, m in model.named_modules() if m.training],
                "optimizer": None if optimizer is None else optimizer.state_dict(),
                "random": _random_states(),
            }
            codec.save(state, draft)

    def read(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Load a finished step: weights and modes of the model, optimizer, random states.

        Args:
            step: Its number.
            model: The model to fill.
            optimizer: One for this very model, or None.

        Returns:
            What the step recorded.

        Raises:
            InputError: A file cannot be read or does not fit.
        """
        load_weights(model, self._path(step) / "weights.safetensors")
        try:
            state = codec.load(self._path(step))
            if optimizer is not None and state["optimizer"] is not None:
                optimizer.load_state_dict(state["optimizer"])
            _set_random_states(state["random"])
            training = set(state["training"])
            record = dict(state["record"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"the state of the step cannot be read: {error}",
                where=str(self._path(step)),
                remedy="remove the folder of this step and of all later ones, and run again",
            ) from error
        for name, module in model.named_modules():
            module.training = name in training
        return record


def _random_states() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def _set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) - 1 == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])


def _difference(state: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    if state["format"] != FORMAT:
        return f"their format is {state['format']}, this depcut reads {FORMAT}"
    theirs = state["request"]
    names = [n for n in {**theirs, **request} if theirs.get(n) != request.get(n)]
    return ", ".join(f"{n} was {theirs.get(n)!r}, is {request.get(n)!r}" for n in names[:3])
