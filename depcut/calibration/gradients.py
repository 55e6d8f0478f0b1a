"""Gradients of a user's loss; the caller's own gradients and mode are as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from depcut.calibration.data import Calibration, checked_loss
from depcut.calibration.progress import ticking
from depcut.capture import modes
from depcut.errors import InputError


@contextmanager
def trainable(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Every floating-point parameter by name (shared ones once), differentiable for a while.

    Eval mode; `requires_grad`, gradients and modes are restored, also after an error.

    Args:
        model: Whose parameters.
    """
    held = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    saved = [(p, p.requires_grad, p.grad) for p in held.values()]
    try:
        with modes(model, ()), torch.enable_grad():
            for parameter, _, _ in saved:
                parameter.requires_grad_(True)
                parameter.grad = None
            yield dict(held)
    finally:
        for parameter, required, gradient in saved:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def gradients(
    model: nn.Module, calibration: Calibration, *, create_graph: bool = False
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Gradient of the loss on each batch, by parameter name; zeros where it does not reach.

    Use inside `trainable`. The batches' losses are taken as they are: means, if the loss is one.

    Args:
        model: The model.
        calibration: Batches and loss.
        create_graph: Whether the gradients are to be differentiated again.

    Raises:
        InputError: A loss is not finite, or does not depend on the weights.
    """
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in ticking(calibration, "gradients"):
        args, kwargs = calibration.arguments(batch)
        loss = checked_loss(calibration, model(*args, **kwargs), batch)
        if not loss.requires_grad:
            raise InputError(
                "the loss does not depend on the model's weights",
                where="loss=",
                remedy="compute it from the output it gets, without detach() or no_grad()",
            )
        found = torch.autograd.grad(
            loss, list(held.values()), create_graph=create_graph, allow_unused=True
        )
        yield {
            name: torch.zeros_like(held[name]) if gradient is None else gradient
            for name, gradient in zip(held, found, strict=True)
        }
