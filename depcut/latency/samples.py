"""Measurements: the kernels of the dense model and of smaller ones, and what each took in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depcut.timing.kernels import Kernel


@dataclass(frozen=True)
class Sample:
    """One set of widths, measured.

    Attributes:
        counts: Kept count of every group.
        kernels: Its kernels in the order in which they run.
        ratio: Its time as a share of the dense model's, from runs in turns.
    """

    counts: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    ratio: float


@dataclass(frozen=True)
class Samples:
    """All measurements of one model on one machine.

    Attributes:
        dense_seconds: Time of the dense model.
        samples: The dense model first.
    """

    dense_seconds: float
    samples: tuple[Sample, ...]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Kept counts, [samples, groups]."""
        return np.array([sample.counts for sample in self.samples], dtype=np.int64)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Seconds of each sample, [samples]."""
        return np.array([sample.ratio * self.dense_seconds for sample in self.samples])

    def as_json(self) -> dict[str, Any]:
        """Plain data for a file; shapes of repeated kernels are written once."""
        shapes: dict[tuple[Any, ...], int] = {}

        def row(kernel: Kernel) -> list[float]:
            key = (kernel.op, kernel.inputs, kernel.outputs)
            return [shapes.setdefault(key, len(shapes)), kernel.seconds]

        rows = [
            {
                "counts": list(sample.counts),
                "ratio": sample.ratio,
                "kernels": [row(kernel) for kernel in sample.kernels],
            }
            for sample in self.samples
        ]
        return {"dense_seconds": self.dense_seconds, "shapes": list(shapes), "samples": rows}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Samples:
        """The measurements that `as_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, IndexError: The data are something else.
        """
        shapes = [
            (str(op), _shapes(inputs), _shapes(outputs)) for op, inputs, outputs in data["shapes"]
        ]
        rows = tuple(
            Sample(
                counts=tuple(int(count) for count in row["counts"]),
                kernels=tuple(
                    Kernel(*shapes[int(place)], seconds=float(seconds))
                    for place, seconds in row["kernels"]
                ),
                ratio=float(row["ratio"]),
            )
            for row in data["samples"]
        )
        return cls(float(data["dense_seconds"]), rows)


def _shapes(data: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape) for shape in data)
