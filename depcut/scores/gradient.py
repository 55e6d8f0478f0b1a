"""Criteria from gradients of a user's loss: what removing a unit would do to it.

The model itself is differentiated, a batch at a time, and each gradient summed up as soon as it is
known. What a batch's way back needs beyond the calibration's memory is kept in files, whatever the
criterion. `hessian` and `grasp`, which differentiate gradients again, hold those of the whole model
for one batch; the others hold one parameter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from depcut.calibration.gradients import curvatures, gradients, trainable
from depcut.calibration.store import Store
from depcut.scores.aggregate import by_element, compared, totals
from depcut.scores.context import Context, Scores, criterion

Kept = tuple[int, ...]
Parts = dict[str, dict[Kept, torch.Tensor]]
"""Sums over the elements of parameters, by their names and the dimensions that are left."""


def _mean(context: Context, batches: Iterator[Scores]) -> Scores:
    """Mean over the batches of all processes, in double precision."""
    total: Scores = []
    for scores in batches:
        total = [t + s for t, s in zip(total, scores, strict=True)] if total else scores
    held = [torch.from_numpy(np.ascontiguousarray(t)) for t in total]
    sums = context.data.everyone.summed("saliencies", held)
    return [s.numpy() / context.data.total for s in sums]


def _product(context: Context, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Element by element, a gradient times the weight."""
    return gradient.detach().to_dense().double() * context.weights[name].double()


def _asked(context: Context) -> dict[str, list[Kept]]:
    """What `totals` asks for: the dimensions to leave in sums over each parameter's elements."""
    asked: dict[str, dict[Kept, None]] = {name: {} for name in context.weights}

    def note(name: str, kept: Kept) -> torch.Tensor:
        asked[name][kept] = None
        return torch.zeros([context.weights[name].shape[d] for d in kept], dtype=torch.float64)

    totals(context, note, rows=True)
    return {name: list(found) for name, found in asked.items()}


def _summed(name: str, elements: torch.Tensor, asked: list[Kept]) -> dict[Kept, torch.Tensor]:
    """The sums over one parameter's elements that are asked for."""
    sums = by_element({name: elements})
    return {kept: sums(name, kept) for kept in asked}


def _totals(context: Context, parts: Parts) -> Scores:
    """Scores from the sums that are asked for."""
    return totals(context, lambda name, kept: parts[name][kept], rows=True)


def _averaged(
    context: Context,
    element: Callable[[torch.Tensor], torch.Tensor],
    saliency: Callable[[Scores], Scores],
) -> Scores:
    """Mean over the batches of a saliency, of the totals of what is computed from g * w."""
    asked = _asked(context)

    def reduced(name: str, gradient: torch.Tensor) -> dict[Kept, torch.Tensor]:
        if name not in asked:
            return {}
        return _summed(name, element(_product(context, name, gradient)), asked[name])

    with trainable(context.model) as model:
        batches = gradients(model, context.data, reduced)
        return _mean(context, (saliency(_totals(context, parts)) for parts in batches))


@criterion("taylor", needs="loss")
def taylor(context: Context) -> Scores:
    """First-order Taylor: score(u) = mean over the batches of (sum over the unit of g w)^2.

    The squared change of the loss to first order when all the unit's weights are set to zero. The
    mean is over batches: batches of one example give the paper's.
    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
    eq. 8 and 9. Needs data and a loss.
    """
    found = _averaged(context, lambda product: product, lambda sums: list(map(np.square, sums)))
    return compared(context, found)


@criterion("taylor_gate", needs="loss", members="consumers")
def taylor_gate(context: Context) -> Scores:
    """First-order Taylor of a gate on the unit where it is read: `taylor` over the consumers.

    Let a gate z = 1 multiply activation a_j where y = W a reads it. Then
    dL/dz_j = a_j dL/da_j = a_j sum_i W_ij dL/dy_i = sum_i W_ij dL/dW_ij, summed over examples and
    positions: the sum of g w over the consumers' columns of the unit, without a hook on any
    activation. A unit that no weight reads is gated where it is produced: its producers.
    Source: Molchanov et al., CVPR 2019, section 3 (gates); identity derived above.
    Needs data and a loss.
    """
    return taylor(context)


