"""Jobs of the study that rebuild published recipes for decoders from their papers.

They prune what the papers prune: whole layers (ShortGPT), or heads and neurons of the MLPs (FLAP,
Wanda-sp). Units are taken away by zeros where they are read, which computes the same; MACs are
counted as if they were gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import Row
from numpy.typing import NDArray
from study_prune import REMOVED, Job, Subject
from torch import Tensor, nn
from torch.nn import functional

import depcut

Flags = NDArray[np.bool_]

EQUAL = "FLAP, equal shares"  # of every layer, as one of its paper's ablations has it


def papers(subject: Subject) -> Iterator[Job]:
    """Of the decoders: the recipes, and depcut's branches and widths beside them."""
    if not subject.task.name.startswith("gpt_"):
        return
    yield Job("papers", "ShortGPT", partial(_shortgpt, subject))
    yield Job("papers", "Wanda-sp", partial(_by_units, subject, "Wanda-sp"))
    yield Job("papers", "FLAP", partial(_by_units, subject, "FLAP"))
    yield Job("papers", EQUAL, partial(_by_units, subject, EQUAL))
    for name, depth in (("depcut, widths", False), ("depcut, widths and branches", True)):
        yield Job("papers", name, partial(_ours, subject, depth))


def _ours(subject: Subject, depth: bool) -> Iterator[Row]:
    for removed in REMOVED:
        try:
            plan = subject.analysis.plan(
                removed, data=subject.calibration, depth=depth, align=1, seed=subject.seed
            )
            slim = plan.apply(subject.model, data=subject.calibration, progress=False)
        except depcut.DepcutError as error:
            yield {"removed": removed, "error": error.what}
            continue
        yield {"removed": removed, **subject.judged(slim), **subject.sized(slim)}


