"""Tensors of a model in two files: its state, and what its state leaves out.

A tensor is stored once, however many modules hold it, and so is memory that several tensors share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depcut.errors import InputError
from depcut.rewrite.copying import like
from depcut.support.torch_private import is_wrapper
from depcut.support.weights import open_tensors, write_tensors

STATE, REST = "weights.safetensors", "tensors.safetensors"

# What safetensors has a name for; others are stored as bytes.
_STORED = frozenset(
    """
    float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2
    """.split()
)


class TensorTable:
    """The tensors of a model by number.

    Attributes:
        slots: Of each tensor: its `key` in a `file`, `dtype` and `shape`, the `strides` where they
            are not those of a contiguous one, whether it is a `parameter` and `requires_grad`.
    """

    def __init__(self) -> None:
        self.slots: list[dict[str, Any]] = []
        self._tensors: dict[str, dict[str, Tensor]] = {STATE: {}, REST: {}}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id stays one tensor's as long as that lives
        self._memory: dict[Any, tuple[str, str]] = {}

    def add(self, tensor: Tensor, name: str, in_state: bool) -> int:
        """The number of a tensor.

        Args:
            tensor: The tensor.
            name: Its qualified name.
            in_state: Whether the model's state has it.

        Raises:
            InputError: It cannot be stored.
        """
        known = self._numbers.get(id(tensor))
        if known is not None:
            return known
        _check(tensor, name)
        self._numbers[id(tensor)] = len(self.slots)
        self._alive.append(tensor)
        value = tensor.detach()
        file = STATE if in_state else REST
        key = name
        while key in self._tensors[file]:
            key += "'"
        place = _place(value) if value.numel() else ("empty", id(tensor))
        file, key = self._memory.setdefault(place, (file, key))
        self._tensors[file].setdefault(key, value)
        slot = {
            "key": key,
            "file": file,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad and tensor.is_leaf,
        }
        if not value.is_contiguous() and _is_dense(value.shape, value.stride()):
            slot["strides"] = list(value.stride())
        self.slots.append(slot)
        return len(self.slots) - 1

    def write(self, folder: Path) -> None:
        """Write the files; that of what the state leaves out only if there is anything.

        Args:
            folder: Where; it exists.

        Raises:
            InputError: A tensor has no values.
            DepcutError: A file cannot be written.
        """
        for file, tensors in self._tensors.items():
            if tensors or file == STATE:
                write_tensors({k: _stored(t) for k, t in tensors.items()}, folder / file)


def _place(value: Tensor) -> tuple[Any, ...]:
    """What two tensors share that are the same part of the same memory."""
    memory = (value.device, value.untyped_storage().data_ptr(), value.storage_offset())
    return *memory, value.dtype, tuple(value.shape), value.stride()


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides are those of a permuted contiguous tensor."""
    pairs = sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def _check(tensor: Tensor, name: str) -> None:
    problem = None
    if tensor.is_meta:
        problem = "has no values: it is on the meta device"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"has the layout {tensor.layout}"
    elif tensor.is_quantized or is_wrapper(tensor):
        problem = f"is a {type(tensor).__name__} of {tensor.dtype}"
    if problem:
        raise InputError(
            f"a tensor cannot be stored: it {problem}",
            where=name,
            remedy="load its weights first, or make it a dense tensor",
        )


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as safetensors takes it: contiguous, on the CPU, of a type that it knows."""
    value = tensor.cpu().contiguous()
    if str(value.dtype).removeprefix("torch.") in _STORED:
        return value
    return value.reshape(-1).view(torch.uint8)


class Loaded:
    """The tensors of a folder, read when they are asked for.

    Args:
        slots: As `TensorTable.slots`.
        folder: Where their files are; None: tensors on the meta device are made.
        device: Where they go.

    Raises:
        ValueError: The slots are damaged.
    """

    def __init__(
        self, slots: list[dict[str, Any]], folder: Path | None, device: torch.device
    ) -> None:
        self.slots, self._device = slots, device
        self._made: dict[int, Tensor] = {}
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._files: dict[str, Any] = {}
        self._names: dict[str, frozenset[str]] = {}
        for file in sorted({slot["file"] for slot in slots}) if folder is not None else ():
            if file not in (STATE, REST):
                raise ValueError(f"tensors stand in {file!r}")
            self._files[file] = open_tensors(folder / file)
            self._names[file] = frozenset(self._files[file].keys())
        self.is_meta = folder is None

    def get(self, number: int, built: Tensor | None) -> Tensor:
        """A tensor by number, the same one each time.

        Args:
            number: Of its slot.
            built: What the dense model has in its place, if anything.
        """
        if number not in self._made:
            slot = self.slots[number]
            value = self._value(slot)
            needs = bool(slot["requires_grad"])
            if isinstance(built, nn.Parameter) == slot["parameter"] and built is not None:
                made = like(built, value)
                made.requires_grad_(needs)
            elif slot["parameter"]:
                made = nn.Parameter(value, requires_grad=needs)
            else:
                made = value.requires_grad_(needs)
            self._made[number] = made
        return self._made[number]

    def _value(self, slot: dict[str, Any]) -> Tensor:
        where = slot["file"], slot["key"]
        if where not in self._memory:
            dtype = getattr(torch, slot["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{slot['key']} has the data type {slot['dtype']}")
            shape, strides = tuple(slot["shape"]), slot.get("strides")
            device = torch.device("meta") if self.is_meta else self._device
            if strides is None:
                value = torch.empty(shape, dtype=dtype, device=device)
            elif _is_dense(shape, strides):
                value = torch.empty_strided(shape, tuple(strides), dtype=dtype, device=device)
            else:
                raise ValueError(f"{slot['key']} has the strides {strides}")
            if not self.is_meta:
                if where[1] not in self._names[where[0]]:
                    raise ValueError(f"{where[0]} has no tensor {where[1]!r}")
                read = self._files[where[0]].get_tensor(where[1])
                if read.dtype != dtype:
                    # Bytes lie anywhere in the file; a copy of them is where larger units may be.
                    read = read.clone().view(dtype).reshape(shape)
                if read.shape != value.shape:
                    raise ValueError(f"{where[1]} has the shape {tuple(read.shape)}, not {shape}")
                value.copy_(read)
            self._memory[where] = value
        return self._memory[where]
