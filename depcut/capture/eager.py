"""The dense model itself on its inputs, run where a stage failed: is the mistake in the call?"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.flags import flags_as_before
from depcut.capture.inputs import device_of
from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.errors import (
    CallError,
    CaptureError,
    DepcutError,
    InputError,
    RuleError,
    VerificationError,
)
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

# Where it was passed, and what a call of the model gets: (args, kwargs).
Call = tuple[str, tuple[Any, ...], dict[str, Any]]

_BLAMING = (CaptureError, RuleError, VerificationError)  # these blame the model or its rules


def refuse_failing_call(model: nn.Module, call: Call) -> None:
    """Refuse a call that the model itself does not survive; a clone runs in evaluation mode.

    On the meta device, where much does not run that runs elsewhere, only shapes and data types are
    judged.

    Args:
        model: The dense model; it is only read.
        call: Where it comes from, and the arguments.

    Raises:
        CallError: The model raises; it quotes the error and the model's own line.
    """
    place, args, kwargs = call
    device = device_of(model)
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.detach().to(device) if isinstance(leaf, torch.Tensor) else leaf,
        cloned_arguments((args, kwargs)),
    )
    try:
        with preserved(), flags_as_before(), quiet(), torch.no_grad():
            clone(model, buffers=True)(*args, **kwargs)
    except Exception as error:
        reraise_fatal(error)
        if device.type == "meta" and isinstance(error, NotImplementedError):
            return
        raise CallError(
            f"the model itself raises {first_line(error)} on these inputs",
            where=f"{place} {user_line(error, model)}".strip(),
            remedy="pass inputs that the model takes: their number, shapes, data types and values",
        ) from error


@contextmanager
def blaming_inputs(model: nn.Module, calls: Callable[[], Iterable[Call]]) -> Iterator[None]:
    """Where the block blames the model, or fails without a word, see whether the inputs are wrong.

    Costs nothing where the block succeeds.

    Args:
        model: The dense model; it is only read.
        calls: The calls that the block relies on.

    Raises:
        CallError: The model itself raises on one of them; else what the block raised.
    """
    try:
        yield
    except Exception as error:
        reraise_fatal(error)
        blames = isinstance(error, _BLAMING) and not isinstance(error, InputError)
        if blames or not isinstance(error, DepcutError):
            for call in calls():
                refuse_failing_call(model, call)
        raise


def user_line(error: BaseException, model: nn.Module) -> str:
    """The innermost line of the traceback outside of torch; the model's class where there is none.

    Args:
        error: What was raised.
        model: The model that ran.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename
        and "/depcut/" not in frame.filename
        and frame.filename[0] != "<"
    ]
    if not frames:
        return type(model).__name__
    last = frames[-1]
    return f"{last.filename}:{last.lineno}: {last.line}"