@criterion("fisher", needs="loss")
def fisher(context: Context) -> Scores:
    """Diagonal second order: score(u) = mean over the batches of sum over the unit of g^2 w^2 / 2.

    Optimal brain damage with the empirical Fisher information in place of the Hessian's diagonal;
    g is the gradient of a batch, so batches of one example give the empirical Fisher itself.
    Source: LeCun et al., Optimal Brain Damage, NeurIPS 1989 (published 1990), eq. 5 and section
    2.2; Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018.
    Needs data and a loss.
    """
    found = _averaged(context, lambda product: product.square() / 2, lambda sums: sums)
    return compared(context, found)


@criterion("snip", needs="loss", initial=True)
def snip(context: Context) -> Scores:
    """Connection sensitivity: score(u) = sum over the unit of |g w|, g the mean over the batches.

    The paper divides by the sum over all weights, which orders nothing anew.
    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
    ICLR 2019, eq. 5. Needs data and a loss.
    """
    everyone, count = context.data.everyone, context.data.total
    with Store(context.data.memory // 2) as store:

        def added(name: str, gradient: torch.Tensor) -> None:
            if name in context.weights:
                product = _product(context, name, gradient)
                store.put(name, product.add_(store.take(name)) if name in store else product)

        with trainable(context.model) as model:
            for _ in gradients(model, context.data, added):
                pass
        parts: Parts = {}
        for name, asked in _asked(context).items():
            (total,) = everyone.summed("connections", [store.take(name)])
            parts[name] = _summed(name, total.abs_().div_(count), asked)
    return compared(context, _totals(context, parts))


def _curved(context: Context, of_gradient: bool) -> Scores:
    """Mean over the batches of the sums over each unit of w (H v), v the gradient or the weights.

    H g is not linear in the loss, so GraSP's mean is one over batches.
    """

    def products(curved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: _product(context, name, curved[name]) for name in context.weights}

    with trainable(context.model) as model:
        hessian_products = curvatures(model, context.data, of_gradient=of_gradient)
        return _mean(
            context,
            (
                totals(context, by_element(products(curved)), rows=True)
                for curved in hessian_products
            ),
        )


@criterion("hessian", needs="loss")
def hessian(context: Context) -> Scores:
    """Second order: score(u) = | sum over the unit of w (H w) | / 2, H the Hessian of the loss.

    The mean over the batches of one Hessian-vector product each, with all weights as the vector:
    without random probes, and, unlike the diagonal, with the unit's share in its interactions with
    all other weights.
    Source: the quadratic term of Hassibi and Stork, Optimal Brain Surgeon, NeurIPS 1992, eq. 1,
    shared out element by element as in Wang et al., ICLR 2020. Needs data and a loss, and memory
    for the gradients of the whole model.
    """
    return compared(context, [np.abs(t) / 2 for t in _curved(context, of_gradient=False)])


@criterion("grasp", needs="loss", initial=True)
def grasp(context: Context) -> Scores:
    """Gradient signal preservation: score(u) = sum over the unit of w (H g).

    The paper's S = -w (H g) is how much removal adds to the gradient flow |g|^2, and what has the
    largest S is removed; higher is kept here, so the sign is turned. Scores are shifted to be
    positive, all by the same number.
    It keeps what lets an untrained net learn; in a trained one these are the units whose removal
    would lower the gradient, not those that the function needs.
    Source: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow,
    ICLR 2020, eq. 8 and algorithm 1. Needs data and a loss, and memory for the gradients of the
    whole model.
    """
    return compared(context, _curved(context, of_gradient=True))
