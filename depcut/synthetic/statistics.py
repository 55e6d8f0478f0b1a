"""What the batch norms of a model have stored of its training data, and how far inputs are off."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depcut.capture.program import Program
from depcut.graph.ancestry import reached
from depcut.graph.arguments import argument, bound
from depcut.ops.normalization import is_batch_norm
from depcut.synthetic.running import Run
from depcut.synthetic.subject import Leaves


@dataclass(frozen=True, eq=False)
class Norms:
    """The batch norms of a graph.

    Attributes:
        run: Computes what they read.
        nodes: Those that normalise by running statistics, in the order of the graph.
    """

    run: Run
    nodes: tuple[fx.Node, ...]

    def distance(self, leaves: Leaves) -> Tensor:
        """How far the statistics of what the norms read are from the stored ones, squared.

        With mean m and standard deviation s of a channel over rows and positions, and those that
        the norm divides by, M and S: ((m - M) / S)^2 + (s / S - 1)^2, the mean over the channels
        of a norm, and over the norms.

        Args:
            leaves: Flat inputs.
        """
        parts = [
            _distance(bound(node, *given))
            for node, given in self.run.arguments_of(self.nodes, leaves)
        ]
        return torch.stack([part.to(parts[-1].device) for part in parts]).mean()


def norms_of(program: Program, inputs: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """The batch norms that normalise by running statistics, in the order of the graph.

    Args:
        program: The captured model.
        inputs: Placeholders, one of which a norm is to depend on.
    """
    depends = reached(program, inputs)
    return tuple(
        node
        for node in program.graph.graph.nodes
        if is_batch_norm(node)
        and node in depends
        and not argument(node, "training")
        and argument(node, "running_mean") is not None
    )


def _distance(given: Any) -> Tensor:
    """Of one norm, from the values of its arguments by name."""
    read, eps = given["input"].float(), given["eps"]
    stored, scale = given["running_mean"].float(), (given["running_var"].float() + eps).sqrt()
    dims = [d for d in range(read.ndim) if d != 1]
    mean, var = read.mean(dims), read.var(dims, correction=0)
    # With eps inside of both roots, the slope is finite where a channel is constant.
    off: Tensor = ((mean - stored) / scale) ** 2 + ((var + eps).sqrt() / scale - 1) ** 2
    return off.mean()
