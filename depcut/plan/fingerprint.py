"""The architecture a plan was made for: a hash of tensors and groups, the example inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from depcut.capture.inputs import device_of
from depcut.coupling.groups import Coupling
from depcut.support.torch_private import pytree


def example_of(inputs: Any, model: nn.Module) -> Any:
    """Inputs of recorded shapes: small integers for ids, noise for the rest.

    Args:
        inputs: As `PlanData.inputs`.
        model: Whose device they go to.

    Returns:
        What `capture` takes: one call, or a list of several.
    """
    generator = torch.Generator().manual_seed(0)

    def example(leaf: Any) -> Any:
        if not isinstance(leaf, dict) or "shape" not in leaf:
            return leaf
        dtype = getattr(torch, leaf["dtype"])
        if dtype.is_floating_point:
            tensor = torch.randn(leaf["shape"], generator=generator).to(dtype)
        else:
            tensor = torch.ones(leaf["shape"], dtype=dtype)
        return tensor.to(device_of(model))

    calls = []
    for call in (inputs, *inputs.get("others", ())):
        args, kwargs = pytree.tree_map(
            example,
            (call["args"], call["kwargs"]),
            is_leaf=lambda v: isinstance(v, dict) and "shape" in v,
        )
        calls.append(kwargs or tuple(args))
    return calls if len(calls) > 1 else calls[0]


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
