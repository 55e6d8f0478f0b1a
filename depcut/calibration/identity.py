"""Whether data that was calibrated before is for this model, and with this loss."""

from __future__ import annotations

from typing import Any

import torch

from depcut.capture.capture import is_symbolic
from depcut.capture.program import Program
from depcut.errors import InputError
from depcut.support.torch_private import pytree


def check_same_loss(before: Any, now: Any) -> None:
    """Refuse a loss that comes on top of another one.

    Args:
        before: The loss of the calibration, or None.
        now: The loss that is passed beside it, or None.

    Raises:
        InputError: It is another one.
    """
    if now is None or now is before:
        return
    raise InputError(
        f"the calibration was made with{'out a' if before is None else ' another'} loss",
        where="loss=",
        remedy="pass loss= to Analysis.calibrate alone, which tries it on the data",
    )


def check_same_model(theirs: Program, ours: Program) -> None:
    """Refuse a calibration of a model with other tensors or inputs.

    Args:
        theirs: The model that the data was calibrated for.
        ours: The model that it is to be used for.

    Raises:
        InputError: Names the first difference.
    """
    was, now = bound_to(theirs), bound_to(ours)
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            raise InputError(
                "the calibration was made for another model: "
                f"{name}: {was.get(name, 'none')} there, {now.get(name, 'none')} here",
                where="data=",
                remedy="pass the data itself, or what this model's Analysis.calibrate made of it",
            )


def bound_to(program: Program) -> dict[str, str]:
    """What of a program tells models apart: shapes of tensors, and what it takes.

    Args:
        program: The captured model.
    """
    out = {name: str(program.sizes[node]) for node, name in program.tensors.items()}
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    for number, leaf in enumerate(leaves):
        text = repr(leaf)
        if isinstance(leaf, torch.Tensor):
            text = f"{leaf.dtype} {list(leaf.shape)}"
        out[f"input {number}"] = text
    for number, node in enumerate(program.inputs):
        value = node.meta.get("val")
        if is_symbolic(value) and isinstance(value, torch.Tensor):
            out[f"input {number}"] = f"{value.dtype} {['batch', *value.shape[1:]]}"
    return {**out, "the structure of the inputs": str(spec)}
