"""Which parts of a model that cannot be captured as a whole can be captured alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.flags import flags_as_before
from depcut.capture.inputs import Call, arguments
from depcut.capture.part import Part, part_calls
from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.errors import CaptureError, DepcutError
from depcut.support.failures import reraise_fatal

_LEAST = 0.1  # share of the parameters that a part is worth naming for
_ATTEMPTS = 6
_NAMED = 2

Captures = Callable[[nn.Module, Call], object]


def with_proposal(
    refused: CaptureError, model: nn.Module, call: Call, captures: Captures
) -> CaptureError:
    """The refusal of a whole model, its remedy with the parts to capture instead.

    Args:
        refused: Why the whole cannot be captured.
        model: The model; it is only read.
        call: What it gets.
        captures: Captures a model on a call, or raises.
    """
    parts = [] if isinstance(model, Part) else _parts(model, call, captures)
    if not parts:
        return refused
    named = " or ".join(f'part="{name}" ({share:.0%} of the parameters)' for name, share in parts)
    remedy = f"have analyze, shrink or compact capture a part alone: {named}; or {refused.remedy}"
    error = CaptureError(refused.what, where=refused.where, remedy=remedy)
    error.__cause__ = refused.__cause__
    return error


def _parts(model: nn.Module, call: Call, captures: Captures) -> list[tuple[str, float]]:
    """Names of the largest parts that can be captured, with their shares of the parameters."""
    total = sum(p.numel() for p in model.parameters()) or 1
    called = _called(model, call)
    open_names, found = [name for name, _ in model.named_children()], list[tuple[str, float]]()
    attempts = 0

    def share(name: str) -> float:
        return sum(p.numel() for p in model.get_submodule(name).parameters()) / total

    while open_names and attempts < _ATTEMPTS and len(found) < _NAMED:
        name = max(open_names, key=share)
        open_names.remove(name)
        if share(name) < _LEAST:
            break
        if name in called:
            attempts += 1
            if _captures(model, name, call, captures):
                found.append((name, share(name)))
                continue
        inner = model.get_submodule(name).named_children()
        open_names += [f"{name}.{child}" for child, _ in inner]
    return found


def _called(model: nn.Module, call: Call) -> set[str]:
    """Modules that the model calls as such, until it ends or raises."""
    seen, names = clone(model, buffers=True), set[str]()
    for name, module in seen.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: names.add(name))
    args, kwargs = cloned_arguments(call)
    try:
        with preserved(), flags_as_before(), quiet(), torch.no_grad():
            seen(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  what ran until then was seen
        reraise_fatal(error)
    return names


def _captures(model: nn.Module, name: str, call: Call, captures: Captures) -> bool:
    try:
        captures(Part(model, name), arguments(part_calls(model, name, call)[0]))
    except DepcutError:
        return False
    return True
