"""The tensors of a smaller model beside the kept parts of the dense one's, bit by bit."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from depcut.capture.held import held_tensors
from depcut.errors import VerificationError
from depcut.graph.liveness import enclosing
from depcut.plan.keep import Keep
from depcut.reference.norms import estimates
from depcut.reference.slices import take


def check_tensors(
    slim: nn.Module,
    keep: Keep,
    model: nn.Module,
    within: Collection[str] | None = None,
    besides: Collection[str] = (),
) -> None:
    """Check that the smaller model's tensors are the kept parts of the dense one's.

    Args:
        slim: The smaller model.
        keep: What stays.
        model: The dense model.
        within: Only the tensors of these modules; None: all.
        besides: Names of tensors that may differ.

    Raises:
        VerificationError: A tensor is another one.
    """
    program, small = keep.coupling.program, held_tensors(slim)
    rescaled = {
        program.names.get(g) for e in keep.coupling.effects.values() for g, _, _ in e.rescales
    } | set(estimates(program).values())
    shared = {alias for name in besides for alias in program.aliases.get(name, (name,))}
    for name, tensor in held_tensors(model).items():
        if name in rescaled or name in shared or name not in small:
            continue
        if name not in keep.coupling.dims or tensor.is_meta:
            continue
        if within is not None and not any(m in within for m in ("", *enclosing(name))):
            continue
        picked = keep.tensors.get(name)
        wanted = take(tensor, picked) if picked else tensor
        if not _same(wanted.detach(), small[name].detach()):
            raise VerificationError(
                "a tensor is not the kept slice of the dense one",
                where=name,
                remedy="do not change the model while a plan is applied; please report this",
            )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaN equals itself."""
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())
