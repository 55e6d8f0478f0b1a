"""What a criterion has gathered so far, as nested tensors and back; nothing is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from depcut.calibration.inputs import Inputs
from depcut.calibration.store import Store
from depcut.scores.elimination import Weight
from depcut.scores.quadratic import FullGram, FullInverse, ThinGram, ThinInverse
from depcut.scores.waiting import Waiting

_KINDS = (Inputs, Weight, Waiting, FullInverse, ThinInverse, FullGram, ThinGram)
_BY_NAME: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def held(value: Any) -> Any:
    """Nested tensors and plain values that say all that a gathered value does.

    Args:
        value: Moments, readers, arrays, and lists and dicts of them; a store is only named.
    """
    if isinstance(value, _KINDS):
        return type(value).__name__, held(dict(vars(value)))
    if isinstance(value, np.ndarray):
        return "array", torch.from_numpy(value)
    if isinstance(value, dict):
        return "dict", {key: held(v) for key, v in value.items()}
    if isinstance(value, list):
        return "list", [held(v) for v in value]
    return ("store", None) if isinstance(value, Store) else ("itself", value)


def given(state: Any, store: Store) -> Any:
    """The gathered value of which `held` returned a state.

    Args:
        state: What it returned.
        store: In place of the one that there was.
    """
    kind, value = state
    if kind == "array":
        return value.numpy()
    if kind == "dict":
        return {key: given(v, store) for key, v in value.items()}
    if kind == "list":
        return [given(v, store) for v in value]
    if kind in _BY_NAME:
        out = object.__new__(_BY_NAME[kind])
        vars(out).update(given(value, store))
        return out
    return store if kind == "store" else value
