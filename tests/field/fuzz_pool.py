"""Values that somebody may pass by mistake, by name: each is made anew for every call."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Hostile:
    """All that Python asks of it raises."""

    def _refuse(self, *_: object) -> Any:
        raise ZeroDivisionError("hostile")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __float__ = __int__ = _refuse
    __index__ = __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __fspath__ = _refuse
    __getitem__ = __contains__ = __call__ = _refuse
    __hash__ = object.__hash__


class Plain:
    """An object of no use."""


def failing() -> Iterator[Any]:
    raise OSError("the disk is gone")
    yield  # a generator


def raises(*_: object, **__: object) -> None:
    raise ZeroDivisionError("in the caller's function")


def _loop() -> list[Any]:
    out: list[Any] = []
    out.append(out)
    return out


POOL: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "2": lambda: 2,
    "10^30": lambda: 10**30,
    "-10^30": lambda: -(10**30),
    "10^5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "0.0": lambda: 0.0,
    "1.0": lambda: 1.0,
    "-0.5": lambda: -0.5,
    "1.5": lambda: 1.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "complex": lambda: 1 + 2j,
    "empty string": lambda: "",
    "number as string": lambda: "0.5",
    "string": lambda: "a",
    "NUL string": lambda: "\x00",
    "surrogate": lambda: "\ud800é",
    "long string": lambda: "a" * 5000,
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "Decimal": lambda: Decimal("0.5"),
    "Decimal NaN": lambda: Decimal("NaN"),
    "Fraction": lambda: Fraction(1, 2),
    "huge Fraction": lambda: Fraction(10**400, 3),
    "np.float32": lambda: np.float32(0.5),
    "np.int64": lambda: np.int64(4),
    "np.uint8": lambda: np.uint8(4),
    "np.bool_": lambda: np.bool_(True),
    "0-d array": lambda: np.array(0.5),
    "array": lambda: np.array([1, 2]),
    "object array": lambda: np.array([None, "a"], dtype=object),
    "datetime64": lambda: np.datetime64("2026-01-01"),
    "0-d tensor": lambda: torch.tensor(0.5),
    "int tensor": lambda: torch.tensor(3),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "meta tensor": lambda: torch.empty(2, 3, device="meta"),
    "empty tensor": lambda: torch.empty(0),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "list": list,
    "tuple": lambda: (),
    "dict": dict,
    "set": set,
    "[1]": lambda: [1],
    "[None]": lambda: [None],
    "['a']": lambda: ["a"],
    "nested": lambda: [[[["a"]]]],
    "itself": _loop,
    "{'a': 1}": lambda: {"a": 1},
    "{1: 2}": lambda: {1: 2},
    "{None: None}": lambda: {None: None},
    "{'*': 'x'}": lambda: {"*": "x"},
    "range": lambda: range(3),
    "iterator": lambda: iter([]),
    "failing generator": failing,
    "object": object,
    "instance": Plain,
    "class": lambda: Plain,
    "type": lambda: type,
    "module class": lambda: nn.Linear,
    "module": lambda: nn.Linear(2, 2),
    "lazy module": lambda: nn.LazyLinear(3),
    "function": lambda: lambda *_, **__: None,
    "raising function": lambda: raises,
    "builtin": lambda: len,
    "path": lambda: Path("no such file"),
    "folder": lambda: Path(os.sep),
    "device file": lambda: Path("/dev/null"),
    "Ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "slice": lambda: slice(1),
    "exception": lambda: ValueError("x"),
    "memoryview": lambda: memoryview(b"x"),
    "lock": threading.Lock,
    "python module": lambda: math,
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("meta"),
    "hostile": Hostile,
}
