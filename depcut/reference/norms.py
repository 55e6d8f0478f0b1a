"""Spectral norms: numbers that weights are divided by, and that must stay what they were.

torch estimates the norm of a weight W as the sum u @ W @ v, with vectors u and v that it keeps as
buffers. Over the kept rows and columns that is another number, which would rescale the kept part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from depcut.axes import Indices
from depcut.capture.program import Program
from depcut.graph.ancestry import ancestors
from depcut.graph.arguments import values_of
from depcut.graph.operators import is_aten
from depcut.reference.slices import index_tensors, take


def estimates(program: Program) -> dict[fx.Node, str]:
    """The sums that depend on weights alone, with the name of the buffer that is a factor of each.

    Args:
        program: The captured model.
    """
    out = {}
    for node in program.graph.graph.nodes:
        if not is_aten(node, "dot", "vdot"):
            continue
        factors = [program.tensors.get(_source(n)) for n in node.all_input_nodes]
        buffers = [name for name in factors if name and name not in program.parameters]
        given = [n for n in ancestors(node) if n.op == "placeholder"]
        if buffers and all(n in program.tensors for n in given):
            out[node] = buffers[0]
    return out


def _source(node: fx.Node) -> fx.Node:
    """What a node is a copy of, or itself."""
    while is_aten(node, "clone", "to", "detach"):
        node = node.all_input_nodes[0]
    return node


def estimate(
    node: fx.Node, program: Program, tensor: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The value of such a sum.

    Args:
        node: The sum.
        program: The captured model.
        tensor: The value of a parameter or buffer, by its name.
    """
    values: dict[fx.Node, Any] = {}
    involved = set(ancestors(node))
    for each in program.graph.graph.nodes:
        if each not in involved:
            continue
        if each.op == "placeholder":
            values[each] = tensor(program.tensors[each])
        else:
            args, kwargs = values_of(each, values)
            values[each] = each.target(*args, **kwargs)
    result: torch.Tensor = values[node]
    return result


def kept_alone(
    tensors: Mapping[str, torch.Tensor], kept: Mapping[str, tuple[Indices | None, ...]]
) -> Callable[[str], torch.Tensor]:
    """Tensors in their dense sizes with zeros where units go: their sums are those of what stays.

    Args:
        tensors: The dense model's, by name.
        kept: What stays of each dimension, by name.
    """

    def tensor(name: str) -> torch.Tensor:
        dense = tensors[name].detach()
        if name not in kept:
            return dense
        out = torch.zeros_like(dense)
        out[index_tensors(dense, kept[name])] = take(dense, kept[name])
        return out

    return tensor
