"""Check a smaller model that is to compute what the dense one does, nothing zeroed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depcut.capture.flags import flags_as_before
from depcut.capture.random_state import preserved
from depcut.errors import DepcutError, VerificationError
from depcut.plan.keep import Keep
from depcut.rewrite.copying import copied
from depcut.support.failures import first_line, reraise_fatal
from depcut.verify.compare import Expected, Found, compare
from depcut.verify.culprit import RUNTIME_ERRORS
from depcut.verify.exciting import exciting
from depcut.verify.lengths import other_inputs
from depcut.verify.module_results import ModuleResults, Trial, module_results, run_plain
from depcut.verify.reference_values import reference_values
from depcut.verify.replay import Replay, is_drawing


@preserved()
@flags_as_before()
def verify_equal(slim: nn.Module, keep: Keep, model: nn.Module) -> float:
    """Check that the smaller model computes what the dense one does, nothing zeroed.

    It is run on the captured inputs, on drawn ones where these are constant, and on inputs of
    another length or image size where the dense model takes them.

    Args:
        slim: The smaller model.
        keep: What stays.
        model: The dense model.

    Returns:
        The largest difference of an output, relative to the output's scale.

    Raises:
        VerificationError: They differ by more than rounding.
    """
    check = _Equal(slim, keep, model)
    size, drawn = check.size(Trial()), exciting(check.whole, model)
    if drawn is not None:
        size = max(size, check.size(Trial(leaves=drawn)))
    for other in [] if check.draws else other_inputs(keep, model):
        check.elsewhere(Trial(leaves=tuple(other.leaves)))
    return size


class _Equal:
    """The comparisons of one smaller model.

    Args:
        slim: The smaller model.
        keep: What stays.
        model: The dense model.
    """

    def __init__(self, slim: nn.Module, keep: Keep, model: nn.Module) -> None:
        self.slim, self.keep, self.model = slim, keep, model
        self.whole = Keep(keep.coupling, {})
        self.draws = is_drawing(keep.coupling.program)

    def size(self, trial: Trial) -> float:
        """The largest difference from the captured graph's outputs.

        Raises:
            VerificationError: It is more than rounding.
        """
        found = self._against_graph(self.slim, trial)
        if not found.good and (found.message or not self._is_rounding(trial)):
            _refuse(found, "")
        return found.size

    def elsewhere(self, trial: Trial) -> None:
        """Compare with the dense model itself, on inputs that the graph was not captured for.

        Raises:
            VerificationError: The smaller model differs, or raises something that is not a refusal.
        """
        try:
            found = self._against_model(trial)
            if not found.good and not found.message:
                exact = self._against_model(Trial(dtype=torch.float64, leaves=trial.leaves))
                found = exact if exact.good else found
        except DepcutError:
            return  # a generated module refuses what it was not captured for
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            found = Found(message=first_line(problem))
        if not found.good:
            _refuse(found, "at another length or image size, ")

    def _against_graph(self, candidate: nn.Module, trial: Trial) -> Found:
        expected = reference_values(self.whole, self.model, trial, looks=self.draws)
        replay = Replay(self.keep, expected.recording) if self.draws else None
        seen = module_results(candidate, self.keep, trial, replay)
        # Modules may return something else: units that nobody reads are gone.
        double = trial.dtype == torch.float64
        return compare(self.keep, expected, ModuleResults(seen.outputs), replay, double=double)

    def _against_model(self, trial: Trial) -> Found:
        double = trial.dtype == torch.float64
        both: list[list[Any]] = [
            run_plain(copied(m, {}).double() if double else m, self.keep, trial)
            for m in (self.model, self.slim)
        ]
        expected, seen = Expected(both[0], {}), ModuleResults(both[1])
        return compare(self.keep, expected, seen, None, double=double)

    def _is_rounding(self, trial: Trial) -> bool:
        double = Trial(dtype=torch.float64, leaves=trial.leaves)
        try:
            return self._against_graph(copied(self.slim, {}).double(), double).good
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return False


def _refuse(found: Found, where: str) -> None:
    raise VerificationError(
        where
        + (
            found.message
            or f"outputs differ from the dense model's by {found.size:.3g} of their scale"
        ),
        where="units that were taken to be dead",
        remedy="please report the model; depcut.shrink does not rely on dead units",
    )
