"""Fold what removed units contributed into biases, where it is a constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from depcut.capture.held import held_tensors
from depcut.plan.keep import Keep
from depcut.reference.run import Tensors
from depcut.repair.contractions import Contraction, find_contractions
from depcut.repair.other_sizes import lasting


def contributions(keep: Keep, contractions: Sequence[Contraction]) -> dict[str, Tensor]:
    """What the removed units that are constant add to each bias (or take from a running mean).

    Args:
        keep: What stays.
        contractions: What reads the groups of the dense model.

    Returns:
        By the name of the tensor, in its dense size and in double precision.
    """
    out: dict[str, Tensor] = {}
    for contraction in contractions:
        if contraction.absorber is None or contraction.fixed is None:
            continue
        assert contraction.numbers is not None
        assert contraction.weight is not None
        form, x = contraction.form, contraction.form.operands[0]
        dims = keep.coupling.env[x]
        assert isinstance(dims, tuple)
        kept = keep.indices(dims[form.channel])
        if kept is None:
            continue
        gone = np.setdiff1d(np.arange(len(contraction.numbers)), kept)
        numbers = torch.zeros_like(contraction.numbers)
        at = torch.from_numpy(gone).to(numbers.device)
        numbers[at] = contraction.numbers[at]
        if not bool(numbers.any()):
            continue
        shape = [1] * len(form.labels[0])
        shape[form.channel] = -1
        added = form.sum_to(form.out, [numbers.reshape(shape), contraction.weight.double()])
        out[contraction.absorber.tensor] = contraction.absorber.sign * added
    return out


def absorbed(contractions: Sequence[Contraction]) -> dict[fx.Node, tuple[fx.Node, int, Tensor]]:
    """Where removed constant units go on to contribute, see `depcut.reference.run.Reference`.

    Args:
        contractions: What reads the groups of the dense model.
    """
    return {
        c.node: (c.form.operands[0], c.form.channel, c.fixed)
        for c in contractions
        if c.absorber is not None and c.fixed is not None
    }


def may_fold(keep: Keep, model: nn.Module | Tensors) -> bool:
    """Whether a removed unit may be a constant: whether a parameter that makes one is zero there.

    Args:
        keep: What stays of the dense model.
        model: The dense model, or its tensors by name.
    """
    held = held_tensors(model) if isinstance(model, nn.Module) else model
    for group in keep.coupling.groups:
        if group.index not in keep.units:
            continue
        for member in group.members:
            tensor = held.get(member.tensor)
            picked = keep.tensors.get(member.tensor, ())
            if member.role != "producer" or tensor is None or tensor.is_meta or not picked:
                continue
            kept = picked[member.dim]
            owned = member.tensor in keep.coupling.program.parameters
            if kept is None or kept.ndim > 1 or not owned:
                continue
            others = [d for d in range(tensor.ndim) if d != member.dim]
            zero = ((tensor == 0).all(others) if others else tensor == 0).cpu().numpy()
            # A bias that is zero says nothing, a scale does, and so does a row of a weight.
            if zero.any() and not zero.all() and np.delete(zero, kept).any():
                return True
    return False


def foldable(keep: Keep, model: nn.Module) -> tuple[Contraction, ...]:
    """What reads the groups, with the constants of removed units that are ones at any input size.

    Args:
        keep: What stays of the dense model.
        model: The dense model.
    """
    contractions = find_contractions(keep.coupling, model)
    if contributions(keep, contractions):
        return lasting(keep.coupling.program, model, contractions)
    return contractions


def fold_constants(
    keep: Keep, model: nn.Module, slim: nn.Module, contractions: Sequence[Contraction] | None = None
) -> tuple[str, ...]:
    """Add to the biases of a slim model what its removed units contributed as constants.

    Exact for every unit whose value depends neither on the input nor on its size; of the others
    nothing is folded.

    Args:
        keep: What stays of the dense model.
        model: The dense model.
        slim: The smaller model; its biases and running means change.
        contractions: What reads the groups, if that is known already.

    Returns:
        Names of the tensors that changed.
    """
    if contractions is None:
        contractions = foldable(keep, model)
    held, changed = held_tensors(slim), []
    for name, dense in contributions(keep, contractions).items():
        if name not in held:
            continue
        picked = keep.tensors.get(name, (None,))[0]
        at = slice(None) if picked is None else torch.from_numpy(picked).to(dense.device)
        with torch.no_grad():
            held[name].copy_(held[name].double() + dense[at])
        changed.append(name)
    return tuple(changed)
