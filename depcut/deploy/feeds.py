"""A user's data as what an ONNX graph takes: a dictionary of arrays a batch, and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from depcut.calibration.data import Calibration, read_items
from depcut.calibration.items import Items
from depcut.calibration.self_made import self_made
from depcut.capture.capture import capture
from depcut.capture.refusals import signature_of
from depcut.coupling.infer import infer_coupling
from depcut.deploy.runtime import Array, bind_inputs, session_feeds
from depcut.errors import DepcutError, InputError
from depcut.support.failures import first_line, reraise_fatal

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True, eq=False)
class Fed:
    """One batch that a graph has run on.

    Attributes:
        feeds: Arrays by the names of the graph's inputs.
        outputs: What the float graph computes of them.
        target: What a metric gets beside the output.
    """

    feeds: Mapping[str, Array]
    outputs: tuple[Array, ...]
    target: Any = None


def fed(model: nn.Module, session: InferenceSession, data: Any, batches: int) -> list[Fed]:
    """Batches of a user's data, run in a float session.

    Args:
        model: What the graph was made from; its signature is read.
        session: The float graph.
        data: Any iterable of what the model takes (tensor, tuple, dict), or of (input, target)
            pairs; or a `Calibration`.
        batches: How many items to read at most.

    Raises:
        InputError: The data cannot be read, or the graph does not take it.
    """
    if isinstance(data, Calibration):
        values = [
            (call_of(model, data, one), data.batches[one].target)
            for one in range(len(data.batches))
        ]
    else:
        apart = Items(model, pairs=False)
        taken = [apart.taken_apart(item) for item in read_items(data, batches)]
        values = [(one.inputs, one.target) for one in taken]
    return [
        _run(model, session, inputs, target, f"data, item {number}")
        for number, (inputs, target) in enumerate(values)
    ]


def call_of(model: nn.Module, data: Calibration, number: int) -> Any:
    """What a model takes of a batch of read data: positional or keyword arguments.

    Args:
        model: The model; its signature is read.
        data: The data.
        number: Of the batch.
    """
    args, kwargs = data.arguments(data.batches[number])
    if args and kwargs:
        return dict(signature_of(model).bind(*args, **kwargs).arguments)
    return kwargs or args


def made_data(model: nn.Module, inputs: Any) -> Calibration:
    """Inputs made from what a trained model knows of them.

    Args:
        model: The model; it is only read.
        inputs: Example inputs, or None to infer them.

    Raises:
        InputError: None can be made of it.
        CaptureError: The model cannot be captured.
    """
    found = self_made(infer_coupling(capture(model, inputs)), model)
    if found.calibration is None:
        raise InputError(
            f"no data can be made from the model: {found.note.partition(';')[0]}",
            where='data="auto"',
            remedy="pass batches of what the model takes, such as a DataLoader",
        )
    return found.calibration


def _run(model: nn.Module, session: InferenceSession, inputs: Any, target: Any, place: str) -> Fed:
    """One batch; the graph has taken it."""
    try:
        feeds = session_feeds(session, bind_inputs(model, inputs).arguments)
    except DepcutError as error:
        raise InputError(error.what, where=place, remedy=error.remedy) from error
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(
                f"{int((~np.isfinite(array)).sum())} of the {array.size} values of {name} are NaN "
                "or infinite",
                where=place,
                remedy="clean the data; ranges of it would mean nothing",
            )
    try:
        outputs = session.run(None, dict(feeds))
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the exported graph does not take it: {first_line(error)}",
            where=place,
            remedy="pass batches of the kinds and sizes of inputs=",
        ) from error
    return Fed(feeds, tuple(outputs), target)
