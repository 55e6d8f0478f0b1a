"""A second length or image size: the smaller model follows the dense one there, step by step.

Both run, as they are, at the captured size and at another one that the dense model takes. No values
are compared, since what is narrowed differs, but all that Python decides is: which operators run,
with which numbers, and how the sizes of their results change from one length to the other. A module
that stands where another did at the captured size, and does not at the other one, has a length for
a width in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.clone import clone
from depcut.capture.process_state import as_captured
from depcut.errors import DepcutError
from depcut.graph.liveness import enclosing
from depcut.graph.operators import base_of
from depcut.plan.attributes import attribute_value, solve
from depcut.plan.keep import Keep
from depcut.reference.run import example
from depcut.rewrite.build import Slim
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import TorchDispatchMode, pytree
from depcut.verify.module_results import follow
from depcut.verify.replay import are_close, numbers_of

_TRIES = 6  # sizes that the dense model is asked to take


@dataclass(frozen=True)
class Step:
    """One executed operator.

    Attributes:
        number: Among all of the run.
        name: Of the operator.
        numbers: That it is called with, see `depcut.verify.replay.numbers_of`.
        sizes: Of the tensors that it returns.
    """

    number: int
    name: str
    numbers: tuple[float, ...]
    sizes: tuple[tuple[int, ...], ...]


@dataclass
class Trace:
    """What a run executes.

    Attributes:
        steps: By the module whose code executes them.
        running: Modules whose code runs, the innermost last.
        outputs: The flat outputs.
    """

    steps: dict[str, list[Step]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    count: int = 0


@dataclass(frozen=True)
class Other:
    """Inputs of another length or image size.

    Attributes:
        leaves: The flat inputs.
        dense: What the dense model executes on them.
    """

    leaves: list[Any]
    dense: Trace


@dataclass(frozen=True)
class Difference:
    """Where a smaller model does not follow the dense one.

    Attributes:
        module: Whose code it is.
        why: What it does.
    """

    module: str
    why: str


def changed_attributes(slim: Slim, model: nn.Module) -> list[tuple[int, int]]:
    """(dense value, new value) of the attributes that code of the user may take for a length.

    Those of torch's own layers are none.

    Args:
        slim: The smaller model.
        model: The dense model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    values = {
        (attribute_value(model, attribute), value)
        for attribute, value in solve(slim.keep, model).values.items()
        if not type(modules[attribute[0]]).__module__.startswith("torch.")
    }
    return sorted((old, new) for old, new in values if old is not None and old != new)


