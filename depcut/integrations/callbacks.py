"""Gradual pruning inside other people's training loops: Lightning and transformers.

Neither library is imported before a callback is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from depcut.errors import DepcutError, InputError
from depcut.support.weights import read_tensors, write_tensors
from depcut.training.gradual import Gradual

_FILE = "depcut_gradual.safetensors"


def lightning_callback(gradual: Gradual) -> Any:
    """A Lightning callback that advances masks once per optimizer step and checkpoints them.

    Call `gradual.commit()` after `trainer.fit`. Masks and step count are saved with Lightning's own
    checkpoints, as plain tensors.

    Args:
        gradual: Of the module that the LightningModule trains, or of a part of it.

    Raises:
        DepcutError: `lightning` cannot be imported.
        InputError: It is no `Gradual`.
    """
    _check(gradual)
    base = _imported("lightning.pytorch", "pip install lightning").Callback

    class GradualPruning(base):  # type: ignore[misc, valid-type]
        """Advances masks after every optimizer step."""

        def __init__(self) -> None:
            self.gradual = gradual
            self._seen = 0

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self._seen = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            # With accumulated gradients not every batch is a step of the optimizer.
            for _step in range(trainer.global_step - self._seen):
                self.gradual.step()
            self._seen = trainer.global_step

        def state_dict(self) -> dict[str, Any]:
            return dict(self.gradual.state_dict())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.gradual.load_state_dict(state_dict)

    return GradualPruning()


def transformers_callback(gradual: Gradual) -> Any:
    """A transformers `TrainerCallback` that advances masks once per optimizer step.

    Call `gradual.commit()` after `trainer.train`. Masks and step count are written into each of the
    Trainer's checkpoint folders, and read from there when it resumes.

    Args:
        gradual: Of the model that the Trainer trains, or of a part of it.

    Raises:
        DepcutError: `transformers` cannot be imported.
        InputError: It is no `Gradual`.
    """
    _check(gradual)
    base = _imported("transformers", "pip install transformers accelerate").TrainerCallback

    class GradualPruning(base):  # type: ignore[misc, valid-type]
        """Advances masks after every optimizer step."""

        def __init__(self) -> None:
            self.gradual = gradual

        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step and self.gradual.steps != state.global_step:
                path = _file(args, state)
                if not path.exists():
                    raise InputError(
                        f"training resumes at step {state.global_step}, and there are no masks",
                        where=str(path),
                        remedy="resume from a checkpoint that was saved with this callback",
                    )
                self.gradual.load_state_dict(_masks(path))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.gradual.step()

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            path = _file(args, state)
            if state.is_world_process_zero and path.parent.is_dir():
                masks = {k: v.cpu() for k, v in self.gradual.state_dict().items()}
                write_tensors(masks, path, "masks")

    return GradualPruning()


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE


def _masks(path: Path) -> dict[str, torch.Tensor]:
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the masks cannot be read: {error}",
            where=str(path),
            remedy="resume from another checkpoint",
        ) from error


def _check(gradual: object) -> None:
    if not isinstance(gradual, Gradual):
        raise InputError(
            f"gradual is a {type(gradual).__name__}",
            where="gradual=",
            remedy="pass depcut.training.Gradual(model, ratio, inputs, start, end, every)",
        )


def _imported(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise DepcutError(
            f"{name} cannot be imported: {type(error).__name__}: {error}"[:300],
            where="the callback",
            remedy=remedy,
        ) from error
