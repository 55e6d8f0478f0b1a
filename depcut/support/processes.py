"""Several processes that make the same calls: the one place that calls torch.distributed.

Before they exchange anything, they tell each other where they are and whether one of them has
failed, so that none waits for one that will not come.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import distributed, nn

from depcut.errors import ProcessError, listed
from depcut.support.failures import first_line
from depcut.support.sharded import fsdp_modules

P = ParamSpec("P")
R = TypeVar("R")

_SAME = (
    "make the same calls with the same model, data and options in all processes (or in one that "
    "has not initialised torch.distributed)"
)


@dataclass
class _Region:
    """Calls within which a process that fails says so to the others.

    Attributes:
        broken: Whether all know of a failure, so that nobody waits any more.
    """

    broken: bool = False


_REGION: ContextVar[_Region | None] = ContextVar("depcut processes", default=None)


@dataclass(frozen=True)
class Processes:
    """The processes that work together, as one of them sees them.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        idle: Whether what this one has to add does not count: it has no batch of its own.
    """

    rank: int = 0
    size: int = 1
    idle: bool = False

    def exchanged(self, label: str, value: Any = None) -> list[Any]:
        """What each process has to say, by rank.

        Args:
            label: Where in the work this is, the same in all processes.
            value: What this one says: plain data that JSON can hold.

        Raises:
            ProcessError: One has failed, is elsewhere in the work, or cannot be reached.
        """
        if self.size == 1:
            return [value]
        said = self._gathered({"at": label, "says": value})
        failed = {rank: each["failed"] for rank, each in enumerate(said) if "failed" in each}
        places = [each.get("at") for each in said]
        if failed:
            rank = min(failed)
            _break()
            raise ProcessError(
                f"process {rank} of {self.size} failed: {failed[rank]}",
                where=label,
                remedy=f"see the error of process {rank}",
            )
        if len(set(places)) > 1:
            _break()
            raise ProcessError(
                "the processes do different things: "
                + listed([f"process {rank}: {at}" for rank, at in enumerate(places)]),
                where=label,
                remedy=_SAME,
            )
        return [each["says"] for each in said]

    def require_same(self, label: str, described: Mapping[str, Any], remedy: str = _SAME) -> None:
        """Refuse processes that were given unlike things.

        Args:
            label: What is compared.
            described: Plain data by name, to be equal in all processes.
            remedy: What to do where it is not.

        Raises:
            ProcessError: Names the first difference.
        """
        if self.size == 1:
            return
        mine = json.loads(json.dumps(described))
        found = self.exchanged(label, mine)
        for rank, theirs in enumerate(found):
            first = found[0]
            odd = [n for n in {**first, **theirs} if first.get(n) != theirs.get(n)]
            if odd:
                _break()
                name = odd[0]
                raise ProcessError(
                    f"the processes were given unlike {label}: {name} is {first.get(name)} in "
                    f"process 0, {theirs.get(name)} in process {rank}",
                    where=label,
                    remedy=remedy,
                )

    def summed(self, label: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over the processes, equal in all of them.

        Args:
            label: What they are.
            tensors: Of the same shapes and data types in all processes; they may be changed.

        Raises:
            ProcessError: See `exchanged`.
        """
        return self._reduced(label, tensors, largest=False)

    def largest(self, label: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Largest values over the processes, as `summed`; none is negative."""
        return self._reduced(label, tensors, largest=True)

    def total(self, label: str, *numbers: float) -> list[float]:
        """Sums of numbers over the processes."""
        if self.size == 1:
            return list(numbers)
        (found,) = self.summed(label, [torch.tensor(numbers, dtype=torch.float64)])
        return [float(v) for v in found]

    def any_of(self, label: str, flags: Sequence[bool]) -> list[bool]:
        """Whether flags are set in any process."""
        if self.size == 1:
            return list(flags)
        said = self.exchanged(label, None if self.idle else list(flags))
        return [any(each) for each in zip(*(s for s in said if s is not None), strict=True)]

    def concatenated(self, label: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensors of all processes one after the other, by rank, along a dimension.

        Args:
            label: What they are.
            tensor: Of the same shape in all processes but for that dimension.
            dim: The dimension.

        Raises:
            ProcessError: See `exchanged`.
        """
        if self.size == 1:
            return tensor
        counts = self.exchanged(f"{label}, how many", 0 if self.idle else tensor.shape[dim])
        shape = list(tensor.shape)
        shape[dim] = sum(counts)
        out = tensor.new_zeros(shape)
        if not self.idle:
            start = sum(counts[: self.rank])
            out.narrow(dim, start, counts[self.rank]).copy_(tensor)
        (found,) = self.summed(label, [out])
        return found

    def of_first(self, label: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of the first process, of the same shapes and data types in all."""
        if self.size == 1 or not tensors:
            return list(tensors)
        self._agree_on(label, tensors)
        out = []
        for tensor in tensors:
            moved = tensor.detach().to(_device(), copy=True).contiguous()
            with _reaching(label):
                distributed.broadcast(moved, src=0)
            out.append(moved.to(tensor.device))
        return out

    def _reduced(
        self, label: str, tensors: Sequence[torch.Tensor], largest: bool
    ) -> list[torch.Tensor]:
        if self.size == 1 or not tensors:
            return list(tensors)
        how = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        self._agree_on(label, tensors)
        out = []
        for tensor in tensors:
            moved = torch.zeros_like(tensor) if self.idle else tensor.detach()
            moved = moved.to(_device()).contiguous()
            with _reaching(label):
                distributed.all_reduce(moved, op=how)
            out.append(moved.to(tensor.device))
        return out

    def _agree_on(self, label: str, tensors: Sequence[torch.Tensor]) -> None:
        """Make sure that all processes are here, with tensors alike."""
        kinds = [[str(t.dtype), list(t.shape)] for t in tensors]
        found = self.exchanged(label, kinds)
        odd = next((rank for rank, kind in enumerate(found) if kind != found[0]), None)
        if odd is not None:
            _break()
            raise ProcessError(
                f"process {odd} has tensors of other shapes than process 0",
                where=label,
                remedy=_SAME,
            )

    def _gathered(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """A message of each process, by rank."""
        raw = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(self.size)]
        with _reaching(str(message.get("at", "the end"))):
            distributed.all_gather(lengths, torch.tensor([len(raw)], device=_device()))
            most = max(int(n) for n in lengths)
            given = torch.zeros(most, dtype=torch.uint8, device=_device())
            given[: len(raw)] = raw.to(given.device)
            found = [torch.zeros_like(given) for _ in range(self.size)]
            distributed.all_gather(found, given)
        texts = [bytes(t[: int(n)].tolist()) for t, n in zip(found, lengths, strict=True)]
        return [json.loads(text) for text in texts]

    def say_failed(self, error: Exception) -> None:
        """Tell the others, wherever they are, that this process has failed.

        Args:
            error: With what.
        """
        self._gathered({"failed": first_line(error)})


ALONE = Processes()


def processes() -> Processes:
    """The processes of torch.distributed, where there are several; else this one alone."""
    if not distributed.is_available() or not distributed.is_initialized():
        return ALONE
    size = distributed.get_world_size()
    return Processes(distributed.get_rank(), size) if size > 1 else ALONE


@contextmanager
def together(wanted: bool = True) -> Iterator[None]:
    """A region that all processes run through, or none: the others hear of an error in one.

    Regions may be nested; the outermost one counts.

    Args:
        wanted: Whether the processes exchange anything in it.

    Raises:
        ProcessError: Another process has failed.
    """
    everyone = processes()
    if not wanted or everyone.size == 1 or _REGION.get() is not None:
        yield
        return
    region = _Region()
    token = _REGION.set(region)
    try:
        try:
            yield
        except Exception as error:
            if not region.broken:
                region.broken = True
                everyone.say_failed(error)
            raise
        everyone.exchanged("the end")
    finally:
        _REGION.reset(token)


def together_on_data(call: Callable[P, R]) -> Callable[P, R]:
    """A function that is such a region where it is passed data=, or a model in shards.

    Args:
        call: The function; data is a keyword.
    """

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        in_shards = any(fsdp_modules(each) for each in given if isinstance(each, nn.Module))
        with together(in_shards or kwargs.get("data") is not None):
            return call(*args, **kwargs)

    return wrapped


def _break() -> None:
    """Note that all processes of this region know of a failure."""
    region = _REGION.get()
    if region is not None:
        region.broken = True


@contextmanager
def _reaching(label: str) -> Iterator[None]:
    """Say by name that a process has gone."""
    try:
        yield
    except RuntimeError as error:
        _break()
        raise ProcessError(
            f"the other processes cannot be reached: {first_line(error)}",
            where=label,
            remedy="see what ended them; every process makes the same call",
        ) from error


def _device() -> torch.device:
    """Where tensors are that the processes exchange."""
    if "cpu:" in distributed.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
