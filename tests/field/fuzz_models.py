"""Models, attributes and inputs that a stage may stumble over, and factories for commands."""

from __future__ import annotations

import math
import random
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fuzz_pool import Hostile
from torch import Tensor, nn


class OddError(Exception):
    """Needs two arguments, and cannot say what it is."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__()
        self.one, self.two = one, two

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class OutsideError(Exception):
    """As of a library that has exceptions of its own."""


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: Exception("plain"),
    "ZeroDivisionError": lambda: ZeroDivisionError("a division"),
    "KeyError": lambda: KeyError("a key"),
    "AssertionError": AssertionError,
    "StopIteration": StopIteration,
    "RecursionError": RecursionError,
    "OSError": lambda: OSError(2, "no such file"),
    "NotImplementedError": NotImplementedError,
    "a class of its own": lambda: OutsideError("outside"),
    "an odd class": lambda: OddError(1, 2),
}


class RaisesWhenNarrow(nn.Module):
    """It raises unless its middle has the dense width, which no attribute supplies."""

    def __init__(self, make: Callable[[], BaseException]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if h.shape[-1] != 16:
            raise self.make()
        return self.last(h)


def _generator() -> Any:
    return (i for i in range(3))


ATTRIBUTES: tuple[Callable[[], Any], ...] = (
    *(threading.Lock, threading.Condition, threading.Event, Hostile, OutsideError, _generator),
    *(lambda: sqlite3.connect(":memory:"), lambda: math, lambda: np.random.default_rng(0)),
    *(lambda: {"a": [threading.Lock()]}, lambda: print, lambda: OddError(1, 2), threading.local),
)


def holding(model: nn.Module, draw: random.Random) -> None:
    """Give modules of a model attributes that cannot be copied, or hardly."""
    for module in model.modules():
        if draw.random() < 0.5:
            module.held = draw.choice(ATTRIBUTES)()


# None of them is an input of `fuzz_calls.Net`.
INPUTS: tuple[Callable[[], Any], ...] = (
    *(lambda: torch.ones(2, 7), lambda: torch.ones(2, 6, dtype=torch.float64)),
    *(lambda: torch.ones(2, 6, dtype=torch.int64), lambda: torch.ones(2, 6).half()),
    *(lambda: torch.empty(2, 6, device="meta"), lambda: torch.ones(()), lambda: torch.empty(0, 6)),
    *(lambda: np.ones((2, 6), np.float32), lambda: [[1.0] * 6] * 2, lambda: "x", lambda: 3),
    *(lambda: {"y": torch.ones(2, 6)}, lambda: (torch.ones(2, 6), torch.ones(2, 6), 3)),
    *(dict, lambda: (), lambda: [None], lambda: {1: torch.ones(2, 6)}, lambda: torch.ones(6, 2)),
    *(
        lambda: torch.ones(2, 6).to_sparse(),
        lambda: {"x": None},
        Hostile,
        lambda: torch.ones(2, 6) * 1j,
    ),
)

MODELS_MODULE = """
import sys
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

def data():
    yield torch.ones(2, 6)
    raise OSError("the disk is gone")

def endless():
    while True:
        yield torch.ones(2, 6)

def ends():
    sys.exit(0)

def raises():
    raise ZeroDivisionError

def number():
    return 3

text = "no function"
"""
