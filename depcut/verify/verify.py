"""Check a smaller model against the dense one with the consumer-side slices zeroed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.capture import held_tensors
from depcut.capture.clone import clone
from depcut.capture.program import parent_of, stack_entries, where
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.graph.liveness import enclosing
from depcut.graph.operators import is_random
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, Watched, example, kept_part, masked_outputs
from depcut.reference.slices import take
from depcut.rewrite.build import Slim
from depcut.rewrite.copying import copied
from depcut.support.closeness import relative_error
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree
from depcut.verify.culprit import RUNTIME_ERRORS, culprits
from depcut.verify.module_results import Trial, module_results

__all__ = ["masked_outputs", "verify", "verify_equal"]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


_ROUNDING = 0.05  # a relative difference that single precision may cause in a deep model
_WITH_WEIGHTS = "apply the plan to the model with its weights, where depcut can repair this"
_CERTAIN = 3e-6  # a smaller one needs no second look in double precision


def _is_random(keep: Keep) -> bool:
    """Whether the graph draws random numbers, so that two runs differ."""
    return any(map(is_random, keep.coupling.program.graph.graph.nodes))


def _compare(slim: Slim, expected: tuple[list[Any], Watched], trial: Trial) -> tuple[float, str]:
    """Largest relative difference of outputs and top-level children, and what is wrong besides."""
    keep = slim.keep
    seen = module_results(slim.model, keep, trial)
    outputs, watched = expected
    nodes = [n for n in seen.values if isinstance(watched.get(n), torch.Tensor)]
    inner = [kept_part(watched[n], keep, keep.coupling.env[n]) for n in nodes]
    size, message = relative_error(
        [*outputs, *inner], [*seen.outputs, *(seen.values[n] for n in nodes)]
    )
    return size, message or seen.shape


def _expected(keep: Keep, model: nn.Module, trial: Trial) -> tuple[list[Any], Watched]:
    """The reference's outputs, and its values where top-level children return."""
    top = {
        leaf
        for call in keep.coupling.program.calls
        if "." not in call.module
        for leaf in call.out_leaves
        if isinstance(leaf, fx.Node)
    }
    inputs = pytree.tree_leaves(example(keep, rows=trial.rows, dtype=trial.dtype))
    with torch.no_grad():
        return Reference(keep, model).run(inputs, trial.dtype, watch=top)


@preserved()
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
    keep, limit = slim.keep, _tolerance(slim.keep)
    random = _is_random(keep)
    trials = [Trial(rows=1), Trial()] if keep.coupling.program.dynamic else [Trial()]
    if _on_meta(model):
        return _verify_shapes(slim, model)
    suspect: str | None = None
    while True:
        for trial in trials:
            # One row decides in almost all cases; a graph may yet insist on more.
            attempt = _try(slim, model, trial, math.inf if random else limit)
            if not attempt.message and random:
                return 0.0
            sure = attempt.size <= _CERTAIN or limit > TOLERANCE[torch.float32]
            if not attempt.message and attempt.size <= limit:
                if sure or _exact(slim, model) is not False:
                    return attempt.size
                break
        if attempt.beside:
            for name in [n for n in slim.generated if n]:
                slim.replace(parent_of(name), f"its code does more with {name!r} than call it")
            continue
        if not attempt.message and limit < attempt.size < _ROUNDING and _exact(slim, model):
            return attempt.size
        try:
            wrong = culprits(slim, model, _CERTAIN if attempt.size <= limit else limit)
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            raise VerificationError(
                f"the captured graph cannot be narrowed: {first_line(problem)}",
                where=_place(keep, suspect or ""),
                remedy="a rule is wrong: keep the layers concerned with ignore=, and report it",
            ) from problem
        suspect = wrong[0] if suspect is None else suspect
        if "" in slim.generated:
            raise VerificationError(
                attempt.message or f"outputs differ by {attempt.size:.3g} of their scale",
                where=_place(keep, suspect),
                remedy="keep the layers concerned with ignore=; please report the model",
            ) from attempt.problem
        _replace(slim, wrong, attempt.message or "its code computes other values at the new sizes")


def _replace(slim: Slim, names: list[str], why: str) -> None:
    """Generate modules; of the later ones only those that have not been dealt with on the way."""
    slim.replace(names[0], why)
    for name in names[1:]:
        if name not in slim.generated and name not in slim.inlined:
            slim.replace(name, why)


