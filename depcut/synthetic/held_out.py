"""Which of several sets of inputs tells most about the others: a choice that needs no real data.

Compensation solves layers for half of their inputs again, so that these make up for the other half.
How well that holds elsewhere is seen on inputs that it was not solved on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depcut.graph.arguments import bound
from depcut.graph.operators import is_aten
from depcut.synthetic.running import Run
from depcut.synthetic.subject import Leaves

LAYERS = 12  # that are looked at, evenly spread over the depth
FEATURES = 8, 512  # of a layer's input: fewer tell nothing, of more some are drawn
SAMPLES = 2048  # positions of a layer's input
DAMPING = 0.01  # of the mean square


@dataclass(frozen=True, eq=False)
class Features:
    """What one layer reads, on one set of inputs.

    Attributes:
        read: Samples of its input, [positions, features].
        weight: By which it is read, [outputs, features].
    """

    read: Tensor
    weight: Tensor


def layers_of(run: Run, reached: set[fx.Node]) -> list[fx.Node]:
    """Linear layers and convolutions, some of them where there are many.

    Args:
        run: Of the captured graph.
        reached: Nodes that depend on what is made.
    """
    sizes = run.program.sizes
    found = [
        node
        for node in run.program.graph.graph.nodes
        if is_aten(node, "linear", "conv1d", "conv2d", "conv3d")
        and node.args[0] in reached
        and isinstance(node.args[1], fx.Node)
        and len(sizes[node.args[1]]) > 1
        and sizes[node.args[1]][1] >= FEATURES[0]  # of one channel a group, there is no choice
    ]
    step = max(1.0, len(found) / LAYERS)
    return [found[int(i * step)] for i in range(min(len(found), LAYERS))]


def features(run: Run, layers: Sequence[fx.Node], items: Sequence[Leaves]) -> list[Features]:
    """What the layers read; on the first items, where these have samples enough.

    Args:
        run: Of the captured graph.
        layers: Of `layers_of`.
        items: Flat inputs of some calls.
    """
    known: dict[fx.Node, list[Tensor]] = {layer: [] for layer in layers}
    weights: dict[fx.Node, Tensor] = {}
    for leaves in items:
        with torch.no_grad():
            for node, given in run.arguments_of(layers, leaves):
                read, weights[node] = _matrices(node, bound(node, *given))
                known[node].append(_spread(read, 1 + SAMPLES // len(items)))
        if all(sum(map(len, samples)) >= SAMPLES for samples in known.values()):
            break
    return [Features(torch.cat(known[layer]), weights[layer]) for layer in layers]


def _matrices(node: fx.Node, given: Any) -> tuple[Tensor, Tensor]:
    """The input and the weight with the features last; taps of a convolution are outputs."""
    read, weight = given["input"].detach().float(), given["weight"].detach().float()
    if not is_aten(node, "linear"):
        read = read[:, : weight.shape[1]].movedim(1, -1)  # of groups, the first one
        weight = weight[: len(weight) // given["groups"]].movedim(1, -1)
    read, weight = read.flatten(0, -2), weight.flatten(0, -2)
    chosen = torch.arange(0, weight.shape[1], max(1, math.ceil(weight.shape[1] / FEATURES[1])))
    return read[:, chosen.to(read.device)].cpu(), weight[:, chosen.to(weight.device)].cpu()


def _spread(rows: Tensor, count: int) -> Tensor:
    """Rows of a matrix, evenly spread."""
    return rows[:: max(1, len(rows) // count)]


def error(solved: Sequence[Features], tried: Sequence[Features]) -> float:
    """How much of what layers compute is lost with half of their inputs, on other inputs.

    Args:
        solved: On what the half that stays is chosen, and solved to stand for the other half.
        tried: On what the outputs are compared.

    Returns:
        The squared difference by the variance, the geometric mean over the layers.
    """
    logs = [math.log(max(_error(a, b), 1e-9)) for a, b in zip(solved, tried, strict=True)]
    return math.exp(sum(logs) / len(logs))


def _error(solved: Features, tried: Features) -> float:
    mean, weight = solved.read.mean(0), solved.weight
    own, other = solved.read - mean, tried.read - mean
    moments = own.T @ own / len(own)
    energy = moments.diagonal()
    order = (energy * weight.square().sum(0)).argsort(descending=True)
    kept, gone = order[: len(order) // 2], order[len(order) // 2 :]
    damping = (DAMPING * energy.mean() + 1e-12) * torch.eye(len(kept))
    told = torch.linalg.solve(moments[kept][:, kept] + damping, moments[kept][:, gone])
    lost = (other[:, gone] - other[:, kept] @ told) @ weight[:, gone].T
    whole = other @ weight.T
    variance = (whole - whole.mean(0)).square().sum()
    return float(lost.square().sum() / variance.clamp_min(1e-30))
