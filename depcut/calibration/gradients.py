"""Gradients of a user's loss, taken of a clone: the model is only read."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import nn

from depcut.calibration.data import Calibration, checked_loss
from depcut.calibration.progress import ticking
from depcut.calibration.reader import Batch
from depcut.calibration.saved import Saving, saving
from depcut.capture.clone import clone
from depcut.capture.eager import user_line
from depcut.capture.process_state import formula_attention
from depcut.errors import DepcutError, InputError
from depcut.support.failures import first_line, reraise_fatal

Reduced = TypeVar("Reduced")

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


@overload
def gradients(model: nn.Module, calibration: Calibration) -> Iterator[dict[str, torch.Tensor]]: ...


@overload
def gradients(
    model: nn.Module, calibration: Calibration, reduced: Callable[[str, torch.Tensor], Reduced]
) -> Iterator[dict[str, Reduced]]: ...


def gradients(
    model: nn.Module,
    calibration: Calibration,
    reduced: Callable[[str, torch.Tensor], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """What is taken of the gradient of the loss on each batch, by parameter name.

    Use inside `trainable`, with its clone. The batches' losses are taken as they are: means, if the
    loss is one. A gradient lives from when the last place that reads the parameter has added to it
    until it is reduced; so, unless they are kept, no two need be held. What the way back needs of a
    batch beyond a half of the calibration's memory is kept in files: the results are the same to
    the last bit.

    Args:
        model: The model.
        calibration: Batches and loss.
        reduced: Gets the name of each parameter and its gradient, zeros where the loss does not
            reach it; the result is what is yielded. Left out, the gradient.

    Raises:
        InputError: A loss is not finite, or does not depend on the weights.
    """
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {}
    lock = threading.Lock()  # each device has a thread for its derivatives

    def take(name: str, gradient: torch.Tensor) -> None:
        found[name] = gradient if reduced is None else reduced(name, gradient)

    def accumulated(name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        with lock:
            take(name, gradient)

    hooks = [p.register_post_accumulate_grad_hook(partial(accumulated, n)) for n, p in held.items()]
    try:
        with saving(model, calibration) as saved:
            for batch in ticking(calibration, "gradients"):
                with _explained(model):
                    loss = _loss(model, calibration, batch, saved)
                    if loss.requires_grad and held:
                        loss.backward(inputs=list(held.values()))
                    del loss
                _check_reached(found)
                with torch.no_grad():
                    for name in [name for name in held if name not in found]:
                        take(name, torch.zeros_like(held[name]))
                yield {name: found.pop(name) for name in held}
    finally:
        for hook in hooks:
            hook.remove()


def _with_graphs(model: nn.Module, calibration: Calibration) -> Iterator[dict[str, torch.Tensor]]:
    """The gradients of each batch, which can be differentiated again; see `gradients`."""
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with saving(model, calibration) as saved:
        for batch in ticking(calibration, "gradients"):
            with _explained(model):
                loss = _loss(model, calibration, batch, saved)
                with saved():
                    found = _derived(loss, held, True) if loss.requires_grad else {}
                del loss
            _check_reached(found)
            yield {name: found.get(name, torch.zeros_like(p)) for name, p in held.items()}
            found.clear()


def _loss(model: nn.Module, calibration: Calibration, batch: Batch, saved: Saving) -> torch.Tensor:
    """The loss of one batch, to be differentiated."""
    args, kwargs = calibration.loss_arguments(batch)
    with saved():
        return checked_loss(calibration, model(*args, **kwargs), batch)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """What fails as an InputError."""
    try:
        yield
    except DepcutError:
        raise
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the gradient of the loss cannot be taken: {first_line(error)}",
            where=user_line(error, model),
            remedy="use a criterion that needs none, such as score='obs'",
        ) from error


def _check_reached(found: Collection[str]) -> None:
    """Refuse a loss that reaches no parameter.

    Args:
        found: Names of those that it reaches.
    """
    if not found:
        raise InputError(
            "the loss does not depend on the model's weights",
            where="loss=",
            remedy="compute it from the output it gets, without detach() or no_grad()",
        )


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
        batch_gradients = _with_graphs(model, calibration)
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
