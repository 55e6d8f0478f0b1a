"""Means of removed units, as batch norms know them, moved into what reads the units; without data.

What a removed unit contributed on average to the layers that read it goes into their biases, or
into the running mean of the batch norm behind them; the running variance shrinks by the share of
the variance that the removed units made, channels taken to be independent. It is the statistical
sister of `depcut.repair.folding`, which folds constants, exactly.

Where a convolution pads with zeros, means are those of its inside: at the border, part of the
kernel reads no unit, and the correction is too large there.

Sources: Nagel et al., Data-Free Quantization, ICCV 2019, sections 4.1 and 4.2 (biases take the
mean); Jordan et al., REPAIR, ICLR 2023 (variances that fell are renormalised).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from depcut.calibration.sites import find_sites
from depcut.capture.held import held_tensors
from depcut.errors import listed
from depcut.graph.ancestry import is_shared
from depcut.graph.arguments import argument, bound
from depcut.ops.contraction import MatrixProduct
from depcut.ops.convolution import Patches
from depcut.ops.normalization import is_batch_norm, shared_statistics
from depcut.ops.site import Site
from depcut.plan.keep import Keep
from depcut.repair.channel_values import ChannelValues, channel_values
from depcut.repair.contractions import Contraction

_LEAST = 1e-2  # share of a variance below which none is taken to have fallen


@dataclass(frozen=True)
class Corrected:
    """What a correction by means changed.

    Attributes:
        layers: Layers that read removed units whose mean is known.
        tensors: Names of the biases and running statistics that changed.
    """

    layers: tuple[str, ...]
    tensors: tuple[str, ...]

    @property
    def note(self) -> str:
        """What was done, for reports."""
        return (
            "means of removed units, known from batch norms, went into biases and running "
            f"statistics of {listed(list(self.layers))}"
        )


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a narrowed activation of which something is known.

    Attributes:
        site: The layer.
        source: The activation.
        known: Values of its channels.
        weight: Dense, (blocks, out, in / blocks, taps), double precision.
        norm: The batch norm behind it, if its statistics can be changed.
    """

    site: Site
    source: fx.Node
    known: ChannelValues
    weight: Tensor
    norm: fx.Node | None

    def outputs(self, channels: Tensor, power: int = 1) -> Tensor:
        """Sum over the channels of w^power times a number each, [blocks * out]."""
        blocks = len(self.weight)
        taps = self.weight.pow(power).sum(3) if power == 2 else self.weight.sum(3)
        return (taps @ channels.reshape(blocks, -1, 1)).flatten()


def correct_means(
    keep: Keep, model: nn.Module, slim: nn.Module, folded: Sequence[Contraction] = ()
) -> Corrected:
    """Add what removed units contributed on average to the biases of a smaller model.

    Args:
        keep: What stays of the dense model.
        model: The dense model.
        slim: The smaller model; its biases and running statistics change.
        folded: What reads the groups, where constants of removed units were folded already.

    Returns:
        What changed; nothing where no mean is known.
    """
    coupling = keep.coupling
    if len(coupling.calls) > 1 or keep.bypass:
        return Corrected((), ())
    constant = {c.node: c.fixed for c in folded if c.absorber is not None and c.fixed is not None}
    dense, held = held_tensors(model), held_tensors(slim)
    layers, changed = [], dict[str, None]()
    for reader in _readers(keep, dense):
        names = _correct(reader, keep, held, constant.get(reader.site.node))
        if names:
            layers.append(reader.site.name)
            changed |= dict.fromkeys(names)
    return Corrected(tuple(layers), tuple(changed))


