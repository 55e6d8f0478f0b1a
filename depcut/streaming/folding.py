"""What removed units contribute as constants, folded into the biases of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from depcut.capture.random_state import preserved
from depcut.coupling.groups import Coupling
from depcut.graph.arguments import argument, has_argument
from depcut.graph.operators import is_aten
from depcut.ops.normalization import is_batch_norm
from depcut.plan.keep import Keep
from depcut.reference.run import Spared
from depcut.reference.slices import take
from depcut.repair.contractions import Contraction, find_contractions
from depcut.repair.folding import absorbed, contributions, may_fold
from depcut.repair.other_sizes import lasting
from depcut.streaming.check import drawn_inputs
from depcut.streaming.structure import on_cpu
from depcut.streaming.weights import Single


@dataclass(frozen=True, eq=False)
class Folded:
    """Biases and running means that took over constants.

    Attributes:
        tensors: The narrowed ones, as they are stored.
        spared: Where removed units go on to contribute, see `depcut.reference.run.Reference`.
        shifts: What the result of a node lacks, whose batch norm makes up for it: by feature that
            stays, in the second dimension.
        rounded: Nodes that read such a tensor, with the precision that it was rounded to.
    """

    tensors: Mapping[str, Tensor]
    spared: Spared
    shifts: Mapping[fx.Node, Tensor]
    rounded: Mapping[fx.Node, torch.dtype]


def folded(keep: Keep, dense: nn.Module, weights: Mapping[str, Tensor]) -> Folded | None:
    """Fold what can be folded, as `depcut.repair.folding` does it for a model in memory.

    Args:
        keep: What stays.
        dense: The model on the meta device.
        weights: Its tensors, as they are stored; read one by one.

    Returns:
        None where nothing is changed.
    """
    coupling = keep.coupling
    if len(coupling.calls) > 1 or not _takes_constants(coupling) or not may_fold(keep, weights):
        return None
    added: dict[str, Tensor] = {}

    def noted(contraction: Contraction) -> Contraction:
        added.update(contributions(keep, [contraction]))
        return _light(contraction)

    def found(other: Coupling) -> tuple[Contraction, ...]:
        on_cpu(other.program)
        return find_contractions(other, single, drawn_inputs(other.program), _light)

    single = Single(weights)
    with preserved():
        contractions = find_contractions(coupling, single, drawn_inputs(coupling.program), noted)
        if not added:
            return None
        contractions = lasting(coupling.program, dense, contractions, found)
    by_name = {c.absorber.tensor: c for c in contractions if c.absorber and c.fixed is not None}
    tensors, shifts, rounded = {}, {}, {}
    for name, whole in added.items():
        if name not in by_name:
            continue
        kept = keep.tensors.get(name, (None,))
        stored = weights[name]
        constants = take(whole, kept)
        tensors[name] = (take(stored, kept).double() + constants).to(stored.dtype)
        contraction = by_name[name]
        node, absorber = contraction.node, contraction.absorber
        if absorber is not None and absorber.sign < 0:  # the mean of the batch norm that follows
            shifts[node] = -constants
            (node,) = node.users
        rounded[node] = stored.dtype
    return Folded(tensors, absorbed(contractions), shifts, rounded) if tensors else None


def _takes_constants(coupling: Coupling) -> bool:
    """Whether anything that sums over units has a bias, or is followed by a batch norm."""
    for node, effects in coupling.effects.items():
        if not effects.contracts or node.op != "call_function":
            continue
        if is_aten(node, "addmm") or any(is_batch_norm(user) for user in node.users):
            return True
        if has_argument(node, "bias") and isinstance(argument(node, "bias"), fx.Node):
            return True
    return False


def _light(contraction: Contraction) -> Contraction:
    """A contraction without what takes memory."""
    weight = contraction.weight
    light = None if weight is None else weight.new_empty(0)
    return replace(contraction, live=(), weight=light)
