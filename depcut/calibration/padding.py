"""Padding: positions that a mask among the inputs takes out are no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# transformers, and what is built on it, call the mask of a batch's padding so.
_MASK = "attention_mask"


def valid_positions(names: Sequence[str], leaves: Sequence[Any]) -> torch.Tensor | None:
    """Flags (examples, length) of the positions that are no padding.

    Args:
        names: Of the flat inputs of a batch.
        leaves: The flat inputs.

    Returns:
        None where nothing is padded, or where examples cannot be told from positions.
    """
    mask = next((v for n, v in zip(names, leaves, strict=True) if n == _MASK), None)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    flags = mask != 0
    square = mask.shape[0] == mask.shape[1]
    return None if square or bool(flags.all()) or not bool(flags.any()) else flags


def without_padding(
    valid: torch.Tensor | None, value: torch.Tensor, *vectors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Vectors of an activation, without those of padded positions.

    Args:
        valid: Flags (examples, length), or None.
        value: The activation; where it is no (examples, length, ...), all vectors count.
        *vectors: (blocks, vectors, ...), in the order of the activation's positions.
    """
    if valid is None or value.shape[:-1] != valid.shape:
        return vectors
    flags = valid.flatten().to(value.device)
    return tuple(v[:, flags] if v.shape[1] == len(flags) else v for v in vectors)