def other_inputs(
    keep: Keep, model: nn.Module, changed: Sequence[tuple[int, int]] = ()
) -> list[Other]:
    """Inputs of other lengths or image sizes, which the dense model takes.

    All dimensions of one size change together, in all inputs; never the batch.

    Args:
        keep: Whose program's inputs.
        model: The dense model.
        changed: Old and new values of numbers that may be compared with a length.

    Returns:
        At most one of a shorter length, and one of a length between an old and a new number.
    """
    leaves = pytree.tree_leaves(example(keep, rows=1))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = sorted({n for t in tensors for n in t.shape[1:] if n > 1}, reverse=True)
    middles = list(dict.fromkeys((old + new + 1) // 2 for old, new in changed))
    between = [(n, other) for other in middles for n in found if n != other]
    shorter = [(n, n // 2) for n in found if n >= 4]
    shorter += [(n, n - 1 if n > 2 else n + 1) for n in found]
    out = []
    for tried in (between, shorter):
        for size, other in tried[:_TRIES]:
            changed_leaves = [_resized(leaf, size, other) for leaf in leaves]
            trace = _taken(model, keep, changed_leaves)
            if trace is not None:
                out.append(Other(changed_leaves, trace))
                break
    return out


def _taken(model: nn.Module, keep: Keep, leaves: Sequence[Any]) -> Trace | None:
    """What a model executes on inputs; None where it does not take them."""
    try:
        return traced(model, keep, leaves)
    except Exception as error:  # noqa: BLE001  whatever the model's code raises: it does not
        reraise_fatal(error)
        return None


def _resized(leaf: Any, size: int, other: int) -> Any:
    """A tensor with every dimension of one size but the first cut, or repeated, to another."""
    if not isinstance(leaf, Tensor):
        return leaf
    for dim in range(1, leaf.ndim):
        if leaf.shape[dim] == size:
            leaf = torch.cat([leaf] * -(-other // size), dim).narrow(dim, 0, other)
    return leaf.clone()


def traced(
    model: nn.Module,
    keep: Keep,
    leaves: Sequence[Any] | None = None,
    trace: Trace | None = None,
) -> Trace:
    """Run a clone of a model as it is.

    Args:
        model: The model; it is only read.
        keep: Whose program's inputs.
        leaves: Flat inputs; None: one row of the captured ones.
        trace: To write to, so that it can be read when the model raises.
    """
    trace = Trace() if trace is None else trace
    args, kwargs = example(keep, leaves=leaves, rows=1 if leaves is None else None)
    seen = clone(model, buffers=True)
    for name, module in seen.named_modules():
        follow(trace, name, module)
    with torch.no_grad(), as_captured(), _Tracer(trace):
        trace.outputs = list(pytree.tree_leaves(seen(*args, **kwargs)))
    return trace


class _Tracer(TorchDispatchMode):
    """Writes down what is executed."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute one operator."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        trace = self._trace
        results = out if isinstance(out, list | tuple) else (out,)
        sizes = tuple(tuple(r.shape) for r in results if isinstance(r, Tensor))
        step = Step(trace.count, base_of(func), numbers_of(func, args, kwargs), sizes)
        trace.count += 1
        trace.steps.setdefault(trace.running[-1] if trace.running else "", []).append(step)
        return out


def differs_at(slim: Slim, other: Other, dense: Trace, first: Trace) -> Difference | None:
    """Where the smaller model does not follow the dense one at another length, if anywhere.

    Args:
        slim: The smaller model, which is right at the captured sizes.
        other: Inputs of that length.
        dense: What the dense model executes on one row of the captured inputs.
        first: What the smaller one does.

    Returns:
        None where it does, and where it is a generated module that refuses the other length.
    """
    second = Trace()
    try:
        traced(slim.model, slim.keep, other.leaves, second)
    except DepcutError:
        return None  # a generated module says that it does not take it
    except Exception as problem:  # noqa: BLE001  whatever the model's code raises
        reraise_fatal(problem)
        open_calls = second.running or [""]
        if any(name in slim.generated for name in open_calls):
            return None
        return Difference(open_calls[-1], f"at another length, {first_line(problem)}")
    generated = {*slim.generated, *slim.inlined}
    return _difference((dense, other.dense), (first, second), generated)


def _difference(
    dense: tuple[Trace, Trace], slim: tuple[Trace, Trace], generated: Collection[str]
) -> Difference | None:
    """The first difference at the second length that was none at the first."""
    found: list[tuple[int, Difference]] = []
    for module, there in slim[1].steps.items():
        if "" in generated or any(name in generated for name in enclosing(f"{module}.")):
            continue
        steps = [t.steps.get(module, []) for t in (*dense, slim[0])]
        here = steps[2]
        if [s.name for s in steps[0]] != [s.name for s in here]:
            continue  # it computes in another way, at the captured size already
        wanted = steps[1]
        at = next(
            (i for i, (a, b) in enumerate(zip(wanted, there, strict=False)) if a.name != b.name),
            None,
        )
        if at is None and len(wanted) != len(there):
            at = min(len(wanted), len(there))
        if at is not None:
            number = there[min(at, len(there) - 1)].number
            found.append((number, Difference(module, "at another length, it takes another course")))
            continue
        if len(here) != len(there):
            continue
        for four in zip(steps[0], wanted, here, there, strict=True):
            why = _unlike(*four)
            if why:
                found.append((four[3].number, Difference(module, f"at another length, {why}")))
                break
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _unlike(dense: Step, wanted: Step, here: Step, there: Step) -> str:
    """What a step at the other length has wrong, given the same step at the captured one."""
    right = are_close(dense.numbers, here.numbers)
    if right and not are_close(wanted.numbers, there.numbers):
        return f"it computes {there.name} with {there.numbers} instead of {wanted.numbers}"
    for was, now, small, found in zip(
        dense.sizes, wanted.sizes, here.sizes, there.sizes, strict=False
    ):
        if not len(was) == len(now) == len(small) == len(found):
            continue
        for a, b, c, d in zip(was, now, small, found, strict=True):
            # What stayed at the one length stays at the other, and so does what was narrowed.
            if (a == c and b != d) or (a == b and c != d):
                return f"{there.name} returns sizes {found} where the dense model's are {now}"
    return ""