@preserved()
def verify_equal(slim: nn.Module, keep: Keep, model: nn.Module) -> float:
    """Check that a smaller model computes what the dense model does, with nothing zeroed.

    Args:
        slim: The smaller model.
        keep: What stays.
        model: The dense model.

    Returns:
        The largest difference of an output, relative to the output's scale.

    Raises:
        VerificationError: They differ by more than rounding.
    """
    whole = Keep(keep.coupling, {})

    def difference(candidate: nn.Module, trial: Trial) -> tuple[float, str]:
        try:
            outputs = module_results(candidate, keep, trial).outputs
        except RUNTIME_ERRORS as problem:
            reraise_fatal(problem)
            return math.inf, first_line(problem)
        return relative_error(_expected(whole, model, trial)[0], outputs)

    size, message = difference(slim, Trial())
    if _is_random(keep) and not message:
        return 0.0
    if message or size > _tolerance(keep):
        double = Trial(dtype=torch.float64)
        if message or difference(copied(slim, {}).double(), double)[0] > _CERTAIN:
            raise VerificationError(
                message or f"outputs differ from the dense model's by {size:.3g} of their scale",
                where="units that were taken to be dead",
                remedy="please report the model; depcut.shrink does not rely on dead units",
            )
    return size


@dataclass(frozen=True)
class Attempt:
    """Result of one comparison.

    Attributes:
        size: Largest difference, relative to the output's scale.
        message: What is wrong besides.
        problem: The exception behind it.
        beside: Whether only a run without hooks fails: code around a generated module relies on
            more than calling it, e.g. on a fast path of torch.
    """

    size: float
    message: str = ""
    problem: Exception | None = None
    beside: bool = False


def _try(slim: Slim, model: nn.Module, trial: Trial, limit: float) -> Attempt:
    try:
        expected = _expected(slim.keep, model, trial)
        size, message = _compare(slim, expected, trial)
    except RUNTIME_ERRORS as problem:
        reraise_fatal(problem)
        return Attempt(math.inf, first_line(problem), problem)
    if message or size > limit or not slim.generated:
        return Attempt(size, message)
    args, kwargs = example(slim.keep, rows=trial.rows, dtype=trial.dtype)
    try:
        # Hooks switch fast paths off, so run once as users do.
        with torch.no_grad():
            result = clone(slim.model, buffers=True)(*args, **kwargs)
        plain, message = relative_error(expected[0], pytree.tree_leaves(result))
    except RUNTIME_ERRORS as problem:
        reraise_fatal(problem)
        return Attempt(math.inf, first_line(problem), problem, beside=True)
    failed = bool(message) or plain > limit
    if not failed:
        _check_tensors(slim, model)
    return Attempt(max(size, plain), message, beside=failed)


def _check_tensors(slim: Slim, model: nn.Module) -> None:
    """Within generated modules nothing can be watched, so their tensors are compared themselves."""
    program, small = slim.keep.coupling.program, held_tensors(slim.model)
    changed = {
        program.tensors.get(g)
        for e in slim.keep.coupling.effects.values()
        for g, _, _ in e.rescales
    }
    for name, tensor in held_tensors(model).items():
        inside = any(module in slim.generated for module in ("", *enclosing(name)))
        if (
            name in changed
            or not inside
            or name not in small
            or name not in slim.keep.coupling.dims
        ):
            continue
        picked = slim.keep.tensors.get(name)
        if not torch.equal(take(tensor, picked) if picked else tensor, small[name]):
            raise VerificationError(
                "a tensor is not the kept slice of the dense one",
                where=name,
                remedy="do not change the model while a plan is applied; please report this",
            )


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


def _tolerance(keep: Keep) -> float:
    """The allowed relative error: that of the coarsest precision in the graph."""
    values = (n.meta.get("val") for n in keep.coupling.program.graph.graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)


def _exact(slim: Slim, model: nn.Module) -> bool | None:
    """Whether the difference vanishes in double precision, i.e. was rounding; None: cannot tell."""
    try:
        double = Slim(copied(slim.model, {}).double(), slim.keep, model)
        trial = Trial(dtype=torch.float64)
        return _compare(double, _expected(slim.keep, model, trial), trial)[0] < 1e-6
    except RUNTIME_ERRORS as problem:
        reraise_fatal(problem)
        return None  # the code insists on a precision


def _place(keep: Keep, name: str) -> str:
    nodes = [n for n in keep.coupling.effects if name in stack_entries(n)]
    return where(nodes[0]) if nodes else "the whole model"
