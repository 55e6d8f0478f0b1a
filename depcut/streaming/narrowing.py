"""The kept part of a checkpoint's tensors, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from depcut.axes import Indices
from depcut.plan.keep import Keep
from depcut.reference.slices import take
from depcut.streaming.source import Source
from depcut.support.weights import Stored

BLOCK = 2**25  # bytes of a block that is read

Picked = tuple[Indices | None, ...]


def picks(keep: Keep, names: tuple[str, ...]) -> dict[str, Picked]:
    """Kept indices of the tensors that a checkpoint holds, of those that narrow.

    Args:
        keep: What stays.
        names: Of the tensors, as the checkpoint has them.
    """
    known = keep.coupling.program.aliases
    out = {}
    for name in names:
        same = (name, *known.get(name, ()))
        found = next((keep.tensors[other] for other in same if other in keep.tensors), None)
        if found is not None:
            out[name] = found
    return out


def stored(source: Source, name: str, picked: Picked | None) -> Stored:
    """What is written of a tensor.

    Args:
        source: The checkpoint.
        name: Of the tensor.
        picked: Kept indices of its dimensions; None: it stays whole.
    """
    entry = source.entries[name]
    kept = picked or (None,) * len(entry.shape)
    shape = tuple(
        size if chosen is None else chosen.shape[0] if chosen.ndim == 1 else chosen.shape[dim]
        for dim, (size, chosen) in enumerate(zip(entry.shape, kept, strict=True))
    )
    return Stored(entry.dtype, entry.bytes // max(1, entry.elements), shape)


def parts(source: Source, picked: Mapping[str, Picked], name: str) -> Iterator[torch.Tensor]:
    """The kept elements of a tensor in order, block by block.

    Args:
        source: The checkpoint.
        picked: Kept indices by name, of tensors that narrow.
        name: Of the tensor.
    """
    entry, chosen = source.entries[name], picked.get(name)
    varying = chosen is not None and any(p is not None and p.ndim > 1 for p in chosen)
    if not entry.shape or varying:
        whole = source[name]
        yield whole if chosen is None else take(whole, chosen)
        return
    rows = entry.shape[0]
    step = max(1, BLOCK * rows // max(1, entry.bytes))
    first, *rest = chosen or (None,) * len(entry.shape)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        inside = None if first is None else first[(first >= start) & (first < end)] - start
        if inside is not None and not len(inside):
            continue
        yield take(source.rows(name, start, end), (inside, *rest))
