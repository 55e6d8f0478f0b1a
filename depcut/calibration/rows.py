"""Datasets whose items are single examples, in batches of equal shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from depcut.errors import InputError
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

ROWS = 8  # in a batch at most


def holds_rows(data: Any) -> bool:
    """Whether the items of an iterable are single examples, without a batch dimension.

    So are those of torch's datasets, which loaders collate, and of Hugging Face's, which are known
    by their columns.

    Args:
        data: What a user passes as data.
    """
    return isinstance(data, Dataset) or (
        hasattr(data, "column_names") and hasattr(data, "with_format")
    )


def batched(data: Any, batches: int) -> list[Any]:
    """Rows of a dataset as batches; rows of other lengths are in batches of their own.

    Args:
        data: A dataset.
        batches: How many times `ROWS` rows to read at most.

    Raises:
        InputError: Rows cannot be collated.
    """
    by_shape: dict[Any, list[Any]] = {}
    for row in _rows(data, batches * ROWS):
        tensors = _as_tensors(row)
        leaves, spec = pytree.tree_flatten(tensors)
        shapes = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else type(v) for v in leaves)
        by_shape.setdefault((str(spec), shapes), []).append(tensors)
    try:
        return [
            default_collate(rows[start : start + ROWS])
            for rows in by_shape.values()
            for start in range(0, len(rows), ROWS)
        ]
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the rows of the dataset cannot be made a batch: {first_line(error)}",
            where="data=",
            remedy="pass a DataLoader with a collate_fn= of your own",
        ) from error


def _rows(data: Any, most: int) -> Iterator[Any]:
    """Rows spread evenly over a dataset, which may be sorted; the first ones of a stream."""
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        yield from islice(data, most)
        return
    count = min(len(data), most)
    for number in range(count):
        yield data[number * len(data) // count]


def _as_tensors(row: Any) -> Any:
    """A row with tensors in place of lists of numbers, as columns without a format have them."""
    if not isinstance(row, Mapping):
        return row
    return {name: _as_tensor(value) for name, value in row.items()}


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list) and value and not isinstance(value[0], str):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return value  # texts, dicts, lists of other lengths: no forward takes them as they are
    return value
