"""Nested values as runs of bytes and back; tensors that share memory share it afterwards, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depcut.support.torch_private import pytree

_ALIGNED = 64  # bytes at which a run begins, and a multiple of every element's size
_LOOSE = 2  # a storage this many times as large as what is used of it is not kept


@dataclass(frozen=True)
class View:
    """Where a tensor lies in a run of bytes."""

    run: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """Nested values whose tensors are views of runs of bytes.

    Attributes:
        runs: Tensors of bytes, wherever they are.
        device: Of each run, where the values were.
        leaves: Values that are no tensors, or `View`s.
        spec: How they are nested.
    """

    runs: tuple[torch.Tensor, ...]
    devices: tuple[torch.device, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return sum(run.numel() for run in self.runs)

    def unpacked(self, runs: Sequence[torch.Tensor] | None = None) -> Any:
        """The values.

        Args:
            runs: The same bytes, moved elsewhere or read from a file.
        """
        given = self.runs if runs is None else runs
        there = [run.to(d) for run, d in zip(given, self.devices, strict=True)]
        leaves = [_shown(there[v.run], v) if isinstance(v, View) else v for v in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


def packed(tree: Any) -> Packed:
    """Nested values as runs of bytes; nothing is copied but what is a small part of its storage.

    Tensors that are not strided, or on no device, stay what they are among the leaves.

    Args:
        tree: Lists, tuples and dicts of tensors and anything else.
    """
    leaves, spec = pytree.tree_flatten(tree)
    spans: dict[tuple[torch.device, int], tuple[int, int]] = {}
    for leaf in leaves:
        if _has_bytes(leaf):
            key, (begin, end) = _storage(leaf), _span(leaf)
            known = spans.get(key, (begin, end))
            spans[key] = (min(known[0], begin), max(known[1], end))
    order = {key: i for i, key in enumerate(spans)}
    runs: dict[int, torch.Tensor] = {}
    out: list[Any] = []
    for leaf in leaves:
        if not _has_bytes(leaf):
            out.append(leaf)
            continue
        key = _storage(leaf)
        begin, end = spans[key]
        if order[key] not in runs:
            runs[order[key]] = _run(leaf, begin, end)
        offset = leaf.storage_offset() - begin // leaf.element_size()
        out.append(View(order[key], leaf.dtype, offset, leaf.shape, leaf.stride()))
    listed = tuple(runs[i] for i in range(len(runs)))
    return Packed(listed, tuple(run.device for run in listed), tuple(out), spec)


def _has_bytes(leaf: Any) -> bool:
    plain = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta
    if not plain or not leaf.numel() or leaf.is_quantized:
        return False
    return not (leaf.is_conj() or leaf.is_neg())


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, aligned, and the one past the last that a tensor uses of its storage."""
    first = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(first + sum((size - 1) * stride for size, stride in steps))
    size = tensor.element_size()
    return int(first * size // _ALIGNED * _ALIGNED), (last + 1) * size


def _run(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Bytes of a tensor's storage, as a tensor that shares it unless it is much larger."""
    storage = tensor.untyped_storage()
    run = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    run.set_(storage, begin, (end - begin,), (1,))
    return run.clone() if storage.nbytes() > _LOOSE * (end - begin) else run


def _shown(run: torch.Tensor, view: View) -> torch.Tensor:
    """A tensor that lies in a run of bytes."""
    storage = run.untyped_storage()
    begin = run.storage_offset() // view.dtype.itemsize
    out = torch.empty(0, dtype=view.dtype, device=run.device)
    return out.set_(storage, begin + view.offset, view.size, view.stride)


def read_runs(path: Path, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The runs of bytes in a file, each where torch puts tensors: at a multiple of 64 bytes.

    Args:
        path: The file.
        sizes: Of each run.

    Raises:
        OSError: It cannot be read.
        ValueError: It is shorter than it was.
    """
    out = []
    with path.open("rb") as file:
        for size in sizes:
            run = torch.empty(size, dtype=torch.uint8)
            if file.readinto(run.numpy().data) != size:
                raise ValueError(f"{path.name} is shorter than it was")
            out.append(run)
    return out
