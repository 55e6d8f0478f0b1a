"""The sizes of every layer, dense and with the kept units: shape, parameters, MACs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from depcut.axes import Dims
from depcut.capture.program import Sizes, layer_of, module_of
from depcut.plan.keep import Keep


@dataclass(frozen=True)
class LayerSizes:
    """What one layer holds and does; of each pair, the first is of the dense model.

    Attributes:
        name: Of the module, or of the parameter where no module of its own holds it.
        kind: Class of the module.
        shape: Shape of its weight, or of its first parameter; () where it has none, or is gone.
        params: Number of its own parameters.
        macs: Multiply-accumulates of one example, in the first example call.
    """

    name: str
    kind: str
    shape: tuple[Sizes, Sizes]
    params: tuple[int, int]
    macs: tuple[int, int]


def layer_sizes(keep: Keep, model: nn.Module) -> tuple[LayerSizes, ...]:
    """Sizes of the layers that have parameters or MACs, in the order of the parameters.

    Args:
        keep: What stays.
        model: The dense model.
    """
    coupling, gone = keep.coupling, keep.gone
    tensors: dict[str, list[str]] = {}
    for name in coupling.dims:
        if name in coupling.program.parameters:
            tensors.setdefault(layer_of(name), []).append(name)
    dense, kept = _macs(keep)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = []
    for layer in _in_order(tensors, dense):
        own = tensors.get(layer, [])
        first = next((n for n in own if n.endswith("weight")), own[0] if own else None)
        shapes: tuple[Sizes, Sizes] = ((), ())
        if first is not None:
            dims = coupling.dims[first]
            shapes = (_sizes(dims), _kept_sizes(dims, keep) if first not in gone.tensors else ())
        counted = [n for n in own if coupling.program.aliases.get(n, (n,))[0] == n]  # shared: once
        still = [n for n in counted if n not in gone.tensors]
        layers.append(
            LayerSizes(
                layer,
                type(modules[layer]).__name__ if layer in modules else "Parameter",
                shapes,
                (
                    sum(math.prod(_sizes(coupling.dims[n])) for n in counted),
                    sum(math.prod(_kept_sizes(coupling.dims[n], keep)) for n in still),
                ),
                (dense[layer], kept[layer]),
            )
        )
    return tuple(layers)


def _in_order(tensors: Iterable[str], dense: Iterable[str]) -> list[str]:
    """Layers with parameters, and before the first of its own each module that only computes."""
    own = list(tensors)
    first: dict[str, int] = {}
    for i, layer in enumerate(own):
        parts = layer.split(".")
        for length in range(len(parts) + 1):
            first.setdefault(".".join(parts[:length]), i)
    places = {layer: (i, 1) for i, layer in enumerate(own)}
    for layer in dense:
        places.setdefault(layer, (first.get(layer, len(own)), 0))
    return sorted(places, key=places.__getitem__)


def _sizes(dims: Dims) -> Sizes:
    return tuple(term.size for term in dims)


def _kept_sizes(dims: Dims, keep: Keep) -> Sizes:
    return tuple(map(keep.count, dims))


def _macs(keep: Keep) -> tuple[Counter[str], Counter[str]]:
    """MACs of one example by the module whose code they are in: dense, and with what stays."""
    program = keep.coupling.program
    dense: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for node, effects in keep.coupling.effects.items():
        if node not in program.sizes:
            continue
        layer = module_of(node)
        for times, dims in effects.macs:
            dense[layer] += round(times * math.prod(_sizes(dims)) / program.batch)
            if node not in keep.gone.nodes:
                kept[layer] += round(times * math.prod(_kept_sizes(dims, keep)) / program.batch)
    return dense, kept
