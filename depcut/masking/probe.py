"""A numerical trial of whether zeros make a dense model compute what the smaller one will."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from depcut.coupling.groups import Coupling
from depcut.graph.interpreter import finished
from depcut.masking.places import Place, Places, tied_to
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, example
from depcut.reference.slices import take
from depcut.support.closeness import relative_error
from depcut.support.torch_private import pytree
from depcut.verify.verify import TOLERANCE

Flags = NDArray[np.bool_]

_EXACT = 1e-5  # of the outputs' scale; what is not exact is off by far more at random weights
_ALL = -1  # the key of what denies a whole tensor, beside its dimensions
_NOISE = 0.1  # of a parameter's size, so that a zero at initialisation hides nothing


def staying(
    keep: Keep, places: Mapping[int, frozenset[Place]], aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[int, Flags]]:
    """What stays of the parameters to zero, by name and dimension; shared ones under their first.

    Those of dropped branches are among them, without a dimension of their own.

    Args:
        keep: What stays.
        places: Where to zero, by group number.
        aliases: Names that share one tensor, by each of these names.

    Returns:
        Arrays of the parameter's rank that broadcast to its shape, see `Keep.stays`. What any of
        them denies is to be zero.
    """
    out: dict[str, dict[int, Flags]] = {}
    for name, dim in sorted({p for n in keep.units for p in places[n]}):
        stays = keep.stays(keep.coupling.dims[name], dim)
        dims = out.setdefault(aliases.get(name, (name,))[0], {})
        dims[dim] = dims[dim] & stays if dim in dims else stays
    for name in keep.gone.tensors & set(keep.coupling.program.parameters):
        # All of a dropped branch, so that what it adds is zero.
        nothing = np.zeros((1,) * len(keep.coupling.dims[name]), dtype=bool)
        out.setdefault(aliases.get(name, (name,))[0], {})[_ALL] = nothing
    return out


def probed(coupling: Coupling, model: nn.Module, places: Places) -> Places:
    """The places without the groups whose zeros do not compute what the smaller model does.

    A random half of the units of every group goes, at weights with some noise, and the dense graph
    with zeros is compared with the narrowed graph, on the inputs of every example call.

    Args:
        coupling: The analysed architecture.
        model: Whose weights are read.
        places: What `find_places` returned.
    """
    trial = Trial(coupling, model, places)
    families: dict[object, list[int]] = {}
    for number in places.zeros:
        tie = coupling.groups[number].tied
        families.setdefault(("tied", tie) if tie is not None else number, []).append(number)
    exact = set(trial.exact([], list(families.values())))
    wrong = {
        n: "zeros in its weights do not compute what the smaller model does"
        for n in places.zeros
        if n not in exact
    }
    return places.without({**tied_to(coupling, wrong), **wrong})


class Trial:
    """A model's graph at weights with some noise, to run with zeros and narrowed."""

    def __init__(self, coupling: Coupling, model: nn.Module, places: Places) -> None:
        self.coupling, self.model, self.places = coupling, model, places
        generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, torch.Tensor] = {}
        noisy: dict[int, torch.Tensor] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            if id(tensor) not in noisy:
                value = tensor.detach()
                if value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator).to(value)
                    size = float(value.float().square().mean().sqrt()) if value.numel() else 0.0
                    value = value + _NOISE * (size or 1.0) * noise
                noisy[id(tensor)] = value
            self.tensors[name] = noisy[id(tensor)]
        nodes = [n for p in coupling.program.examples for n in p.graph.graph.nodes]
        dtypes = {v.dtype for n in nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
        halves = [TOLERANCE[d] for d in dtypes if d in (torch.float16, torch.bfloat16)]
        self.limit = max([_EXACT, *halves])

    def exact(self, base: list[int], families: list[list[int]]) -> list[int]:
        """The base, and of the families those that are exact together with it: by bisection."""
        numbers = base + [n for family in families for n in family]
        if not families or self._agrees(numbers):
            return numbers
        if len(families) == 1:
            return base
        middle = len(families) // 2
        base = self.exact(base, families[:middle])
        return self.exact(base, families[middle:])

    def _agrees(self, numbers: list[int]) -> bool:
        rng = np.random.default_rng(0)
        counts: dict[object, int] = {}
        units = {}
        for number in numbers:
            group = self.coupling.groups[number]
            key = number if group.tied is None else ("tied", group.tied)
            count = max(counts.setdefault(key, group.size // 2), group.floor, 1)
            if count < group.size:
                rows = 1 if group.row_axis is None else group.rows
                order = rng.permuted(np.tile(np.arange(group.size), (rows, 1)), axis=1)
                chosen = np.sort(order[:, :count])
                units[number] = chosen[0] if group.row_axis is None else chosen
        return self.holds(Keep(self.coupling, units))

    def holds(self, keep: Keep) -> bool:
        """Whether zeros compute what the graph narrowed to these units does, in every call."""
        with suppress(RuntimeError):  # the code may insist on its own precision
            return max(self._difference(k, torch.float64) for k in keep.calls) <= self.limit
        with suppress(RuntimeError):
            return max(self._difference(k, None) for k in keep.calls) <= self.limit
        return False

    def _difference(self, keep: Keep, dtype: torch.dtype | None) -> float:
        """Between the outputs of the dense graph with zeros and of the narrowed one."""
        inputs = pytree.tree_leaves(example(keep, dtype=dtype))
        aliases = self.coupling.program.aliases
        stays = staying(keep, self.places.zeros, aliases)
        dense, narrow = {}, {}
        for name, tensor in self.tensors.items():
            value = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for flags in stays.get(aliases.get(name, (name,))[0], {}).values():
                value = value.masked_fill(~torch.from_numpy(flags).to(value.device), 0)
            dense[name] = value
            picked = keep.tensors.get(name)
            narrow[name] = take(value, picked) if picked else value
        whole = Keep(keep.coupling, {})
        with torch.no_grad(), torch.random.fork_rng():
            masked = Reference(whole, self.model).steps(inputs, dtype, tensors=dense)
            wanted = finished(masked)
            sliced = Reference(keep, self.model, sliced=True).steps(inputs, dtype, tensors=narrow)
            size, message = relative_error(finished(sliced), wanted)
        return math.inf if message or not math.isfinite(size) else size
