"""How much a branch changes the residual stream, and a plan the outputs.

Both run the captured graph on calibration batches; where there are none, on the captured example
inputs, which may be noise and then say less about real ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from depcut import axes
from depcut.branches.branch import Block, Branch
from depcut.coupling.groups import Coupling
from depcut.graph.resized import FlatInputs, numbers_of_run
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, example
from depcut.support.processes import ALONE, Processes
from depcut.support.torch_private import pytree

Batch = list[Any]


def examples(coupling: Coupling) -> list[Batch]:
    """The captured example inputs as the only batch, flat.

    Args:
        coupling: The analysed model.
    """
    return [pytree.tree_leaves(example(Keep(coupling, {})))]


def _copied(batch: Batch) -> Batch:
    """The batch with its tensors cloned, since a graph may change its inputs in place."""
    leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in batch]
    return FlatInputs(leaves, numbers_of_run(batch))


def influence(
    coupling: Coupling,
    model: nn.Module,
    candidates: Sequence[Branch | Block],
    batches: Sequence[Batch],
    everyone: Processes = ALONE,
) -> dict[str, float]:
    """1 - cos(stream without it, stream with it), averaged over positions and batches.

    The block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853, eq. 1), for branches too.

    Args:
        coupling: The analysed model.
        model: Its weights.
        candidates: Branches and blocks to score.
        batches: Flat inputs, in the structure of the captured ones.
        everyone: The processes that share them.

    Returns:
        One number a name, from 0 (changes nothing) to 2.
    """
    reference = Reference(Keep(coupling, {}), model)
    sums: dict[str, float] = {}
    count = 0
    with torch.no_grad():
        for batch in batches:
            _, values = reference.run(
                _copied(batch), watch={n for c in candidates for n in _watched(c)}
            )
            for candidate in candidates:
                result, other = (values[n].float() for n in _watched(candidate))
                before = other if isinstance(candidate, Block) else result - other
                cosine = _cosine(before, result, _channels(coupling, _watched(candidate)[0]))
                sums[candidate.name] = sums.get(candidate.name, 0.0) + 1 - cosine
            count += 1
    *found, batch_count = everyone.total("influence", *sums.values(), count)
    return {name: total / batch_count for name, total in zip(sums, found, strict=True)}


def _watched(candidate: Branch | Block) -> tuple[fx.Node, fx.Node]:
    """The stream afterwards; and what was added to it, or, of a block, the stream before."""
    if isinstance(candidate, Block):
        return candidate.result, candidate.stream
    return candidate.total, candidate.operand


def _channels(coupling: Coupling, node: fx.Node) -> list[int]:
    """Dimensions that hold channels: those that could shrink, else all but the batch."""
    dims = coupling.env[node]
    assert isinstance(dims, tuple)
    free = [i for i, t in enumerate(dims) if i and not axes.is_frozen(axes.resolve(t))]
    return free or list(range(1, len(dims))) or [0]


def _cosine(a: torch.Tensor, b: torch.Tensor, channels: list[int]) -> float:
    places = [i for i in range(a.ndim) if i not in channels]
    rows = [t.permute(*places, *channels).flatten(len(places)) for t in (a, b)]
    return float(torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=-1).mean())


def outputs_of(keep: Keep, model: nn.Module, batches: Sequence[Batch]) -> list[list[Any]]:
    """Flat outputs of what stays, those that count, for every batch.

    Args:
        keep: What stays.
        model: The dense model.
        batches: Flat inputs.
    """
    reference = Reference(keep, model, sliced=True)
    with torch.no_grad():
        results = keep.coupling.program.results
        return [results.of(reference.run(_copied(batch))[0]) for batch in batches]


def output_change(
    dense: list[list[Any]], other: list[list[Any]], everyone: Processes = ALONE
) -> float:
    """Relative L2 distance of outputs, over all outputs and batches together.

    A measure of quality, not of errors: it adds up what checks (`depcut.support.closeness`) take
    the largest of.

    Args:
        dense: Outputs of the dense model, see `outputs_of`.
        other: Those of a smaller one.
        everyone: The processes that each have some of the batches.
    """
    distance = scale = 0.0
    for want, have in zip(pytree.tree_leaves(dense), pytree.tree_leaves(other), strict=True):
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            both = torch.isfinite(want) & torch.isfinite(have)
            a, b = want[both].double(), have[both].double()
            distance += float((a - b).square().sum())
            scale += float(a.square().sum())
    distance, scale = everyone.total("outputs", distance, scale)
    return math.sqrt(distance / scale) if scale else 0.0


def cheapest_first(
    candidates: Sequence[Branch | Block], scores: Mapping[str, float], saved: Mapping[str, float]
) -> list[Branch | Block]:
    """Candidates by influence per saved cost, ascending, without those that save nothing.

    Args:
        candidates: Branches or blocks.
        scores: Their influence.
        saved: What dropping each saves of the budget.
    """
    useful = [c for c in candidates if saved[c.name] > 0]
    return sorted(useful, key=lambda c: scores[c.name] / saved[c.name])
