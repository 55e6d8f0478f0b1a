"""One generated module for all example calls: refused where they would need several."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx, nn

from depcut.errors import VerificationError
from depcut.plan.keep import Keep
from depcut.rewrite.generated import GeneratedModule
from depcut.rewrite.graph import generate


def generate_alike(
    slim: nn.Module, keep: Keep, name: str, inlined: Container[str], dropouts: dict[fx.Node, float]
) -> GeneratedModule:
    """`generate`, from every example call that reaches the module.

    Args:
        slim: The narrowed copy, whose module is read but not changed.
        keep: What stays.
        name: Qualified name; "" for the whole model.
        inlined: Modules that must not be called.
        dropouts: Probability in training of attentions that were captured without dropout.

    Raises:
        CannotGenerateError: It uses values that are not among its arguments.
        VerificationError: The example calls need different graphs.
    """
    reaching = [k for k in keep.calls if not name or name in k.coupling.program.calls_of]
    made = [generate(slim, k, name, inlined, dropouts) for k in reaching or keep.calls[:1]]
    if not all(_alike(made[0], other) for other in made[1:]):
        raise VerificationError(
            f"{name or 'the whole model'} would have to be generated from its graph, and the "
            f"{len(keep.calls)} example calls run it differently",
            where=f"module {name!r}" if name else type(slim).__name__,
            remedy="keep the layers concerned with ignore=, or leave an example call out",
        )
    return made[0]


def _alike(a: GeneratedModule, b: GeneratedModule) -> bool:
    """Whether two modules compute the same, and take and return the same structures."""
    return (
        (a.in_spec, a.out_spec, a.captured) == (b.in_spec, b.out_spec, b.captured)
        and _form(a) == _form(b)
        and _same(dict(a.named_buffers()), dict(b.named_buffers()))
    )


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def _form(module: GeneratedModule) -> list[Any]:
    """The graph without the names of its nodes."""
    numbers = {node: i for i, node in enumerate(module.graph.nodes)}

    def number(node: fx.Node) -> tuple[str, int]:
        return "node", numbers[node]

    return [
        (
            node.op,
            None if node.op == "placeholder" else node.target,
            fx.map_arg(node.args, number),
            fx.map_arg(node.kwargs, number),
        )
        for node in module.graph.nodes
    ]
