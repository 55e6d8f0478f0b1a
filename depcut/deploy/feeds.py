"""A user's data as what an ONNX graph takes: a dictionary of arrays a batch, and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from depcut.calibration.data import Calibration, read_items
from depcut.calibration.items import Items
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
        items = [(data.arguments(batch), batch.target) for batch in data.batches]
        values = [(dict(kwargs) or args, target) for (args, kwargs), target in items]
    else:
        apart = Items(model, pairs=False)
        taken = [apart.taken_apart(item) for item in read_items(data, batches)]
        values = [(one.inputs, one.target) for one in taken]
    return [
        _run(model, session, inputs, target, f"data, item {number}")
        for number, (inputs, target) in enumerate(values)
    ]


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
