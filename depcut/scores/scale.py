"""Criteria from learned scales: |gamma| of norms and other per-channel factors."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from depcut.graph.arguments import argument, has_argument
from depcut.graph.operators import is_operator
from depcut.ops.kinds import NORMS, SCALINGS
from depcut.scores.aggregate import by_element, compared, members, totals
from depcut.scores.context import Context, Scores, criterion
from depcut.scores.magnitude import l2


def scales(context: Context) -> set[str]:
    """Canonical names of the parameters that scale activations index by index.

    Weights of norm operators, and parameters that an activation is multiplied with (norms written
    out, layer scale), as the graph has them.

    Args:
        context: The captured model.
    """
    program = context.coupling.program
    scaling = set()
    for node in program.graph.graph.nodes:
        if not is_operator(node):
            continue
        if node.target in SCALINGS:
            factors = [a for a in node.args if isinstance(a, fx.Node)]
            names = {program.tensors.get(a) for a in factors}
            # A parameter times a parameter is a weight in the making, not a scaled activation.
            named = names if None in names else set()
        elif node.target in NORMS:
            weight = argument(node, "weight") if has_argument(node, "weight") else None
            named = {program.tensors.get(weight) if weight is not None else None}
        else:
            continue
        scaling |= {context.canonical[n] for n in named if n in context.canonical}
    return scaling


@criterion("bn", aggregate="mean")
def bn(context: Context) -> Scores:
    """Network slimming: |gamma| of the norms that scale a unit, their mean if there are several.

    The norms are found in the graph: batch, layer, group and RMS norm, and parameters that an
    activation is multiplied with. A group without any has its L2 norm instead; with the default
    "mean" normalisation both have a mean of one.
    In a transformer the norms scale the residual stream alone: the score leaves out the weights of
    the layers that read it.
    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
    ICCV 2017. Needs no data, but training with a penalty on |gamma| to mean much.
    """
    names = scales(context)
    gammas = by_element({n: w.abs() for n, w in context.weights.items() if n in names})
    covered = {n for groups in members(context, names).values() for n in groups}
    scaled = compared(context, totals(context, gammas, names))
    # The norms that scale a unit are a mean; all that it owns is a sum.
    whole = l2(replace(context, score=replace(context.score, aggregate="sum")))
    return [
        scaled[g.index] if g.index in covered else whole[g.index] for g in context.coupling.groups
    ]
