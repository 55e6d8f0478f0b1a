"""Which inputs of a model are floating-point data to make, and rows of all the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depcut.capture.capture import is_symbolic
from depcut.synthetic.subject import ROWS, Leaves, Subject

Tensors = dict[int, Tensor]  # by their positions among the flat inputs
Scales = Mapping[int, tuple[float, float]]  # mean and standard deviation, alike

POWERS = (1.0, 0.1, 0.01, 10.0, 100.0, 1000.0)  # standard deviations that are tried
_ITEMS = 4


@dataclass(frozen=True, eq=False)
class Layout:
    """The flat inputs of a captured call by what becomes of them.

    Attributes:
        example: Those of the example.
        made: Positions of the floating-point tensors that are made.
        batched: Positions of the tensors whose first dimension is the batch.
        rows: Of every call, where the batch is not free; else None.
        nodes: Of the tensors that are made.
    """

    example: Leaves
    made: tuple[int, ...]
    batched: frozenset[int]
    rows: int | None
    nodes: tuple[fx.Node, ...]

    def scales(self) -> list[Scales]:
        """Means and standard deviations that inputs may have: the example's, and powers of ten."""
        out: list[Scales] = [dict.fromkeys(self.made, (0.0, power)) for power in POWERS]
        given = {p: self.example[p].double() for p in self.made}
        own = {p: (float(x.mean()), float(x.std())) for p, x in given.items()}
        if all(math.isfinite(mean) and 0 < std < math.inf for mean, std in own.values()):
            out.insert(1, own)
        return out

    def noise(self, rows: int, generator: torch.Generator, scales: Scales) -> Tensors:
        """Normal tensors to make inputs from, of single precision or a finer one.

        Args:
            rows: Of the call.
            generator: Draws them, on the CPU.
            scales: Mean and standard deviation of each.
        """
        out = {}
        for position in self.made:
            like = self.example[position]
            shape = (rows, *like.shape[1:]) if position in self.batched else tuple(like.shape)
            dtype = torch.promote_types(like.dtype, torch.float32)
            mean, std = scales[position]
            drawn = mean + std * torch.randn(shape, generator=generator)
            out[position] = drawn.to(like.device, dtype)
        return out

    def leaves(self, made: Tensors, generator: torch.Generator) -> Leaves:
        """Flat inputs of one call: what was made, and rows of the example in all other tensors.

        Args:
            made: What was made.
            generator: Draws which rows, the same ones for all tensors.
        """
        rows = next((len(made[p]) for p in self.made if p in self.batched), None)
        out = self.replaced(self.example, made)
        chosen: Tensor | None = None
        for position in sorted(self.batched.difference(self.made)) if rows is not None else ():
            leaf = self.example[position]
            if chosen is None:
                chosen = torch.randint(len(leaf), (rows or 0,), generator=generator)
            out[position] = leaf[chosen.to(leaf.device)]
        return out

    def replaced(self, leaves: Leaves, made: Mapping[int, Tensor]) -> Leaves:
        """Flat inputs with what was made in its places, in the precision of the example.

        Args:
            leaves: Flat inputs.
            made: What was made.
        """
        out: list[Any] = list(leaves)
        for position, tensor in made.items():
            out[position] = tensor.to(self.example[position].dtype)
        return out

    def items(self, calls: Iterable[Leaves]) -> tuple[Leaves, ...]:
        """The flat inputs of some calls cut into four items at least, where the batch is free.

        Args:
            calls: Flat inputs of each.
        """
        known = list(calls)
        if self.rows is not None:
            return tuple(known)
        first = next(p for p in self.made if p in self.batched)
        size = max(1, min(ROWS, sum(len(leaves[first]) for leaves in known) // _ITEMS))
        return tuple(
            [leaf[i : i + size] if p in self.batched else leaf for p, leaf in enumerate(leaves)]
            for leaves in known
            for i in range(0, len(leaves[first]), size)
        )

    @property
    def rest(self) -> str:
        """What the other tensors are, as the end of a noun phrase; "" where there are none."""
        others = any(
            isinstance(leaf, Tensor) and position not in self.made
            for position, leaf in enumerate(self.example)
        )
        return ", the other inputs rows of the example" if others else ""


def layout(subject: Subject) -> Layout:
    """What becomes of the flat inputs of a model.

    What is floating-point and has two dimensions or more is made. Not made are masks, which the
    name tells, or two values at most beside tensors of more.

    Args:
        subject: The model.
    """
    leaves, nodes = subject.leaves, subject.program.inputs
    assert len(leaves) == len(nodes), "a placeholder for every leaf"
    made = [
        p
        for p, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.ndim > 1
        and "mask" not in nodes[p].name
    ]
    various = [p for p in made if len(leaves[p].unique()) > 2]
    made = various or made
    batched = frozenset(p for p, n in enumerate(nodes) if is_symbolic(n.meta.get("val")))
    fixed = not batched.intersection(made)
    rows = max((len(leaves[p]) for p in made), default=0) if fixed else None
    return Layout(leaves, tuple(made), batched, rows, tuple(nodes[p] for p in made))