def _readers(keep: Keep, dense: Mapping[str, Tensor]) -> list[_Reader]:
    """Layers whose inputs are narrowed and known."""
    program = keep.coupling.program
    if not any(map(is_batch_norm, program.graph.graph.nodes)):
        return []
    known = channel_values(program, dense)
    out = []
    for site in find_sites(keep.coupling) if known else ():
        family, node = site.family, site.node
        if not isinstance(family, MatrixProduct | Patches) or len(site.weights) > 1:
            continue
        call = bound(node, node.args, node.kwargs)
        name = family.source if isinstance(family, MatrixProduct) else "input"
        source, weight = call[name], call.get("weight")
        tensor = dense.get(site.weights[0])
        if source not in known or not isinstance(weight, fx.Node):
            continue
        if tensor is None or tensor.is_meta or program.tensors.get(weight) != site.weights[0]:
            continue
        if any(is_shared(n, program) for n in (*site.weights, *site.biases)):
            continue
        if isinstance(family, Patches):
            if family.transposed:
                continue  # its kernels overlap unevenly
            grouped = tensor.unflatten(0, (call["groups"], -1)).flatten(3)
        elif source.meta["val"].ndim == 2:
            grouped = tensor[None, :, :, None]
        else:
            continue
        matrix = grouped.detach().double().cpu()
        out.append(_Reader(site, source, known[source], matrix, _norm_behind(site, keep)))
    return out


def _norm_behind(site: Site, keep: Keep) -> fx.Node | None:
    """The batch norm that alone reads a layer, if its statistics are its own."""
    program = keep.coupling.program
    users = list(site.node.users)
    if len(users) != 1 or not is_batch_norm(users[0]) or users[0].args[0] is not site.node:
        return None
    statistics = [argument(users[0], name) for name in ("running_mean", "running_var")]
    usual = all(s in program.tensors for s in statistics) and not argument(users[0], "training")
    return users[0] if usual and shared_statistics(users[0], program) is None else None


def _correct(
    reader: _Reader, keep: Keep, held: Mapping[str, Tensor], constant: Tensor | None
) -> tuple[str, ...]:
    """Correct what a layer adds, and the statistics behind it; names of what changed."""
    dims = keep.coupling.env[reader.source]
    assert isinstance(dims, tuple)
    kept = keep.indices(dims[1])
    if kept is None or kept.ndim > 1:
        return ()
    gone = torch.ones(dims[1].size, dtype=torch.bool)
    gone[torch.from_numpy(kept)] = False
    mean, variance = reader.known.mean, reader.known.variance
    at = gone & mean.isfinite()
    if constant is not None:
        at &= ~constant.cpu()
    shift = reader.outputs(torch.where(at, mean, 0.0))
    site, norm, program = reader.site, reader.norm, keep.coupling.program
    changed: tuple[str, ...] = ()
    if site.biases:
        changed += _change(keep, held, site.biases[0], shift, torch.ones_like(shift))
    elif norm is not None:
        name = program.tensors[argument(norm, "running_mean")]
        changed += _change(keep, held, name, -shift, torch.ones_like(shift))
    if norm is not None and not reader.known.averaged and bool(mean.isfinite().all()):
        whole = reader.outputs(variance, 2)
        left = reader.outputs(torch.where(gone, 0.0, variance), 2)
        share = torch.where(left > _LEAST * whole, left / whole.clamp_min(1e-300), 1.0)
        name = program.tensors[argument(norm, "running_var")]
        changed += _change(keep, held, name, torch.zeros_like(share), share)
    return tuple(changed)


def _change(
    keep: Keep, held: Mapping[str, Tensor], name: str, added: Tensor, factor: Tensor
) -> tuple[str, ...]:
    """Scale a tensor of the smaller model, and add to it; its name if that changed it."""
    picked = keep.tensors.get(name, (None,))[0]
    if picked is not None and picked.ndim > 1:
        return ()
    if picked is not None:
        at = torch.from_numpy(np.asarray(picked))
        added, factor = added[at], factor[at]
    tensor = held.get(name)
    moved = bool(added.any()) or bool((factor != 1).any())
    if tensor is None or not moved or not bool(added.isfinite().all()):
        return ()
    with torch.no_grad():
        tensor.copy_(tensor.double() * factor.to(tensor.device) + added.to(tensor.device))
    return (name,)
