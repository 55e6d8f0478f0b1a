"""Check a smaller model against the dense one with the consumer-side slices zeroed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from depcut.capture.flags import flags_as_before
from depcut.capture.program import parent_of, stack_entries, where
from depcut.capture.random_state import preserved
from depcut.errors import InputError, VerificationError
from depcut.plan.keep import Keep
from depcut.reference.run import masked_outputs
from depcut.rewrite.build import Slim
from depcut.rewrite.copying import copied
from depcut.rewrite.observe import observe
from depcut.support.closeness import relative_error
from depcut.support.failures import first_line, reraise_fatal
from depcut.verify.compare import CERTAIN, Expected, Found, compare
from depcut.verify.culprit import RUNTIME_ERRORS, culprits
from depcut.verify.equal import verify_equal
from depcut.verify.exciting import exciting
from depcut.verify.lengths import (
    Difference,
    Other,
    Trace,
    changed_attributes,
    differs_at,
    other_inputs,
    traced,
)
from depcut.verify.module_results import Trial, module_results, run_plain
from depcut.verify.precision import TOLERANCE, is_half
from depcut.verify.reference_values import reference_values
from depcut.verify.replay import Replay, is_drawing
from depcut.verify.tensors import check_tensors

__all__ = ["TOLERANCE", "masked_outputs", "verify", "verify_equal"]

_WITH_WEIGHTS = "apply the plan to the model with its weights, where depcut can repair this"


@preserved()
@flags_as_before()
def verify(slim: Slim, model: nn.Module) -> float:
    """Check the smaller model, generating the modules that turn out not to express their sizes.

    Args:
        slim: The rewritten model; its `model` and `generated` may change.
        model: The dense model.

    Returns:
        The largest difference from the reference, relative to the output's scale; NaN where the
        weights are on the meta device and the model's code does not run there.

    Raises:
        VerificationError: The smaller model computes something else.
    """
    if _on_meta(model):
        return _verify_shapes(slim, model)
    return _Verification(slim, model).run()


@dataclass(frozen=True)
class Attempt:
    """Result of one comparison.

    Attributes:
        found: What it found.
        problem: The exception behind it.
        beside: Whether only a run without hooks fails: code around a generated module relies on
            more than calling it, e.g. on a fast path of torch.
    """

    found: Found
    problem: Exception | None = None
    beside: bool = False


def _failed(problem: Exception) -> Found:
    return Found(math.inf, math.inf, False, first_line(problem))


@dataclass
class _Verification:
    """The comparisons of one smaller model, and what is done about their results.

    Attributes:
        slim: The smaller model; modules of it are generated.
        model: The dense model.
        suspect: The module that was wrong first.
        follows: Whether other lengths are tried; None: not known yet.
        others: Inputs of other lengths.
    """

    slim: Slim
    model: nn.Module
    suspect: str | None = None
    follows: bool | None = None
    others: list[Other] = field(default_factory=list)
    _expected: dict[Trial, Expected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keep = self.slim.keep
        program = self.keep.coupling.program
        self.draws = is_drawing(program)
        leaves = exciting(self.keep, self.model)
        batch = program.batch
        # All rows are tried where fewer fail: a graph may insist on more.
        self.trials = [Trial(leaves=leaves, deep=True)]
        if program.dynamic:
            self.trials = [Trial(1, leaves=leaves, deep=True), Trial(min(2, batch), leaves=leaves)]
            self.whole = Trial(leaves=leaves)
        else:
            self.whole = self.trials[0]

    def run(self) -> float:
        """Compare until nothing is wrong; the largest difference of what was accepted.

        Raises:
            VerificationError: What is wrong cannot be generated.
        """
        while True:
            attempt = self._compared()
            if attempt.found.good:
                difference = self._elsewhere()
                if difference is not None:
                    _replace(self.slim, [difference.module], difference.why)
                    continue
                wrong = self._other_numbers() if attempt.found.size > CERTAIN else []
                if not wrong:
                    return attempt.found.size
                _replace(self.slim, wrong, "its code computes with other numbers at the new sizes")
                continue
            if attempt.beside:
                for name in [n for n in self.slim.generated if n]:
                    why = f"its code does more with {name!r} than call it"
                    self.slim.replace(parent_of(name), why)
                continue
            self._deal_with(attempt)

    def _elsewhere(self) -> Difference | None:
        """Where it does not follow the dense model at another length, if anywhere.

        Slicing parameters does not depend on a length, nor do the attributes of torch's own
        layers; what is generated refuses other lengths itself.
        """
        if self.follows is None:
            changed = changed_attributes(self.slim, self.model)
            self.follows = bool(changed or self.slim.patched)
            if self.follows:
                self.others = other_inputs(self.keep, self.model, changed)
        return self._first_difference() if self.follows else None

    def _other_numbers(self) -> list[str]:
        """Modules of which the rounding of half precision may hide that a number is wrong.

        A scale of attention may be off by a seventh, and its outputs by less than they are rounded:
        the numbers themselves are compared.
        """
        if not is_half(self._precision):
            return []
        done = {*self.slim.generated, *self.slim.inlined, *self.slim.fitted, *self.slim.patched}
        wrong = observe(self.slim.model, self.keep, done)
        return list(dict.fromkeys(m.call.module for m in wrong if m.call.module not in done))

    def _first_difference(self) -> Difference | None:
        if not self.others:
            return None
        dense, first = self._dense, traced(self.slim.model, self.keep)
        found = (differs_at(self.slim, other, dense, first) for other in self.others)
        return next((difference for difference in found if difference is not None), None)

    @cached_property
    def _dense(self) -> Trace:
        """What the dense model executes on one row of the captured inputs."""
        return traced(self.model, self.keep)

    def _compared(self) -> Attempt:
        """What was wrong in the first trial that was; else the largest difference of all."""
        worst = 0.0
        for trial in self.trials:
            attempt = self._try(trial)
            if not attempt.found.good:
                whole = self._try(self.whole) if trial != self.whole else attempt
                if not whole.found.good:
                    return attempt if attempt.problem is None else whole
                # What raised and does not a second time is no fault of the code.
                again = attempt if attempt.problem is None else self._try(trial)
                # A generated module says what it does not take.
                refuses = isinstance(again.problem, InputError) and bool(self.slim.generated)
                if not again.found.good and not refuses and self._holds(trial):
                    return again
                attempt = whole
            worst = max(worst, attempt.found.size)
        return Attempt(Found(worst))

    def _try(self, trial: Trial) -> Attempt:
        """One comparison, with a second look in double precision where it may be rounding."""
        attempt = self._attempt(trial)
        found = attempt.found
        if found.message or attempt.beside:
            return attempt
        if found.certain or (found.good and is_half(self._precision)):
            return attempt
        exact = self._in_double(trial)
        if exact is None:  # the code insists on its precision
            return attempt
        size = found.size if exact.good else max(found.size, exact.size)
        return Attempt(Found(size, exact.excess, exact.good, exact.message, exact.module))

    @property
    def _precision(self) -> torch.dtype:
        """The finest precision of the model's parameters."""
        dtypes = {p.dtype for p in self.model.parameters() if p.dtype in TOLERANCE}
        return min(dtypes, key=TOLERANCE.__getitem__, default=torch.float32)

    def _attempt(self, trial: Trial) -> Attempt:
        try:
            expected = self._reference(trial)
            found = self._against(self.slim.model, expected, trial)
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return Attempt(_failed(problem), problem)
        if not found.good or not self.slim.generated:
            return Attempt(found)
        replay = Replay(self.keep, expected.recording) if self.draws else None
        try:
            # Hooks switch fast paths off, so run once as users do.
            outputs = run_plain(self.slim.model, self.keep, trial, replay)
            results = self.keep.coupling.program.results
            size, message = relative_error(results.of(expected.outputs), results.of(outputs))
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return Attempt(_failed(problem), problem, beside=True)
        limit = max(TOLERANCE[torch.float32], TOLERANCE[self._precision], 2 * found.size)
        if message or size > limit:
            return Attempt(Found(size, math.inf, False, message), beside=True)
        check_tensors(self.slim.model, self.keep, self.model, self.slim.generated)
        found.size = max(found.size, size)
        return Attempt(found)

    def _against(self, candidate: nn.Module, expected: Expected, trial: Trial) -> Found:
        looks = trial.deep or self.draws
        replay = Replay(self.keep, expected.recording) if looks else None
        seen = module_results(candidate, self.keep, trial, replay)
        return compare(self.keep, expected, seen, replay, double=trial.dtype == torch.float64)

    def _reference(self, trial: Trial) -> Expected:
        """The reference's values; those of one row and of single precision are kept."""
        if trial not in self._expected:
            made = reference_values(self.keep, self.model, trial, looks=trial.deep or self.draws)
            if trial.rows != 1 or trial.dtype is not None:
                return made
            self._expected[trial] = made
        return self._expected[trial]

    def _in_double(self, trial: Trial) -> Found | None:
        """The comparison in double precision, where rounding vanishes; None: it cannot be had."""
        double = Trial(trial.rows, torch.float64, trial.leaves, trial.deep)
        try:
            expected = self._reference(double)
            return self._against(copied(self.slim.model, {}).double(), expected, double)
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return None

    def _holds(self, trial: Trial) -> bool:
        """Whether the captured graph is what the dense model computes on a trial's inputs."""
        whole = Keep(self.keep.coupling, {})
        try:
            expected = reference_values(whole, self.model, trial, looks=self.draws)
            replay = Replay(whole, expected.recording) if self.draws else None
            seen = module_results(self.model, whole, trial, replay)
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return False
        size, message = relative_error(expected.outputs, seen.outputs)
        return not message and not seen.shape and size <= TOLERANCE[self._precision]

    def _deal_with(self, attempt: Attempt) -> None:
        """Generate the modules that are wrong.

        Raises:
            VerificationError: The whole model is generated already, or cannot be.
        """
        found = attempt.found
        wrong = self._wrong(found)
        self.suspect = wrong[0] if self.suspect is None else self.suspect
        if "" in self.slim.generated:
            raise VerificationError(
                found.message or f"outputs differ by {found.size:.3g} of their scale",
                where=_place(self.keep, self.suspect),
                remedy="keep the layers concerned with ignore=; please report the model",
            ) from attempt.problem
        why = found.message or "its code computes other values at the new sizes"
        _replace(self.slim, wrong, why)

    def _wrong(self, found: Found) -> list[str]:
        """Names of modules that are wrong.

        Raises:
            VerificationError: The captured graph itself cannot be narrowed.
        """
        limit, named = TOLERANCE[self._precision], found.module
        known = named is not None and named not in {*self.slim.generated, *self.slim.inlined}
        if known and found.size <= limit:
            return [named or ""]  # in single precision, rounding would name others beside it
        try:
            wrong = culprits(
                self.slim, self.model, CERTAIN if found.size <= limit else limit, self.whole
            )
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            raise VerificationError(
                f"the captured graph cannot be narrowed: {first_line(problem)}",
                where=_place(self.keep, self.suspect or ""),
                remedy="a rule is wrong: keep the layers concerned with ignore=, and report it",
            ) from problem
        return [named or ""] if known and wrong == [""] else wrong


