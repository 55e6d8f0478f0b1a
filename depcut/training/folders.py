"""Steps of a run on disk: each a folder that is complete or absent; JSON and safetensors only."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from depcut.apply.plan import Plan
from depcut.cli.loading import load_weights, save_weights
from depcut.errors import InputError

FORMAT = 1

_TENSOR = "tensor:"


class Checkpoints:
    """A folder with one sub-folder a finished step, written under another name and renamed.

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
        self.folder, self.request = Path(folder), json.loads(json.dumps(request))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder cannot be made: {error}",
                where="checkpoint=",
                remedy="pass a folder that can be written to",
            ) from error
        for stale in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(stale)  # of a run that was killed while it wrote
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
        path = self._path(step) / "state.json"
        try:
            state = json.loads(path.read_text())
            return {"format": state["format"], "request": state["request"], **state}
        except (OSError, ValueError, KeyError, TypeError) as error:
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
        draft = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".step-{step:03d}.", suffix=".tmp"))
        try:
            plan.save(draft / "plan.json")
            save_weights(model, draft / "weights.safetensors")
            rest: dict[str, torch.Tensor] = {}
            state = {
                "format": FORMAT,
                "request": self.request,
                "record": dict(record),
                "training": [name for name, m in model.named_modules() if m.training],
                "optimizer": None if optimizer is None else pack(optimizer.state_dict(), rest),
                "random": pack(_random_states(), rest),
            }
            save_file(rest, draft / "state.safetensors")
            (draft / "state.json").write_text(json.dumps(state, indent=1))
            draft.rename(self._path(step))
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def read(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Fill a model of the step's architecture, and the rest, with what it was then.

        Args:
            step: Its number.
            model: The model to fill.
            optimizer: One for this very model, or None.

        Returns:
            What the step recorded.

        Raises:
            InputError: A file cannot be read or does not fit.
        """
        state = self._state(step)
        load_weights(model, self._path(step) / "weights.safetensors")
        try:
            rest = load_file(self._path(step) / "state.safetensors")
            if optimizer is not None and state["optimizer"] is not None:
                optimizer.load_state_dict(unpack(state["optimizer"], rest))
            _set_random_states(unpack(state["random"], rest))
            training = set(state["training"])
            record = dict(state["record"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"the state of the step cannot be read: {error}",
                where=str(self._path(step)),
                remedy="remove the folder of this step and of all later ones, and run again",
            ) from error
        for name, module in model.named_modules():
            module.training = name in training
        return record


def pack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A tree of numbers and tensors as JSON; the tensors go into a dictionary of their own.

    Args:
        tree: Dictionaries, lists, tuples, numbers, strings, None and tensors.
        tensors: Where to put them.

    Raises:
        InputError: Something else is in it.
    """
    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return _TENSOR + name
    if isinstance(tree, dict):
        return {"dict": [[pack(k, tensors), pack(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [pack(v, tensors) for v in tree]}
    if isinstance(tree, int | float | str | bool | None):
        return tree
    raise InputError(
        f"a {type(tree).__name__} in the optimizer's state cannot be saved as JSON",
        where="optimizer=",
        remedy='pass optimizer_state="reset", or no checkpoint=',
    )


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `pack` was given.

    Args:
        tree: What it returned.
        tensors: The dictionary that it filled.
    """
    if isinstance(tree, str) and tree.startswith(_TENSOR):
        return tensors[tree.removeprefix(_TENSOR)]
    if isinstance(tree, dict):
        [(kind, items)] = tree.items()
        if kind == "dict":
            return {unpack(k, tensors): unpack(v, tensors) for k, v in items}
        made = [unpack(v, tensors) for v in items]
        return tuple(made) if kind == "tuple" else made
    return tree


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
