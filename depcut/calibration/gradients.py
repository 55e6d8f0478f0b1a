"""Gradients of a user's loss, taken of a clone: the model is only read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from depcut.calibration.data import Calibration, checked_loss
from depcut.calibration.progress import ticking
from depcut.calibration.reader import Batch
from depcut.capture.clone import clone
from depcut.capture.eager import user_line
from depcut.capture.process_state import formula_attention
from depcut.errors import DepcutError, InputError
from depcut.support.failures import first_line, reraise_fatal

_STEP = 5e-3  # of the weights' length: about the cube root of single precision


@contextmanager
def trainable(model: nn.Module) -> Iterator[nn.Module]:
    """A clone in eval mode whose floating-point parameters are differentiable, for a while.

    They share the model's memory; its flags, gradients, modes and buffers are left alone.

    Args:
        model: The model.
    """
    with torch.enable_grad():
        yield clone(model, buffers=True, requires_grad=True)


def gradients(
    model: nn.Module, calibration: Calibration, *, create_graph: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradient of the loss on each batch, by parameter name; zeros where it does not reach.

    Use inside `trainable`, with its clone. The batches' losses are taken as they are: means, if the
    loss is one.

    Args:
        model: The model.
        calibration: Batches and loss.
        create_graph: Whether the gradients are to be differentiated again.

    Raises:
        InputError: A loss is not finite, or does not depend on the weights.
    """
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in ticking(calibration, "gradients"):
        args, kwargs = calibration.loss_arguments(batch)
        try:
            loss = checked_loss(calibration, model(*args, **kwargs), batch)
            derivatives = _derived(loss, held, create_graph) if loss.requires_grad else {}
        except DepcutError:
            raise
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"the gradient of the loss cannot be taken: {first_line(error)}",
                where=user_line(error, model),
                remedy="use a criterion that needs none, such as score='obs'",
            ) from error
        if not derivatives:
            raise InputError(
                "the loss does not depend on the model's weights",
                where="loss=",
                remedy="compute it from the output it gets, without detach() or no_grad()",
            )
        yield {name: derivatives.get(name, torch.zeros_like(p)) for name, p in held.items()}


def curvatures(
    model: nn.Module, calibration: Calibration, *, of_gradient: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Hessian of the loss on each batch times a vector, by parameter name.

    Use inside `trainable`, with its clone. One more backward pass a batch, through the graph of the
    gradient; where an operator has no second derivative, the central difference of two gradients.

    Args:
        model: The model.
        calibration: Batches and loss.
        of_gradient: The vector: the batch's gradient, or else the weights.

    Raises:
        InputError: A loss is not finite, or does not depend on the weights.
    """
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # The fused kernels for attention cannot be differentiated twice.
    with formula_attention():
        batch_gradients = gradients(model, calibration, create_graph=True)
        for batch, gradient in zip(calibration.batches, batch_gradients, strict=True):
            fixed = {n: v.detach() for n, v in (gradient if of_gradient else held).items()}
            try:
                terms = [(gradient[n] * v).sum() for n, v in fixed.items()]
                total = torch.stack([t.to(terms[0]) for t in terms]).sum()
                curved = _derived(total, held, False) if total.requires_grad else {}
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                curved = _difference(model, calibration, batch, fixed)
            yield {name: curved.get(name, torch.zeros_like(p)) for name, p in held.items()}


def _difference(
    model: nn.Module, calibration: Calibration, batch: Batch, vector: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """(g(w + e v) - g(w - e v)) / 2 e, e v being a fixed small share of the weights."""
    held = {n: p.detach() for n, p in model.named_parameters() if n in vector}
    length = math.sqrt(sum(float(v.double().square().sum()) for v in vector.values()))
    size = math.sqrt(sum(float(w.double().square().sum()) for w in held.values()))
    if not length:
        return {}
    step = _STEP * (size or 1.0) / length
    ends = []
    for sign in (1, -1):
        moved = {n: (w + sign * step * vector[n]).requires_grad_(True) for n, w in held.items()}
        args, kwargs = calibration.loss_arguments(batch)
        output = torch.func.functional_call(model, moved, args, kwargs)
        ends.append(_derived(checked_loss(calibration, output, batch), moved, False))
    return {n: (g - ends[1][n]) / (2 * step) for n, g in ends[0].items() if n in ends[1]}


def _derived(
    value: torch.Tensor, held: Mapping[str, torch.Tensor], create_graph: bool
) -> dict[str, torch.Tensor]:
    """Gradients of a scalar, for the parameters that it depends on."""
    derivatives = torch.autograd.grad(
        value, list(held.values()), create_graph=create_graph, allow_unused=True
    )
    return {n: g for n, g in zip(held, derivatives, strict=True) if g is not None}
