"""How far a smaller model's outputs are from the dense one's, for the adaptive learning rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from depcut.calibration.data import moved
from depcut.calibration.reader import Batch
from depcut.capture.clone import clone
from depcut.capture.inputs import device_of
from depcut.capture.plain import check_whole
from depcut.capture.random_state import preserved
from depcut.errors import InputError
from depcut.support.checks import check_integer
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree
from depcut.training.batches import open_loader
from depcut.training.streams import DATA

BATCHES = 4  # that are read unless told otherwise


def output_distance(
    dense: nn.Module, slim: nn.Module, data: Iterable[Any], batches: int = BATCHES
) -> float:
    """Distance of the outputs, relative to how much the dense model's vary.

    d_f = sqrt(sum ||f(x) - f_p(x)||^2 / sum ||f(x) - m||^2) over all examples, m being the mean of
    the dense outputs over their batch. It is 0 where nothing was lost, and about 1 where the
    outputs say as little as their mean. Unlike `relative_distance`, it sees what compensation has
    repaired; `retrain(schedule="auto")` scales the peak rate by the smaller of the two.

    Args:
        dense: The dense model; it and the other one run in evaluation mode, each on its device.
        slim: The smaller model.
        data: An iterable of what the models take, or of (input, target) pairs.
        batches: How many items of it to read at most.

    Raises:
        InputError: The data is no such iterable, or empty, or does not fit the models.
    """
    dense, slim = check_whole(dense, "dense"), check_whole(slim, "slim")
    batches = check_integer(batches, "batches", 1, sys.maxsize)
    loader = open_loader(data, "data=", slim, pairs=False)
    return distance_over(dense, slim, islice(loader.read(0, DATA, 0), batches))


@preserved()
def distance_over(dense: nn.Module, slim: nn.Module, batches: Iterable[Batch]) -> float:
    """`output_distance` on batches that were read already.

    A measure of quality: other than in checks (`depcut.support.closeness`), squares are added up,
    and the scale is how much the dense outputs vary, not how large they are.

    Args:
        dense: The dense model.
        slim: The smaller one.
        batches: At least one.

    Raises:
        InputError: A model does not run on them, or their outputs have nothing in common.
    """
    missed = spread = 0.0
    for batch in batches:
        theirs, mine = _outputs(dense, batch, "dense="), _outputs(slim, batch, "the smaller model")
        # others are e.g. keys and values kept for generation, which are narrower
        alike = [(a, b) for a, b in zip(theirs, mine, strict=False) if a.shape == b.shape]
        if not alike:
            raise InputError(
                f"the dense model's outputs have the shapes {_shapes(theirs)}, the smaller one's "
                f"{_shapes(mine)}",
                where="dense=",
                remedy="pass the model that was pruned",
            )
        for wanted, got in alike:
            missed += float((wanted - got).square().sum())
            center = wanted.mean(0, keepdim=True) if len(wanted) > 1 else 0.0
            spread += float((wanted - center).square().sum())
    return math.sqrt(missed / spread) if spread else float(missed > 0)


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch, place: str) -> list[torch.Tensor]:
    """The floating-point outputs, [batch, ...], in double precision on the CPU."""
    args, kwargs = moved((batch.args, batch.kwargs), device_of(model))
    try:
        leaves = pytree.tree_leaves(clone(model, buffers=True)(*args, **kwargs))
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the model fails on the training data: {first_line(error)}",
            where=place,
            remedy="pass the model that was pruned, and data that it takes",
        ) from error
    return [
        leaf.detach().double().cpu()
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim
    ]


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors) or "none"
