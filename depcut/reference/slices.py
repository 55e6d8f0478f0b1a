"""The part of a tensor that stays."""

from __future__ import annotations

import torch

from depcut.axes import Indices
from depcut.axes.rows import broadcastable


def take(tensor: torch.Tensor, picked: tuple[Indices | None, ...]) -> torch.Tensor:
    """The kept indices of each dimension as a new contiguous tensor.

    Args:
        tensor: Any tensor.
        picked: For each of its dimensions None (all), a list of indices, or an array of the
            tensor's rank where they vary along other dimensions (see `depcut.axes.rows`).
    """
    out = tensor.detach()
    if any(kept is not None and kept.ndim > 1 for kept in picked):
        out = out[index_tensors(out, picked)]
    else:
        for dim, kept in enumerate(picked):
            if kept is not None:
                out = out.index_select(dim, torch.from_numpy(kept).to(tensor.device))
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def index_tensors(
    tensor: torch.Tensor, picked: tuple[Indices | None, ...]
) -> tuple[torch.Tensor, ...]:
    """Index tensors, one a dimension, that broadcast to the shape of what stays.

    Args:
        tensor: The dense tensor.
        picked: What stays of its dimensions, as for `take`.
    """
    return tuple(
        torch.from_numpy(broadcastable(kept, tensor.shape[dim], dim, tensor.ndim)).to(tensor.device)
        for dim, kept in enumerate(picked)
    )
