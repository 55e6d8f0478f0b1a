"""The loss that a model takes itself, of labels among the arguments of its forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from depcut.errors import InputError

MODEL = "model"  # what a user passes as loss= for it


def own_loss(output: Any, target: Any) -> torch.Tensor:  # noqa: ARG001  (a loss gets both)
    """The loss in a model's output: its `loss`, or the one scalar in a tuple.

    Args:
        output: What the model returned for inputs and labels.
        target: Of the item; not needed.

    Raises:
        InputError: The output holds none.
    """
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None and isinstance(output, tuple | list):
        scalars = [v for v in output if isinstance(v, torch.Tensor) and v.numel() == 1]
        value = scalars[0] if len(scalars) == 1 else None
    if isinstance(value, torch.Tensor):
        return value
    raise InputError(
        "the model's output holds no loss",
        where='loss="model"',
        remedy="pass data with the labels that the forward takes, or a function of (output, "
        "target)",
    )


OWN_LOSS = own_loss