def _replace(slim: Slim, names: Sequence[str], why: str) -> None:
    """Patch modules, all at once, or generate them: those not dealt with on the way."""
    done = {*slim.generated, *slim.inlined, *slim.patched}
    slim.patch({name: why for name in names if name not in done} or {names[0]: why})
    for name in names:
        if name in slim.patched and name not in done:
            continue
        if name == names[0] or (name not in slim.generated and name not in slim.inlined):
            slim.replace(name, why)


def _on_meta(model: nn.Module) -> bool:
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def _verify_shapes(slim: Slim, model: nn.Module) -> float:
    """Without values, shapes are compared, as far as the model's code runs without values.

    Returns:
        0.0 where the shapes agree, NaN where the dense model does not run on the meta device.
    """
    try:
        module_results(model, Keep(slim.keep.coupling, {}), Trial())
    except RUNTIME_ERRORS as problem:
        reraise_fatal(problem)
        return math.nan
    try:
        seen = module_results(slim.model, slim.keep, Trial())
    except RUNTIME_ERRORS as problem:
        reraise_fatal(problem)
        raise VerificationError(
            first_line(problem), where="a model on the meta device", remedy=_WITH_WEIGHTS
        ) from problem
    if seen.shape:
        raise VerificationError(
            seen.shape,
            where="a model on the meta device",
            remedy=_WITH_WEIGHTS,
        )
    return 0.0


def _place(keep: Keep, name: str) -> str:
    nodes = [n for n in keep.coupling.effects if name in stack_entries(n)]
    return where(nodes[0]) if nodes else "the whole model"
