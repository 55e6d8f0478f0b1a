"""Batches of other lengths or image sizes than the captured ones: the graph's numbers for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from depcut.calibration.reader import Batch, Reader
from depcut.capture.capture import captured_again, hint
from depcut.capture.eager import refuse_failing_call
from depcut.capture.inputs import Call
from depcut.errors import CallError, CaptureError, InputError
from depcut.graph.resized import Resized, resize
from depcut.support.torch_private import pytree


def with_numbers(reader: Reader, model: nn.Module, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches, each with the numbers of the captured graph for its sizes.

    The model is captured once more for every size that is not the captured one.

    Args:
        reader: Of the captured model.
        model: The model; it is only read.
        batches: Of its structure.

    Raises:
        InputError: The model does not take a batch, or its code takes another course there.
    """
    known: dict[Any, Resized | None] = {reader.captured_sizes: None}
    out = []
    for number, batch in enumerate(batches):
        sizes = reader.sizes(batch)
        if sizes not in known:
            known[sizes] = _numbers(reader, model, batch, number)
        out.append(replace(batch, resized=known[sizes]))
    return tuple(out)


def _numbers(reader: Reader, model: nn.Module, batch: Batch, number: int) -> Resized:
    call = _call(reader, batch)
    try:
        refuse_failing_call(model, ("", batch.args, batch.kwargs))
        found = resize(reader.program, captured_again(model, call, reader.program))
    except (CallError, CaptureError) as error:
        found = error.what
    if isinstance(found, Resized):
        return found
    raise InputError(
        f"{_difference(reader, batch)}; {found}",
        where=f"data, item {number}",
        remedy="pad or cut all items to one size, and pass inputs= of that size",
    )


def _call(reader: Reader, batch: Batch) -> Call:
    """The arguments of a batch with as many examples as the captured call has."""
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
    for i, (leaf, rows) in enumerate(zip(leaves, reader.rows, strict=True)):
        if not isinstance(leaf, torch.Tensor):
            continue
        leaves[i] = leaf.detach().to(reader.device)
        if rows:
            count = hint(reader.program.inputs[i].meta["val"].shape[0])
            leaves[i] = leaves[i][torch.arange(count, device=reader.device) % len(leaf)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _difference(reader: Reader, batch: Batch) -> str:
    """Which input has another shape than the captured one."""
    leaves = pytree.tree_leaves((batch.args, batch.kwargs))
    here, there = reader.sizes(batch), reader.captured_sizes
    i = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return (
        f"{reader.names[i]} has shape {tuple(leaves[i].shape)}, the model was captured with "
        f"{tuple(reader.expected[i].shape)}"
    )
