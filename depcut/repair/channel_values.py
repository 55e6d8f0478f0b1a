"""What batch norms tell of the channels after them, without data.

A batch norm in evaluation mode leaves each channel with the mean beta and the standard deviation
|gamma| that its training data gave it. Taken to be normal, the values of a channel are followed
through what works element by element, as numbers at fixed standard scores: no example is run.

Source: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2 (the mean behind a ReLU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from depcut.capture.program import Program
from depcut.graph.arguments import argument
from depcut.graph.liveness import storages, written_roots
from depcut.graph.operators import (
    base_name,
    is_aten,
    is_operator,
    is_pointwise,
    is_random,
)
from depcut.ops.normalization import is_batch_norm

_POINTS, _WIDEST = 241, 6.0  # standard scores from -6 to 6; of a kink, 1e-4 deviations are lost
_CHANNEL = 1
_SAME = ("clone", "contiguous", "to", "detach", "alias")
_AVERAGES = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
# Element-wise in effect; torch tags most of them so, and not all.
_ACTIVATIONS = tuple(
    """celu clip elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish
    relu6 selu silu softplus softshrink square threshold""".split()
)
_VIEWS = ("flatten", "view", "reshape", "squeeze")


@cache
def _normal() -> tuple[Tensor, Tensor]:
    """Standard scores and their weights, [points]; the trapezoidal rule, exact to rounding."""
    scores = torch.linspace(-_WIDEST, _WIDEST, _POINTS, dtype=torch.float64)
    density = torch.exp(-0.5 * scores.square())
    return scores, density / density.sum()


@dataclass(frozen=True, eq=False)
class ChannelValues:
    """Values that the channels (dimension 1) of an activation take.

    Attributes:
        values: At the fixed standard scores, [points, channels], double precision; NaN where
            nothing is known of a channel.
        source: Where the normal variable comes from: of equal sources, equal scores go together.
        averaged: Whether these are means over positions, whose deviations are not known.
    """

    values: Tensor
    source: fx.Node
    averaged: bool = False

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, [channels]."""
        return _normal()[1] @ self.values

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, [channels]."""
        return _normal()[1] @ (self.values - self.mean).square()


def channel_values(program: Program, tensors: Mapping[str, Tensor]) -> dict[fx.Node, ChannelValues]:
    """What is known of the channels of activations, by node; nothing of those left out.

    Args:
        program: The captured model.
        tensors: Its parameters and buffers by name.
    """
    follow = _Follower(program, tensors)
    unsafe = _overwritten(program)
    for node in program.graph.graph.nodes:
        if node not in unsafe and is_operator(node):
            found = follow(node)
            if found is not None:
                follow.known[node] = found
    return follow.known


def _overwritten(program: Program) -> set[fx.Node]:
    """Nodes whose storage is changed in place while something else reads it, too."""
    nodes = program.graph.graph.nodes
    roots = storages(nodes)
    last = {root: node for node, found in written_roots(nodes).items() for root in found}
    open_ = set(last)
    bad: set[fx.Node] = set()
    for node in nodes:
        root = roots[node]
        if root not in last:
            continue
        if node is last[root]:
            open_.discard(root)
        if root in open_ and len(node.users) > 1:
            bad.add(root)
    return {node for node in nodes if roots[node] in bad}


class _Follower:
    """Follows values of channels from node to node.

    Args:
        program: The captured model.
        tensors: Its parameters and buffers by name.
    """

    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        self.program, self.tensors = program, tensors
        self.known: dict[fx.Node, ChannelValues] = {}

    def __call__(self, node: fx.Node) -> ChannelValues | None:
        """What is known of a node's channels."""
        if is_batch_norm(node):
            return self._normed(node)
        if is_aten(node, "cat"):
            return self._joined(node)
        inputs = [n for n in node.all_input_nodes if n not in self.program.tensors]
        if not inputs or any(n not in self.known for n in inputs):
            return None
        first = self.known[inputs[0]]
        if is_aten(node, *_SAME) or ("dropout" in base_name(node) and not is_random(node)):
            return first
        if is_aten(node, *_VIEWS):
            sizes = self.program.sizes
            return first if _is_squeezed(sizes[inputs[0]], sizes[node]) else None
        if _is_average(node):
            return replace(first, values=first.mean.expand_as(first.values), averaged=True)
        if (is_aten(node, *_ACTIVATIONS) or is_pointwise(node.target)) and not is_random(node):
            return self._element_wise(node, inputs)
        return None

    def _tensor(self, node: Any) -> Tensor | None:
        """A parameter or buffer that an argument is, in double precision."""
        name = self.program.tensors.get(node) if isinstance(node, fx.Node) else None
        tensor = None if name is None else self.tensors.get(name)
        if tensor is None or tensor.is_meta:
            return None
        return tensor.detach().double().cpu()

    def _normed(self, node: fx.Node) -> ChannelValues | None:
        """Normal values behind a batch norm whose statistics were trained."""
        mean, variance = (self._tensor(argument(node, n)) for n in ("running_mean", "running_var"))
        if argument(node, "training") or mean is None or variance is None:
            return None
        if not bool(mean.any()) and bool((variance == 1).all()):
            return None  # fresh: they say nothing
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        for name, put in (("weight", scale), ("bias", shift)):
            if argument(node, name) is not None:
                given = self._tensor(argument(node, name))
                if given is None:
                    return None
                put.copy_(given)
        spread = scale.abs() * (variance / (variance + argument(node, "eps"))).sqrt()
        values = shift + _normal()[0][:, None] * spread
        values[:, self._masked(node.args[0]) & (scale != 0)] = torch.nan
        return ChannelValues(values, node)

    def _masked(self, node: Any) -> Tensor | bool:
        """Channels that a layer computes with zeros alone, which its batch norm may not have seen.

        Returns:
            Flags [channels], or False where it is no such layer.
        """
        if not isinstance(node, fx.Node) or not is_aten(node, "conv1d", "conv2d", "linear"):
            return torch.tensor(data=False)
        weight = self._tensor(argument(node, "weight"))
        return torch.tensor(data=False) if weight is None else (weight == 0).flatten(1).all(1)

    def _joined(self, node: fx.Node) -> ChannelValues | None:
        """Channels laid end to end."""
        parts, dim = argument(node, "tensors"), argument(node, "dim")
        if dim % len(self.program.sizes[node]) != _CHANNEL or any(
            p not in self.known for p in parts
        ):
            return None
        found = [self.known[p] for p in parts]
        values = torch.cat([f.values for f in found], 1)
        return ChannelValues(values, node, any(f.averaged for f in found))

    def _element_wise(self, node: fx.Node, inputs: list[fx.Node]) -> ChannelValues | None:
        """What an element-wise operator makes of one activation, or of several."""
        found = [self.known[n] for n in inputs]
        beside = len(inputs) != len(node.all_input_nodes)
        shapes = {self.program.sizes[n] for n in (node, *inputs)}
        if beside or len(shapes) > 1 or any(f.averaged for f in found):
            return None
        if len({f.source for f in found}) == 1:
            by_node = {n: f.values.clone() for n, f in zip(inputs, found, strict=True)}
            args = fx.map_arg(node.args, by_node.__getitem__)
            kwargs = fx.map_arg(node.kwargs, by_node.__getitem__)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            return replace(found[0], values=result) if isinstance(result, Tensor) else None
        if is_aten(node, "add") and argument(node, "alpha") == 1:
            # Of independent summands, taken to be normal again.
            mean, variance = (
                torch.stack([getattr(f, name) for f in found]).sum(0)
                for name in ("mean", "variance")
            )
            return ChannelValues(mean + _normal()[0][:, None] * variance.sqrt(), node)
        return None


def _is_squeezed(before: Any, after: Any) -> bool:
    """Whether a view only drops dimensions of size 1 behind the channels; given both shapes."""
    return (
        len(after) > _CHANNEL
        and after[_CHANNEL] == before[_CHANNEL]
        and all(n == 1 for n in (*before[_CHANNEL + 1 :], *after[_CHANNEL + 1 :]))
    )


def _is_average(node: fx.Node) -> bool:
    """Whether a node takes means over positions alone."""
    if is_aten(node, *_AVERAGES):
        return True
    if is_aten(node, *_POOLS):
        padding: Any = argument(node, "padding")
        return not any(padding) if isinstance(padding, list | tuple) else not padding
    if not is_aten(node, "mean") or isinstance(node.args[-1], torch.dtype):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank, dims = source.meta["val"].ndim, node.args[1] if len(node.args) > 1 else None
    return isinstance(dims, list | tuple) and {d % rank for d in dims} == {*range(2, rank)}
