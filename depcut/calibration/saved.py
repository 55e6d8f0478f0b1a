"""What autograd saves of one batch for its way back: in memory up to a budget, the rest in files.

The model itself runs, not its captured graph, in which regions without gradients and functions with
a derivative of their own are ordinary operators. So what is kept is not the values at cuts but
those that the derivatives ask for, each written once and read once.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from depcut.calibration.cuts import bytes_of
from depcut.calibration.data import Calibration
from depcut.calibration.store import Store
from depcut.capture.held import held_tensors
from depcut.capture.program import Program
from depcut.errors import InputError
from depcut.graph.liveness import storages
from depcut.graph.rereadable import rereadable
from depcut.graph.resized import Resized
from depcut.support.torch_private import is_wrapper, version_of

_SMALL = 2**12  # bytes of a storage that is no file's worth
_REFUSED = "saved tensor hooks"  # in what torch.func says where it finds them
_PART = 2  # what is saved may take the memory divided by it

Storage = tuple[torch.device, int]
Saving = Callable[[], AbstractContextManager[None]]


@contextmanager
def saving(model: nn.Module, calibration: Calibration) -> Iterator[Saving]:
    """What makes the contexts in which a batch is run, so that what autograd saves has room.

    Where the values of the largest batch are well within the calibration's memory, they do nothing.

    Args:
        model: What runs; its tensors stay where they are.
        calibration: The batches, and the memory.

    Raises:
        InputError: In such a context: torch cannot keep values of this model, or this loss, apart.
    """
    budget, needed = calibration.memory // _PART, _largest(calibration)
    if needed <= budget:
        yield nullcontext
        return
    with Store(budget) as host, Store(0) as files:
        kept = Saved(host, files, held_tensors(model).values())

        @contextmanager
        def kept_apart() -> Iterator[None]:
            try:
                with kept.hooks():
                    yield
            except Exception as error:
                if _REFUSED not in str(error):
                    raise
                raise InputError(
                    "what the gradients of the loss need takes more than the memory, and cannot be "
                    "kept in files: model or loss have derivatives by torch.func",
                    where="memory=",
                    remedy=f'pass memory="{math.ceil(_PART * needed / 2**20)}MiB" or more',
                ) from error

        yield kept_apart


class _Group:
    """Saved tensors that share a storage, while something may ask for one of them.

    Attributes:
        number: Of all groups, in the order in which they were saved.
        device: Where they are.
        nbytes: Of the storage, counted against what may be held; 0: of what stays anyway.
        tensors: They, detached; once they are in a store, empty ones that are told of writes.
        versions: Of the values that were saved.
        store: That these are in.
    """

    def __init__(self, owner: Saved, number: int, device: torch.device, nbytes: int) -> None:
        self.owner, self.number, self.device, self.nbytes = owner, number, device, nbytes
        self.tensors: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.store: Store | None = None

    def __del__(self) -> None:
        self.owner.forget(self)

    def add(self, tensor: torch.Tensor) -> _Place:
        """One more tensor; its place."""
        self.tensors.append(tensor.detach())  # with its gradient it would hold itself
        self.versions.append(version_of(tensor))
        return _Place(self, len(self.tensors) - 1)

    def is_changed(self, number: int) -> bool:
        """Whether a tensor was written to after it was saved."""
        return version_of(self.tensors[number]) != self.versions[number]

    def has_changed(self) -> bool:
        """Whether any of the tensors was."""
        return any(map(self.is_changed, range(len(self.tensors))))


class _Place(NamedTuple):
    """What autograd holds in place of a tensor."""

    group: _Group
    number: int


class Saved:
    """Keeps what autograd saves; the oldest, which is needed last, is the first to leave memory.

    Args:
        host: Counts what is in the CPU's memory, and has copies of what was on other devices.
        files: Has what was in the CPU's memory.
        staying: Tensors that stay in memory whatever is saved.
    """

    def __init__(self, host: Store, files: Store, staying: Iterable[torch.Tensor]) -> None:
        self.host, self.files = host, files
        self._staying = {_storage(t) for t in staying if _has_storage(t)}
        self._in_memory: dict[int, weakref.ref[_Group]] = {}
        self._at: dict[Storage, int] = {}  # number of the group in memory
        self._count = 0
        self._oldest: dict[torch.device, int] = {}  # number of the first that may be in memory
        self._held: dict[torch.device, int] = {}
        self._room: dict[torch.device, int] = {}
        self._read: tuple[int, list[torch.Tensor]] = (-1, [])  # the group that was last asked for
        self._lock = threading.RLock()  # each device has a thread for its derivatives

    def hooks(self) -> AbstractContextManager[None]:
        """A context; what is computed in it has its saved tensors kept here."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def forget(self, group: _Group) -> None:
        """Called when nothing can ask for a group any more."""
        with self._lock:
            if group.store is not None:
                group.store.drop(group.number)
            elif group.nbytes:
                self._leaves_memory(group)
            if self._read[0] == group.number:
                self._read = (-1, [])

    def _pack(self, tensor: torch.Tensor) -> _Place:
        with self._lock:
            place = self._group_of(tensor).add(tensor)
            self._make_room(tensor.device)
            return place

    def _unpack(self, place: _Place) -> torch.Tensor:
        group, number = place
        with self._lock:
            if group.is_changed(number):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation"
                )
            if group.store is None:
                return group.tensors[number]
            if self._read[0] != group.number:
                self._read = (group.number, group.store.look(group.number))
            return self._read[1][number].to(group.device)

    def _group_of(self, tensor: torch.Tensor) -> _Group:
        """The group that a tensor belongs to; a new one for a storage that is not in memory yet."""
        place = _storage(tensor) if _has_storage(tensor) else None
        known = self._in_memory.get(self._at.get(place, -1)) if place is not None else None
        group = known() if known is not None else None
        if group is not None:
            return group
        nbytes = 0 if place is None else tensor.untyped_storage().nbytes()
        if place is None or place in self._staying or nbytes < _SMALL:
            return _Group(self, -1, tensor.device, 0)
        group = _Group(self, self._count, tensor.device, nbytes)
        self._in_memory[self._count] = weakref.ref(group)
        self._at[place] = self._count
        self._count += 1
        self._hold(group.device, nbytes)
        return group

    def _leaves_memory(self, group: _Group) -> None:
        """Note that a group is not held in memory any more."""
        del self._in_memory[group.number]
        self._hold(group.device, -group.nbytes)

    def _hold(self, device: torch.device, nbytes: int) -> None:
        if device.type == "cpu":
            self.host.reserve(nbytes)
        else:
            self._held[device] = self._held.get(device, 0) + nbytes

    def _make_room(self, device: torch.device) -> None:
        """Put what was saved first into a store, as long as too much is held of a device."""
        number = self._oldest.get(device, 0)
        while number < self._count and self._is_full(device):
            known = self._in_memory.get(number)
            group = known() if known is not None else None
            # What was written to since it was saved cannot be used any more.
            if group is not None and group.device == device and not group.has_changed():
                self._put(group)
            number += 1
        self._oldest[device] = number

    def _is_full(self, device: torch.device) -> bool:
        if device.type == "cpu":
            return self.host.held > self.host.budget
        if device not in self._room:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            self._room[device] = min(free // 2, self.host.budget)
        return self._held.get(device, 0) > self._room[device]

    def _put(self, group: _Group) -> None:
        # What follows may write to the CPU's memory, of which only a file is a copy.
        store = self.files if group.device.type == "cpu" else self.host
        store.put(group.number, [t.cpu() for t in group.tensors])
        self._leaves_memory(group)
        group.store = store
        for tensor in group.tensors:
            tensor.data = tensor.new_empty(0)  # the count of writes stays that of the model's


def _has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor is plain memory."""
    plain = tensor.layout is torch.strided and not tensor.is_meta and not is_wrapper(tensor)
    return plain and tensor.numel() > 0 and not tensor.is_quantized


def _storage(tensor: torch.Tensor) -> Storage:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _largest(calibration: Calibration) -> int:
    """Bytes of all that the captured graph computes of a batch, of the one with the most."""
    program = calibration.program
    nodes, asked = program.graph.graph.nodes, rereadable(program)
    cost = {n: bytes_of(n) for n, root in storages(nodes).items() if root is n and n not in asked}
    by_sizes: dict[Resized | None, tuple[int, int]] = {}  # rows, and bytes of the captured rows
    for batch in calibration.batches:
        rows, found = by_sizes.get(batch.resized, (0, 0))
        found = found or sum(int(c * _larger(program, batch.resized, n)) for n, c in cost.items())
        by_sizes[batch.resized] = max(rows, batch.rows), found
    return max(rows * found // max(program.batch, 1) for rows, found in by_sizes.values())


def _larger(program: Program, resized: Resized | None, node: fx.Node) -> float:
    """How many times as large a node's value is as in the captured example, for as many rows."""
    if resized is None:
        return 1
    return _elements(resized.sizes.get(node)) / max(_elements(program.sizes.get(node)), 1)


def _elements(sizes: Any) -> int:
    """Elements of a tensor of some sizes, or of a list of them."""
    if isinstance(sizes, list):
        return sum(map(_elements, sizes))
    return math.prod(sizes) if sizes is not None else 0
