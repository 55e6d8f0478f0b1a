"""What is gathered of the data at one place, as nested values of tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from depcut.calibration.inputs import Inputs


def held(value: Any) -> Any:
    """Nested tensors and plain values that say all that a gathered value does.

    Args:
        value: Moments, an array, or a nested value of tensors.
    """
    if isinstance(value, Inputs):
        return "inputs", dict(vars(value))
    if isinstance(value, np.ndarray):
        return "array", torch.from_numpy(value)
    return "itself", value


def given(state: Any) -> Any:
    """The gathered value of which `held` returned a state."""
    kind, value = state
    if kind == "inputs":
        inputs = Inputs()
        vars(inputs).update(value)
        return inputs
    return value.numpy() if kind == "array" else value
