"""Check a smaller model once more when weights of it were re-solved, or constants folded."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from depcut.capture.flags import flags_as_before
from depcut.capture.held import held_tensors
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.plan.keep import Keep
from depcut.reference.run import Spared
from depcut.rewrite.copying import copied
from depcut.support.failures import reraise_fatal
from depcut.verify.compare import Found, compare
from depcut.verify.culprit import RUNTIME_ERRORS
from depcut.verify.exciting import exciting
from depcut.verify.module_results import ModuleResults, Trial, module_results
from depcut.verify.reference_values import reference_values
from depcut.verify.replay import Replay, is_drawing
from depcut.verify.tensors import check_tensors


@preserved()
@flags_as_before()
def verify_repaired(
    slim: nn.Module,
    keep: Keep,
    model: nn.Module,
    changed: Collection[str],
    *,
    spared: Spared | None = None,
) -> None:
    """Check that a repair changed what it says, and that the model computes what follows from it.

    All other tensors are the dense ones' kept parts, bit by bit. Where constants were folded, the
    outputs are those of the dense model with all but these constants zeroed. Where weights were
    re-solved, every module returns what the captured graph computes with these weights.

    Args:
        slim: The smaller model, verified before it was repaired.
        keep: What stays.
        model: The dense model.
        changed: Names of the tensors that the repair says it changed.
        spared: Where constants were folded, see `depcut.reference.run.Reference`.

    Raises:
        VerificationError: It is not so.
    """
    check_tensors(slim, keep, model, besides=changed)
    found = _compared(slim, keep, model, spared, None)
    if found.good:
        return
    if not found.message:
        try:
            exact = _compared(copied(slim, {}).double(), keep, model, spared, torch.float64)
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            exact = found
        if exact.good:
            return
    raise VerificationError(
        found.message or f"after the repair, values differ by {found.size:.3g} of their scale",
        where=found.module or type(slim).__name__,
        remedy="pass compensate=False, and please report the model",
    )


def _compared(
    slim: nn.Module,
    keep: Keep,
    model: nn.Module,
    spared: Spared | None,
    dtype: torch.dtype | None,
) -> Found:
    leaves = exciting(keep, model)
    trial = Trial(None, dtype, leaves, deep=spared is None)
    draws = is_drawing(keep.coupling.program)
    expected = reference_values(
        keep,
        model,
        trial,
        looks=draws,
        sliced=spared is None,
        tensors=_tensors(slim, keep) if spared is None else None,
        spared=spared,
    )
    replay = Replay(keep, expected.recording, sliced=spared is None) if draws else None
    seen = module_results(slim, keep, trial, replay)
    if spared is not None:
        seen = ModuleResults(seen.outputs)  # within, a norm may have absorbed a constant
    for value in seen.outputs:
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and not value.isfinite().any()
        ):
            return Found(message="no output is finite")
    return compare(keep, expected, seen, replay, double=dtype == torch.float64)


def _tensors(slim: nn.Module, keep: Keep) -> dict[str, torch.Tensor]:
    """The smaller model's own tensors; copies of those that a forward may write to."""
    parameters = keep.coupling.program.parameters
    return {
        name: tensor.detach() if name in parameters else tensor.detach().clone()
        for name, tensor in held_tensors(slim).items()
    }
