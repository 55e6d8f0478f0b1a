"""The check by value of a model of which one part was made smaller, captured alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.eager import user_line
from depcut.capture.flags import flags_as_before
from depcut.capture.inputs import Call
from depcut.capture.process_state import as_captured, quiet
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError, in_call
from depcut.support.closeness import relative_error, unequal
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

_TOLERANCE = 1e-4  # the same code on the same values: what atomic sums may differ by


def verify_whole(slim: nn.Module, dense: nn.Module, part: str, calls: tuple[Call, ...]) -> str:
    """Compare the whole with the dense one in which the part returns what the smaller one does.

    They agree where the whole reaches the part by its call alone.

    Args:
        slim: The whole with the smaller part.
        dense: The dense model.
        part: Name of the part.
        calls: What the whole gets, by example call.

    Returns:
        Why the whole could not be compared, in words; empty where it was.

    Raises:
        VerificationError: The whole computes something else, or fails.
    """
    for number, call in enumerate(calls):
        with in_call(number, len(calls)):
            problem = _compare(slim, dense, part, call)
            if problem:
                return problem
    return "" if calls else "the whole model was not run, for want of inputs= of its own"


def _compare(slim: nn.Module, dense: nn.Module, part: str, call: Call) -> str:
    """One example call; why the dense model does not survive it."""
    returned: list[Any] = []

    def note(_: nn.Module, _args: Any, result: Any) -> None:
        returned.append(pytree.tree_map(_copied, result))

    got, failed = _run(slim, part, call, note)
    replies = iter(returned)

    def reply(_: nn.Module, _args: Any, result: Any) -> Any:
        return next(replies, result)

    wanted, problem = _run(dense, part, call, reply)
    if problem is not None:
        line = user_line(problem, dense)
        return (
            f"the model itself raises {first_line(problem)} on these inputs at {line}; the part "
            "was compared, the whole was not"
        )
    if failed is None:
        error, why = relative_error(wanted, got)
        why = why or _unequal(wanted, got)
        if error <= _TOLERANCE and not why:
            return ""
        why = why or f"its outputs differ by {error:.2g} of their scale"
    else:
        why = f"it raises {first_line(failed)} at {user_line(failed, slim)}"
    raise VerificationError(
        f"the whole model does not compute what it should with the smaller {part!r}: {why}",
        where=part,
        remedy="its code uses more of the part than what the part returns (modules or weights "
        "inside of it): name a part that holds all of that",
    )


def _run(
    model: nn.Module, part: str, call: Call, hook: Any
) -> tuple[list[Any], BaseException | None]:
    """Flat outputs of a clone, with a hook on its part; what it raised."""
    seen = clone(model, buffers=True)
    seen.get_submodule(part).register_forward_hook(hook)
    args, kwargs = cloned_arguments(call)
    try:
        with preserved(), flags_as_before(), quiet(), as_captured(), torch.no_grad():
            torch.manual_seed(0)
            return list(pytree.tree_leaves(seen(*args, **kwargs))), None
    except Exception as error:  # noqa: BLE001  the caller judges it
        reraise_fatal(error)
        return [], error


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _unequal(wanted: list[Any], got: list[Any]) -> str:
    """Outputs that are no real numbers and differ."""
    for want, have in zip(wanted, got, strict=True):
        if isinstance(want, torch.Tensor) and not want.is_floating_point():
            share = 0.0 if want.is_meta or want.is_complex() else unequal(want, have)
            if share:
                return f"{share:.0%} of an output of {want.dtype} differ"
    return ""
