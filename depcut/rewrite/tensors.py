"""Slice parameters and buffers, and copy everything else around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depcut.capture.held import attribute, held_tensors
from depcut.capture.part import whole_of
from depcut.capture.plain import origin_of, spread_by
from depcut.plan.keep import Keep
from depcut.reference.norms import estimate, estimates, kept_alone
from depcut.reference.slices import take
from depcut.rewrite.copying import copied, like
from depcut.support.mapped import in_file


def narrowed_copy(model: nn.Module, keep: Keep) -> nn.Module:
    """A deep copy of the model in which only the kept indices of every tensor exist.

    Tied tensors stay tied, hooks and attributes are copied, no dense tensor is copied on the way.
    Of a model that is sharded, the parameters go into files one after the other.

    Args:
        model: The dense model.
        keep: What stays.
    """
    in_files = spread_by(origin_of(whole_of(model))) == "fully_shard"
    memo: dict[int, Any] = {}
    held = held_tensors(model)
    for name, picked in keep.tensors.items():
        old = held.get(name)
        if old is not None and id(old) not in memo:
            new = take(old, picked)
            placed = in_file(new) if in_files and isinstance(old, nn.Parameter) else new
            memo[id(old)] = like(old, placed)
    for old in held.values() if in_files else ():
        if id(old) not in memo and isinstance(old, nn.Parameter):
            memo[id(old)] = like(old, in_file(old))
    slim: nn.Module = copied(model, memo)
    _rescale(model, slim, keep)
    _restore_norms(held, slim, keep)
    return slim


def _restore_norms(held: dict[str, torch.Tensor], slim: nn.Module, keep: Keep) -> None:
    """Scale a factor of each spectral norm so that the norm, in eval mode, is the dense one's."""
    program = keep.coupling.program
    for node, name in estimates(program).items():
        if held[name].is_meta:
            continue
        dense = estimate(node, program, lambda n: held[n].detach())
        small = estimate(node, program, kept_alone(held, keep.tensors))
        if float(small) != float(dense) and float(small) != 0.0:
            attribute(slim, name).mul_(dense / small)


def _rescale(model: nn.Module, slim: nn.Module, keep: Keep) -> None:
    """Scale the magnitudes of weight norm so that the kept part of each weight is unchanged."""
    names, done = keep.coupling.program.names, set()
    for effects in keep.coupling.effects.values():
        for g_node, v_node, dim in effects.rescales:
            g, v = names.get(g_node), names.get(v_node)
            if g is None or v is None or v not in keep.tensors or g in done:
                continue
            done.add(g)
            picked = keep.tensors[v]
            dense, small = attribute(model, v).detach(), attribute(slim, v).detach()
            others = [i for i in range(dense.ndim) if i != dim]  # of -1: all
            before = torch.linalg.vector_norm(dense, dim=others, keepdim=True)
            if dim >= 0 and picked[dim] is not None:
                at = torch.from_numpy(picked[dim]).to(dense.device)
                before = before.index_select(dim, at)
            after = torch.linalg.vector_norm(small, dim=others, keepdim=True)
            attribute(slim, g).data.mul_(
                (after / before.clamp_min(1e-12)).reshape(attribute(slim, g).shape)
            )