@torch.no_grad()
def _shortgpt(subject: Subject) -> Iterator[Row]:
    """Layers that turn their input least go (Men et al., ShortGPT, 2024, eq. 1)."""
    layers: Any = subject.model.layers
    influence = np.zeros(len(layers))

    def collect(number: int, _module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        influence[number] += float((1 - functional.cosine_similarity(args[0], output, -1)).mean())

    handles = [m.register_forward_hook(partial(collect, i)) for i, m in enumerate(layers)]
    for inputs, _ in subject.pairs:
        subject.model(inputs)
    for handle in handles:
        handle.remove()
    order = np.argsort(influence)
    for count in range(1, len(layers)):
        gone = set(order[:count].tolist())
        slim = copy.deepcopy(subject.model)
        slim.layers = nn.ModuleList(m for i, m in enumerate(slim.layers) if i not in gone)
        sized = subject.sized(slim)
        yield {"removed": round(1 - sized["macs"], 3), **subject.judged(slim), **sized}


@dataclass
class Units:
    """Heads and neurons of one decoder: statistics of what reads them, and what each costs.

    Attributes:
        means: Of the inputs of each layer's proj and fc2.
        variances: Of the same.
        norms: Root of the sum of squares of the same.
        head_macs: That go with a head, for the task's windows.
        neuron_macs: That go with a neuron.
    """

    means: list[tuple[Tensor, Tensor]]
    variances: list[tuple[Tensor, Tensor]]
    norms: list[tuple[Tensor, Tensor]]
    head_macs: float
    neuron_macs: float


@torch.no_grad()
def _units(subject: Subject) -> Units:
    layers: Any = subject.model.layers
    seen: dict[tuple[int, int], list[Tensor]] = {}

    def collect(place: tuple[int, int], _module: Any, args: tuple[Any, ...]) -> None:
        seen.setdefault(place, []).append(args[0].flatten(0, -2))

    readers = {(i, k): m for i, layer in enumerate(layers) for k, m in enumerate(_read(layer))}
    handles = [m.register_forward_pre_hook(partial(collect, p)) for p, m in readers.items()]
    for inputs, _ in subject.pairs:
        subject.model(inputs)
    for handle in handles:
        handle.remove()
    values = {place: torch.cat(found) for place, found in seen.items()}
    pairs = [(values[i, 0], values[i, 1]) for i in range(len(layers))]
    batch, length = subject.inputs.shape
    attention = layers[0].attn
    width, size = attention.proj.out_features, attention.head_dim
    return Units(
        [(a.mean(0), b.mean(0)) for a, b in pairs],
        [(a.var(0), b.var(0)) for a, b in pairs],
        [(a.norm(dim=0), b.norm(dim=0)) for a, b in pairs],
        float(batch * length * (4 * width * size + 2 * length * size)),
        float(batch * length * 2 * width),
    )


def _read(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    return layer.attn.proj, layer.fc2


def _by_units(subject: Subject, recipe: str) -> Iterator[Row]:
    units = _units(subject)
    for removed in REMOVED:
        found = RECIPES[recipe](subject, units, removed)
        if found is None:
            yield {"removed": removed, "error": "heads and neurons hold fewer MACs than that"}
            continue
        heads, neurons = found
        gone = (~heads).sum() * units.head_macs + (~neurons).sum() * units.neuron_macs
        slim = _without(subject, units, heads, neurons, compensate=recipe != "Wanda-sp")
        yield {
            "removed": removed,
            **subject.judged(slim),
            "macs": round(1 - float(gone) / subject.macs, 5),
        }


@torch.no_grad()
def _without(
    subject: Subject, units: Units, heads: Flags, neurons: Flags, *, compensate: bool
) -> nn.Module:
    """Zeros where removed units are read; FLAP's biases take their means over (its eq. 5)."""
    slim: Any = copy.deepcopy(subject.model)
    for i, layer in enumerate(slim.layers):
        flags = np.repeat(heads[i], layer.attn.head_dim), neurons[i]
        for reader, stays, mean in zip(_read(layer), flags, units.means[i], strict=True):
            gone = torch.from_numpy(~stays)
            if compensate:
                reader.bias += reader.weight[:, gone] @ mean[gone]
            reader.weight[:, gone] = 0.0
    return slim


def _wanda_sp(subject: Subject, units: Units, removed: float) -> tuple[Flags, Flags] | None:
    """The same share of heads and of neurons of every layer, by |W| |X| (An et al., FLAP, 2024)."""
    scores = [
        tuple((m.weight.abs() * x).mean(0) for m, x in zip(_read(layer), norms, strict=True))
        for layer, norms in zip(_layers(subject), units.norms, strict=True)
    ]
    return _equal_shares(subject, units, removed, *_by_head(subject, scores))


def _equal_shares(
    subject: Subject,
    units: Units,
    removed: float,
    heads: NDArray[np.float64],
    neurons: NDArray[np.float64],
) -> tuple[Flags, Flags] | None:
    def choice(share: float) -> tuple[Flags, Flags]:
        return _all_but_least(heads, share), _all_but_least(neurons, share)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        gone = [~flags for flags in choice(middle)]
        macs = gone[0].sum() * units.head_macs + gone[1].sum() * units.neuron_macs
        low, high = (middle, high) if macs < removed * subject.macs else (low, middle)
    return choice(high) if high < 1 - 1e-6 else None


def _fluctuations(
    subject: Subject, units: Units
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances times squared norms, standardised by layer (FLAP, eq. 3).

    As in its authors' code, dimensions are standardised before a head takes their mean.
    """
    scores = [
        tuple(
            _standardised(v * m.weight.square().sum(0))
            for m, v in zip(_read(layer), found, strict=True)
        )
        for layer, found in zip(_layers(subject), units.variances, strict=True)
    ]
    return _by_head(subject, scores)


def _flap(subject: Subject, units: Units, removed: float) -> tuple[Flags, Flags] | None:
    """Heads and neurons of all layers compared with each other (FLAP, eq. 4)."""
    heads, neurons = _fluctuations(subject, units)
    flat = np.concatenate([heads.ravel(), neurons.ravel()])
    macs = np.repeat([units.head_macs, units.neuron_macs], [heads.size, neurons.size])
    order = np.argsort(flat, kind="stable")
    count = int(np.searchsorted(np.cumsum(macs[order]), removed * subject.macs)) + 1
    if count > len(order):
        return None
    stays = np.ones(len(flat), dtype=bool)
    stays[order[:count]] = False
    return stays[: heads.size].reshape(heads.shape), stays[heads.size :].reshape(neurons.shape)


def _flap_equal(subject: Subject, units: Units, removed: float) -> tuple[Flags, Flags] | None:
    return _equal_shares(subject, units, removed, *_fluctuations(subject, units))


RECIPES: Mapping[str, Callable[[Subject, Units, float], tuple[Flags, Flags] | None]] = {
    "Wanda-sp": _wanda_sp,
    "FLAP": _flap,
    EQUAL: _flap_equal,
}


def _layers(subject: Subject) -> Any:
    return subject.model.layers


def _by_head(subject: Subject, scores: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores [layers, heads] (the mean of a head's dimensions) and [layers, neurons]."""
    size = _layers(subject)[0].attn.head_dim
    heads = torch.stack([s[0].detach().view(-1, size).mean(1) for s in scores])
    return heads.double().numpy(), torch.stack([s[1].detach() for s in scores]).double().numpy()


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / (scores.std() + 1e-12)


def _all_but_least(scores: NDArray[np.float64], share: float) -> Flags:
    count = int(share * scores.shape[1])
    stays = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(stays, np.argsort(scores, 1)[:, :count], values=False, axis=1)
    return stays
