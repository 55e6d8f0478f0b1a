"""What inputs are made for: a captured model, how many of them, by when; and what was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone
from depcut.capture.process_state import quiet
from depcut.capture.program import Program
from depcut.support.torch_private import pytree

Leaves = list[Any]  # of (args, kwargs), flat, in the order of the captured call

SECONDS = 120.0  # that making inputs may take
ROWS = 32  # examples of one item at most
_ITEMS = 4


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to make inputs for; it is only read.

    Attributes:
        program: The captured model.
        model: The model.
        examples: How many to make at most.
        seed: Of all that is drawn.
        seconds: That making them may take; fewer are made where it does not suffice.
        advance: Told the share of the work that is done, in [0, 1].
        started: When this began, by `time.monotonic`.
    """

    program: Program
    model: nn.Module
    examples: int
    seed: int = 0
    seconds: float = SECONDS
    advance: Callable[[float], None] = lambda _share: None
    started: float = field(default_factory=time.monotonic)

    @property
    def leaves(self) -> Leaves:
        """The flat inputs of the captured example call."""
        return pytree.tree_leaves((self.program.args, self.program.kwargs))

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def generator(self, salt: int = 0) -> torch.Generator:
        """Draws of this subject's seed, on the CPU.

        Args:
            salt: Another one gives other draws.
        """
        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)

    def own_model(self) -> nn.Module:
        """A clone in evaluation mode whose parameters need no gradient, for a recipe to run."""
        return clone(self.model, buffers=True, requires_grad=False).eval()

    def call(self, model: nn.Module, leaves: Sequence[Any]) -> list[Any]:
        """The flat outputs that count of one call.

        Args:
            model: What `own_model` gave.
            leaves: Flat inputs, with any number of rows.
        """
        args, kwargs = pytree.tree_unflatten(list(leaves), self.program.in_spec)
        with quiet():
            return self.program.results.flat(model(*args, **kwargs))

    def chunks(self) -> Iterator[int]:
        """Rows of each item: as many items as the examples make, four at least where they can."""
        rows = max(1, min(ROWS, self.examples // _ITEMS))
        if not self.program.dynamic:  # any other number does not fit the captured graph
            tensors = (leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)
            rows = max(1, next((len(leaf) for leaf in tensors), 1))
        for _ in range(max(1, self.examples // rows)):
            yield rows


@dataclass(frozen=True, eq=False)
class Made:
    """Inputs that were made.

    Attributes:
        items: Flat inputs of each item, in the order of the captured call, on the model's device.
        recipe: What they were made from, a noun phrase.
        match: How well they match what the model knows of its inputs, a clause; "" if unknown.
        others: Flat inputs of other kinds, which a result is judged on as well.
    """

    items: tuple[Leaves, ...]
    recipe: str
    match: str = ""
    others: tuple[Leaves, ...] = ()
