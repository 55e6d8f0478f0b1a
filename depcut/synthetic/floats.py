"""Which inputs of a model are floating-point data to make, and rows of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from depcut.capture.capture import is_symbolic
from depcut.synthetic.subject import Leaves, Subject


@dataclass(frozen=True, eq=False)
class Layout:
    """The flat inputs of a captured call by what becomes of them.

    Attributes:
        example: Those of the example.
        made: Positions of the floating-point tensors that are made.
        batched: Positions of the tensors whose first dimension is the batch.
        rows: Of every call, where the batch is not free; else None.
    """

    example: Leaves
    made: tuple[int, ...]
    batched: frozenset[int]
    rows: int | None

    def shape(self, position: int, rows: int) -> tuple[int, ...]:
        """Of a tensor in a call.

        Args:
            position: Among the flat inputs.
            rows: Of the call.
        """
        shape = tuple(self.example[position].shape)
        return (rows, *shape[1:]) if position in self.batched else shape

    def leaves(self, made: dict[int, torch.Tensor], generator: torch.Generator) -> Leaves:
        """Flat inputs of one call: what was made, with rows of the example in all other tensors.

        Args:
            made: Tensors by their positions.
            generator: Draws which rows of the example.
        """
        rows = next((len(made[p]) for p in self.made if p in self.batched), None)
        chosen: torch.Tensor | None = None
        out: Leaves = []
        for position, leaf in enumerate(self.example):
            if position in made:
                value: Any = made[position].to(leaf.dtype)
            elif position in self.batched and rows is not None:
                if chosen is None:  # the same rows in all of them: they belong together
                    chosen = torch.randint(len(leaf), (rows,), generator=generator)
                value = leaf[chosen.to(leaf.device)]
            else:
                value = leaf
            out.append(value)
        return out

    def noise(self, rows: int, generator: torch.Generator) -> dict[int, torch.Tensor]:
        """Standard normal tensors to make inputs from, in at least single precision.

        Args:
            rows: Of the call.
            generator: Draws them, on the CPU.
        """
        return {
            p: torch.randn(self.shape(p, rows), generator=generator).to(
                self.example[p].device, torch.promote_types(self.example[p].dtype, torch.float32)
            )
            for p in self.made
        }

    @property
    def kept(self) -> bool:
        """Whether some tensors are rows of the example."""
        return any(
            isinstance(leaf, torch.Tensor) and position not in self.made
            for position, leaf in enumerate(self.example)
        )


def layout(subject: Subject) -> Layout:
    """What becomes of the flat inputs of a model.

    Made is what is floating-point and has two dimensions or more; neither masks, nor times.

    Args:
        subject: The model.
    """
    leaves, nodes = subject.leaves, subject.program.inputs
    tensors = [p for p, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    names = [n.name for n in nodes] if len(nodes) == len(leaves) else [""] * len(leaves)
    made = [
        p
        for p in tensors
        if leaves[p].is_floating_point() and leaves[p].ndim > 1 and "mask" not in names[p]
    ]
    free = len(nodes) == len(leaves)
    batched = {p for p in tensors if free and is_symbolic(nodes[p].meta.get("val"))}
    if any(leaves[p].unique().numel() > 2 for p in made):
        made = [p for p in made if leaves[p].unique().numel() > 2]  # others are flags
    rows = None if batched.intersection(made) else max([len(leaves[p]) for p in made], default=0)
    return Layout(leaves, tuple(made), frozenset(batched), rows)
