"""Every private name of accelerate that depcut uses, with why; all were read in accelerate 1.15.

| name | why |
|---|---|
| `AcceleratorState._reset_state` | the process is as it was before depcut made an Accelerator |
| `_original_forward`, `_is_accelerate_prepared` | left on a model, they spoil its next training |
"""

from __future__ import annotations

from typing import Any

# Attributes that `Accelerator.prepare` leaves on a model, which would be taken for prepared again.
TRACES = ("forward", "_original_forward", "_is_accelerate_prepared")


def reset_state() -> None:
    """Forget the process-wide state that the first Accelerator sets up."""
    from accelerate import state

    kind: Any = state.AcceleratorState
    kind._reset_state()


def shares_out(loader: Any) -> bool:
    """Whether a loader is one of accelerate's, which gives each process batches of its own.

    Args:
        loader: A DataLoader.
    """
    return any(kind.__module__ == "accelerate.data_loader" for kind in type(loader).__mro__)
