"""Inputs that excite the model, where the example inputs are constant: zeros hide a wrong scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut.capture.program import Program
from depcut.graph.operators import base_name, is_aten
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, example
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import pytree

# Operators that move, cast or bound the numbers that they get.
_MOVES = frozenset(
    """_to_copy alias chunk clamp clamp_max clamp_min clone contiguous detach expand flatten getitem
    masked_fill narrow permute reshape select slice split squeeze t to transpose unflatten
    unsqueeze view""".split()
)


def exciting(keep: Keep, model: nn.Module) -> tuple[Any, ...] | None:
    """Flat inputs like the captured ones, with drawn values in place of constant ones.

    Floating-point inputs are drawn from a normal distribution; integers from all that the tables
    have that they are looked up in, and stay where they are looked up in none.

    Args:
        keep: Whose program's inputs.
        model: The dense model, which must take them: what it does not is left as it is.

    Returns:
        None where nothing is to be drawn.
    """
    program = keep.coupling.program
    leaves: list[Any] = pytree.tree_leaves((program.args, program.kwargs))
    if len(leaves) != len(program.inputs):
        return None
    drawn = dict(_drawn(program, leaves))
    if not drawn:
        return None
    given = _finite(keep, model, leaves)
    if given < 0:
        return None  # the model does not take the example: what verifies it will say so
    chosen = [drawn.get(i, leaf) for i, leaf in enumerate(leaves)]
    if _finite(keep, model, chosen) >= given:
        return tuple(chosen)
    chosen = list(leaves)
    for i, value in drawn.items():
        trial = [*chosen[:i], value, *chosen[i + 1 :]]
        if _finite(keep, model, trial) >= given:
            chosen = trial
    return tuple(chosen) if any(a is not b for a, b in zip(chosen, leaves, strict=True)) else None


def _drawn(program: Program, leaves: list[Any]) -> list[tuple[int, Tensor]]:
    """(number, drawn values) of the leaves that are constant and can be drawn."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i, (node, leaf) in enumerate(zip(program.inputs, leaves, strict=True)):
        if not isinstance(leaf, Tensor) or leaf.is_meta or leaf.numel() < 2:
            continue
        if leaf.layout is not torch.strided or leaf.is_nested:
            continue
        if not bool((leaf == leaf.reshape(-1)[0]).all()):
            continue
        if leaf.is_floating_point():
            value = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        elif leaf.dtype in (torch.int32, torch.int64) and (size := table_rows(node)):
            value = torch.randint(0, size, leaf.shape, generator=generator, dtype=leaf.dtype)
        else:
            continue
        out.append((i, value.to(leaf.device)))
    return out


def table_rows(node: fx.Node) -> int | None:
    """The smallest number of rows of the tables that numbers are looked up in; None for none.

    Args:
        node: Of the numbers.
    """
    found: list[int] = []
    seen, left = {node}, [node]
    while left:
        for user in left.pop().users:
            if is_aten(user, "embedding", "embedding_bag", "index", "index_select"):
                rows = _rows(user, seen)
                found += [rows] if rows is not None else []
            elif user not in seen and (base_name(user) or _name(user)) in _MOVES:
                seen.add(user)
                left.append(user)
    return min(found, default=None)


def _rows(node: fx.Node, numbers: set[fx.Node]) -> int | None:
    """The size of what a node looks numbers up in; None where they are not what is looked up."""
    table: Any = node.args[0]
    sizes = table.meta["val"].shape
    if is_aten(node, "embedding", "embedding_bag"):
        dim = 0 if node.args[1] in numbers else None
    elif is_aten(node, "index_select"):
        dim = node.args[1] if node.args[2] in numbers else None  # type: ignore[assignment]
    else:
        indices: Any = node.args[1]
        dim = next((d for d, index in enumerate(indices) if index in numbers), None)
    return int(sizes[dim]) if dim is not None and isinstance(sizes[dim], int) else None


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def _finite(keep: Keep, model: nn.Module, leaves: list[Any]) -> float:
    """Share of the finite numbers among the outputs of the reference; -1 where it raises."""
    try:
        with torch.no_grad():
            given = pytree.tree_leaves(example(keep, leaves=leaves))
            outputs, _ = Reference(keep, model).run(given)
    except Exception as error:  # noqa: BLE001  whatever an operator raises on them
        reraise_fatal(error)
        return -1.0
    shares = [
        float(torch.isfinite(o).double().mean())
        for o in outputs
        if isinstance(o, Tensor) and o.numel()
    ]
    return sum(shares) / len(shares) if shares else 0.0
