"""The architecture a plan was made for: a hash of tensors and groups, the example inputs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from depcut.capture.eager import refuse_failing_call
from depcut.capture.inputs import device_of
from depcut.capture.results import EVERY, Names
from depcut.coupling.groups import Coupling
from depcut.errors import CallError, PlanError
from depcut.support.failures import first_line, shown
from depcut.support.torch_private import pytree

_MOST = 2**28  # elements of an example that is made from a record


def sizes_of(shape: Any, what: str) -> list[int]:
    """Sizes as a file records them.

    Args:
        shape: What stands there.
        what: What it is, for messages.

    Raises:
        ValueError: They are no sizes.
    """
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"the {what} are {shown(shape)}")
    return shape


def check_described(inputs: Any) -> None:
    """Refuse what is no record of example inputs, before anything is made from it.

    Args:
        inputs: What a file holds in its place.

    Raises:
        ValueError: It is something else; a RecursionError where it is nested too deeply.
    """
    if not (
        isinstance(inputs, dict)
        and {"args", "kwargs"} <= inputs.keys() <= {"args", "kwargs", "others", "outputs"}
        and isinstance(inputs["args"], list)
        and isinstance(inputs["kwargs"], dict)
        and not _is_tensor(inputs["kwargs"])
    ):
        raise ValueError("the inputs are no list of arguments with a dictionary of others")
    if not isinstance(outputs_of(inputs), tuple):
        raise ValueError("the outputs that count are no list of names")
    others = inputs.get("others", [])
    if not isinstance(others, list):
        raise ValueError("the other example calls are no list")
    for call in others:
        check_described(call)
    for leaf in pytree.tree_leaves([inputs["args"], inputs["kwargs"]], is_leaf=_is_tensor):
        if not _is_tensor(leaf):
            continue
        sizes_of(leaf["shape"], "sizes of an input")
        name = leaf.get("dtype")
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        if leaf.keys() != {"shape", "dtype"} or not isinstance(dtype, torch.dtype):
            raise ValueError(f"an input has the data type {shown(name)}")


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, dict) and "shape" in leaf


def outputs_of(inputs: Any) -> Names | None:
    """Names of the outputs that count, in all example calls; None where they are no such names.

    Args:
        inputs: As `PlanData.inputs`; of plans that name none, all count.
    """
    names = inputs.get("outputs", list(EVERY))
    plain = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
    return tuple(names) if plain else None


def example_of(inputs: Any, model: nn.Module) -> Any:
    """Inputs of recorded shapes: small integers for ids, noise for the rest.

    Floating-point ones are of the recorded precision, or of the model's where it takes that alone.

    Args:
        inputs: As `PlanData.inputs`.
        model: Whose device they go to; it is only read.

    Returns:
        What `capture` takes: one call, or a list of several.

    Raises:
        PlanError: They are too large to be made up, or of a data type that has no such values.
    """
    calls = _examples(inputs, device_of(model))
    own = _precision(model)
    others = {t.dtype for t in pytree.tree_leaves(calls) if _is_floating(t)} - {own}
    if own is not None and others and not all(_takes(model, call) for call in calls):
        calls = pytree.tree_map(lambda leaf: leaf.to(own) if _is_floating(leaf) else leaf, calls)
    return calls if len(calls) > 1 else calls[0]


def _precision(model: nn.Module) -> torch.dtype | None:
    """The one data type of all floating-point parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _takes(model: nn.Module, call: Any) -> bool:
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    try:
        refuse_failing_call(model, ("", args, kwargs))
    except CallError:
        return False
    return True


def _examples(inputs: Any, device: torch.device) -> list[Any]:
    """One call after the other, as recorded."""
    generator = torch.Generator().manual_seed(0)

    def example(leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        dtype = getattr(torch, leaf["dtype"])
        if math.prod(leaf["shape"]) > _MOST:
            raise PlanError(
                f"the plan's example input has the shape {shown(leaf['shape'])}",
                where="inputs=",
                remedy="pass inputs= of the size that you have in mind",
            )
        try:
            if dtype.is_floating_point:
                tensor = torch.randn(leaf["shape"], generator=generator).to(dtype)
            else:
                tensor = torch.ones(leaf["shape"], dtype=dtype)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise PlanError(
                f"no example input can be made: {first_line(error)}",
                where="inputs=",
                remedy="pass inputs=",
            ) from error
        return tensor.to(device)

    calls = []
    for call in (inputs, *inputs.get("others", ())):
        args, kwargs = pytree.tree_map(
            example,
            (call["args"], call["kwargs"]),
            is_leaf=_is_tensor,
        )
        calls.append(kwargs or tuple(args))
    return calls


def described(leaf: Any) -> Any:
    """A leaf of example inputs as plain data: shape and data type of a tensor.

    Args:
        leaf: A tensor or a constant.
    """
    if isinstance(leaf, torch.Tensor):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    return leaf if isinstance(leaf, int | float | str | bool | None) else None


def fingerprint(coupling: Coupling) -> str:
    """A hash of tensor names and sizes, and of the groups."""
    tensors = sorted((n, [t.size for t in d]) for n, d in coupling.dims.items())
    groups = [(g.name, g.size) for g in coupling.groups]
    return hashlib.sha256(json.dumps([tensors, groups]).encode()).hexdigest()


def difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """What tells two architectures apart, in words.

    Args:
        ours: Size of each group of the plan.
        theirs: Size of each group of the model.
    """
    for name, size in ours.items():
        if name not in theirs:
            return f"group {name!r} ({size} units) does not exist in the model"
        if theirs[name] != size:
            return f"group {name!r} has {theirs[name]} units in the model, {size} in the plan"
    extra = [n for n in theirs if n not in ours]
    return (
        f"group {extra[0]!r} of the model is not in the plan" if extra else "tensor names or sizes"
    )
