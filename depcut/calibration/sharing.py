"""Which batches of the data each of several processes takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from depcut.capture.held import held_tensors
from depcut.errors import InputError
from depcut.support.accelerate_private import shares_out
from depcut.support.failures import shown
from depcut.support.processes import ALONE, Processes, processes

_REMEDY = (
    "pass the same items in the same order in all processes (a loader that shuffles with the same "
    "seed), or a DataLoader with a DistributedSampler"
)


@dataclass(frozen=True)
class Share:
    """What one process takes of all batches.

    Attributes:
        everyone: The processes; this one is idle where the only batch it has is there for its
            shapes alone.
        numbers: Of its batches among all, ascending.
        total: How many batches all processes have, each counted once.
        rows: Examples in these.
    """

    everyone: Processes = ALONE
    numbers: tuple[int, ...] = ()
    total: int = 0
    rows: int = 0

    def with_rows(self, rows: int) -> Share:
        """The share with the examples of all processes counted.

        Args:
            rows: Examples in the batches of this one.
        """
        (counted,) = self.everyone.total("examples", rows)
        return replace(self, rows=round(counted))


ALL_HERE = Share()


class OwnItems(list[Any]):
    """Items of a loader that gives each process items of its own."""


def own_items(data: Any) -> bool:
    """Whether data gives each process items of its own: torch's sampler, or accelerate's loader.

    Args:
        data: What a user passes as data.
    """
    if isinstance(data, OwnItems):
        return True
    if not isinstance(data, DataLoader) or processes().size == 1:
        return False
    samplers = (data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
    return shares_out(data) or any(isinstance(s, DistributedSampler) for s in samplers)


def most_to_read(batches: int, own: bool) -> int:
    """How many items this process reads at most, one at least.

    Args:
        batches: How many all processes take together.
        own: Whether each reads items of its own.
    """
    everyone = processes()
    return max(1, len(range(everyone.rank, batches, everyone.size))) if own else batches


def shared_out(items: list[Any], batches: int) -> tuple[list[Any], Share]:
    """The items of this process, and which they are.

    Process r of n takes items r, r + n, ... of the same data; where each reads items of its own, it
    takes all it has read. One that has none takes one that does not count.

    Args:
        items: What was read; at least one.
        batches: How many items all processes take together.

    Raises:
        ProcessError: The processes have read other data.
    """
    everyone = processes()
    rank, size = everyone.rank, everyone.size
    if size == 1:
        return items, Share(ALONE, tuple(range(len(items))), len(items))
    own = isinstance(items, OwnItems)
    contents = {} if own else {f"item {i}": _digest(item) for i, item in enumerate(items)}
    given = {"a sampler that gives each process its own share": own, **contents}
    everyone.require_same("data", given, _REMEDY)
    if own:
        idle = rank >= batches
        (total,) = everyone.total("batches", 0 if idle else len(items))
        numbers = tuple(range(rank, rank + size * len(items), size))
        return list(items), Share(replace(everyone, idle=idle), numbers, round(total))
    numbers = tuple(range(rank, len(items), size))
    everyone = replace(everyone, idle=not numbers)
    numbers = numbers or (0,)
    return [items[n] for n in numbers], Share(everyone, numbers, len(items))


def described(model: nn.Module) -> dict[str, str]:
    """What tells two models apart: a checksum of each tensor.

    Args:
        model: The model.
    """
    return {name: _digest(tensor) for name, tensor in held_tensors(model).items()}


def _digest(value: Any) -> str:
    """A checksum of nested values."""
    checksum = 0
    for part in _parts(value):
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        whole = value.layout is torch.strided and not value.is_meta and value.numel()
        if whole and type(value) in (torch.Tensor, nn.Parameter, nn.Buffer):
            flat = value.detach().cpu().contiguous().flatten()
            yield memoryview(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield shown(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, int | float | str | bytes | None):
        yield shown(value).encode()
    else:
        yield type(value).__qualname__.encode()


def refuse_measured(everyone: Processes, of: str) -> None:
    """Refuse a budget that each process would measure for itself, with another result.

    Args:
        everyone: The processes.
        of: What is budgeted.

    Raises:
        InputError: It is the time, and there are several.
    """
    if everyone.size > 1 and of == "latency":
        raise InputError(
            f"time is measured, and would be by {everyone.size} processes at once",
            where='of="latency"',
            remedy="make the plan in one process, save it, and apply it in all: Plan.load(path)",
        )
