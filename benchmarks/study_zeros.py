"""Jobs of the study that train with zeros: large-sparse against small-dense, and sparse tickets.

Shares are of parameters: what is compared has as many that are not zero.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from measure import Row
from study_prune import Job
from study_sparse import by_magnitude, matrices, nonzero
from study_train import MASKS, ORDER, REMOVED, Trained
from torch import Tensor, nn

import depcut
from depcut.training.gradual import cubic

GROWS = 0.5  # share of gradual training in which zeros grow

Masks = dict[str, Tensor]  # by layer; of its weight, False where it is zero
Run = Callable[[Trained, float], nn.Module]


def sparse_dense(subject: Trained) -> Iterator[Job]:
    """Equal numbers of parameters that are not zero, 2 T steps in all (Zhu & Gupta 2017)."""
    for name, run in (
        ("large-sparse, gradual", partial(_gradual_sparse, 1.0)),
        ("large-sparse, a tenth of the rate", partial(_gradual_sparse, 0.1)),
        ("large-sparse, three times the rate", partial(_gradual_sparse, 3.0)),
        ("gradual, structured", _gradual_structured),
        ("small-dense", _small_dense),
    ):
        yield Job("sparse_dense", name, partial(_at_equal_params, subject, run, 2))


def sparse_tickets(subject: Trained) -> Iterator[Job]:
    """The zeros of the trained net in an untrained one, and T steps (Frankle & Carbin 2019)."""
    for name, run in (("ticket of step 0", _sparse_ticket), ("new weights", _sparse_scratch)):
        yield Job("sparse_tickets", name, partial(_at_equal_params, subject, run, 1))


def _at_equal_params(subject: Trained, run: Run, times: int) -> Iterator[Row]:
    for removed in REMOVED:
        start = time.process_time()
        try:
            model = run(subject, removed)
        except depcut.DepcutError as error:
            yield {"removed": removed, "error": error.what}
            continue
        yield {
            "removed": removed,
            **subject.judged(model),
            "params": round(nonzero(model) / subject.params, 5),
            "steps": times * subject.length,
            "seconds": round(time.process_time() - start, 1),
        }


def _gradual_sparse(times: float, subject: Trained, removed: float) -> nn.Module:
    """The smallest weights of all matrices are zero, more of them as training goes on.

    The rates are those of the dense training times a factor.
    """
    model, share = copy.deepcopy(subject.model), _share(subject, removed)
    end = round(GROWS * subject.length)
    every = max(1, end // MASKS)
    masks: Masks = {}

    def hook(model: nn.Module, step: int) -> None:
        if step == end or (step < end and step % every == 0):
            by_magnitude(model, subject, min(1.0, cubic(step, 0, end, 0.0, share)))
            masks.update(_masks(model))
        _enforce(model, masks)

    rates = [times * rate for rate in subject.rates]
    model = subject.retrained(model, subject.length, rates, hook)
    _enforce(model, masks)
    return model


def _share(subject: Trained, removed: float) -> float:
    """Of zeros in the matrices: biases and norms stay whole, and they carry all of what goes."""
    return (
        removed * subject.params / sum(m.weight.numel() for m in matrices(subject.model).values())
    )


def _masks(model: nn.Module) -> Masks:
    return {name: layer.weight.data != 0 for name, layer in matrices(model).items()}


def _enforce(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_submodule(name).weight.data *= mask


def _gradual_structured(subject: Trained, removed: float) -> nn.Module:
    """The same schedule for whole units."""
    model, end = copy.deepcopy(subject.model), round(GROWS * subject.length)
    return subject.shrinking(model, removed, "params", 0, end)


def _small_dense(subject: Trained, removed: float) -> nn.Module:
    """A narrow net of its own, trained as long as the others in all."""
    drawn, steps = subject.drawn(subject.plan(removed, of="params")), 2 * subject.length
    return subject.retrained(drawn, steps, subject.stretched(steps))


def _sparse_ticket(subject: Trained, removed: float) -> nn.Module:
    """The initial weights that the trained net's largest have grown from."""
    return _with_zeros(subject, subject.snapshots.restore(subject.model, 0), removed)


def _sparse_scratch(subject: Trained, removed: float) -> nn.Module:
    """New random weights in the same places: the ticket's control."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ORDER + subject.seed)
        model = subject.task.build()
    return _with_zeros(subject, model, removed)


def _with_zeros(subject: Trained, model: nn.Module, removed: float) -> nn.Module:
    """Trained for T steps, with zeros where the trained net's weights are smallest."""
    trained = copy.deepcopy(subject.model)
    by_magnitude(trained, subject, min(1.0, _share(subject, removed)))
    masks = _masks(trained)
    model = subject.retrained(
        model, subject.length, subject.rates, lambda model, _: _enforce(model, masks)
    )
    _enforce(model, masks)
    return model
