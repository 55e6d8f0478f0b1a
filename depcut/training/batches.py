"""A user's loader as batches of (arguments, target), in the same order every time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from depcut.calibration.data import inputs_of
from depcut.calibration.reader import Batch
from depcut.capture.inputs import arguments
from depcut.errors import InputError
from depcut.support.checks import check_items
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import pytree
from depcut.training.streams import Stream, seed_of

_PAIRS = "pass a DataLoader or a list of (input, target) pairs"


@dataclass(frozen=True)
class Loader:
    """A loader, its length, and which of its batches are this process's.

    Attributes:
        data: The user's iterable.
        place: What it was passed as.
        model: Whose arguments the items hold.
        batches: Items of one pass.
        pairs: Whether an item of two is always (input, target).
        rank: Number of this process.
        world: Number of processes.
    """

    data: Iterable[Any]
    place: str
    model: nn.Module
    batches: int
    pairs: bool
    rank: int = 0
    world: int = 1

    @property
    def own(self) -> int:
        """Batches that each process gets; where they do not come out even, some are used twice."""
        return self.batches if self._sharded else -(-self.batches // self.world)

    @property
    def _sharded(self) -> bool:
        """Whether the loader gives each process batches of its own already."""
        return any(isinstance(part, DistributedSampler) for part in _parts(self.data))

    def read(self, *numbers: int, epoch: int = 0, even: bool = True) -> Iterator[Batch]:
        """The batches of one pass, drawn from a random stream of its own.

        Args:
            *numbers: Seeds of the stream; the same on every process.
            epoch: Told to the loader's sampler, if it asks for it.
            even: Whether all processes must get equally many.
        """
        stream = Stream(*numbers)
        for part in _parts(self.data):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed_of(*numbers))
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        with stream.running():
            items = iter(self.data)
        for item in islice(self._mine(_within(stream, items), even), self.own):
            yield self._batch(item)

    def _mine(self, items: Iterator[Any], even: bool) -> Iterator[Any]:
        if self.world == 1 or self._sharded:
            yield from items
            return
        while group := list(islice(items, self.world)):
            if even or self.rank < len(group):
                yield group[self.rank % len(group)]

    def _batch(self, item: Any) -> Batch:
        item = dict(item) if isinstance(item, Mapping) else item
        inputs = inputs_of(item, self.model, self.pairs)
        pair = isinstance(item, tuple | list) and len(item) == 2 and inputs is item[0]
        args, kwargs = arguments(inputs, self.place)
        if kwargs:
            takes = inspect.signature(self.model.forward).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                kwargs = {name: value for name, value in kwargs.items() if name in takes}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        rows = next((len(t) for t in tensors if t.ndim), 1)
        return Batch(args, kwargs, item[1] if pair else item, rows)


def _within(stream: Stream, items: Iterator[Any]) -> Iterator[Any]:
    end = object()
    while True:
        with stream.running():
            item = next(items, end)
        if item is end:
            return
        yield item


def _parts(data: Any) -> list[Any]:
    """A loader and its parts that may hold the order: samplers and the dataset."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = [
        data,
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(data, "dataset", None),
    ]
    return list({id(part): part for part in parts if part is not None}.values())


def open_loader(
    data: Any, place: str, model: nn.Module, *, pairs: bool, rank: int = 0, world: int = 1
) -> Loader:
    """Check a user's loader, and count it.

    Args:
        data: Any iterable that can be read once an epoch.
        place: What it was passed as, for messages.
        model: Whose arguments the items hold.
        pairs: Whether an item of two is always (input, target).
        rank: Number of this process.
        world: Number of processes.

    Raises:
        InputError: It is no such iterable, or empty.
    """
    if isinstance(data, torch.Tensor | str | Mapping) or not isinstance(data, Iterable):
        raise InputError(f"the loader is a {type(data).__name__}", where=place, remedy=_PAIRS)
    if isinstance(data, Iterator):
        raise InputError(
            f"the loader is a {type(data).__name__}, which can be read only once",
            where=place,
            remedy=f"{_PAIRS}, which every epoch reads again",
        )
    try:
        count = len(data)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001  (a loader may have no length, or not know it)
        reraise_fatal(error)
        count = len(check_items(data, place.removesuffix("="), _PAIRS))
    if not count:
        raise InputError("the loader is empty", where=place, remedy=_PAIRS)
    return Loader(data, place, model, count, pairs, rank, world)
