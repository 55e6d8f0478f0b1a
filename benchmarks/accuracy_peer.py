"""Torch-Pruning 1.6.1 as the accuracy benchmark's baseline, used as an expert would.

All of its criteria, ranked within a layer, over all layers, and over all of a kind ("isomorphic",
Fang et al., ECCV 2024); attention is pruned by the dimensions of its heads or by whole heads, and
the attributes that its code reads are patched afterwards. The ratio is searched until the MACs come
to the operating point. Criteria that read gradients get those of the same samples and the same loss
as depcut.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import measure
import torch
import torch_pruning
from accuracy_tasks import Pair, Task
from torch import Tensor, nn
from torch_pruning import importance

STEPS = 9  # of the search for the ratio that comes to the MACs
NEAR = 0.002  # of the dense MACs: where the search ends
LIMIT = 0.02  # how far from the operating point a result may be
RANKINGS: Mapping[str, dict[str, bool]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Gradients:
    """Of the loss by parameter name, over all calibration samples."""

    mean: Named
    squared: Named  # mean of the squares of every sample's own gradient


def gradients(task: Task, model: nn.Module, pairs: Sequence[Pair]) -> Gradients:
    """One backward pass a sample, in evaluation mode."""
    model = copy.deepcopy(model)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    squares = copy.deepcopy(sums)
    count = 0
    for inputs, targets in pairs:
        for i in range(len(inputs)):
            model.zero_grad()
            task.loss(model(inputs[i : i + 1]), targets[i : i + 1]).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    squares[name] += parameter.grad**2
            count += 1
    return Gradients(
        {name: g / count for name, g in sums.items()},
        {name: g / count for name, g in squares.items()},
    )


def _taylor(model: nn.Module, found: Gradients) -> importance.Importance:
    _put(model, found.mean)
    return importance.GroupTaylorImportance()


def _hessian(model: nn.Module, found: Gradients) -> importance.Importance:
    # its own accumulate_grad() starts anew with each call and so keeps the last sample's square
    # only; without any call it reads the squares from .grad
    _put(model, found.squared)
    return importance.GroupHessianImportance()


def _obdc(model: nn.Module, found: Gradients) -> importance.Importance:
    # what its hooks would collect is the same sum of squared gradients; the hooks handle no inputs
    # of three dimensions. num_classes: no layer is left out because of its size
    _put(model, found.mean)
    made = importance.OBDCImportance(num_classes=-1)
    made.steps = 1
    made.Fisher = {
        module: found.squared[f"{name}.weight"].flatten(1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return made


def _put(model: nn.Module, values: Named) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = values[name].clone()


CRITERIA: Mapping[str, Callable[[nn.Module, Gradients], importance.Importance]] = {
    "L1": lambda _m, _g: importance.GroupMagnitudeImportance(p=1),
    "L2": lambda _m, _g: importance.GroupMagnitudeImportance(p=2),
    "BNScale": lambda _m, _g: importance.BNScaleImportance(),
    "LAMP": lambda _m, _g: importance.LAMPImportance(),
    "FPGM": lambda _m, _g: importance.FPGMImportance(),
    "Taylor": _taylor,
    "Hessian": _hessian,
    "OBD-C": _obdc,
    "random": lambda _m, _g: importance.RandomImportance(),
}


@dataclass(frozen=True)
class Variant:
    """One way to use Torch-Pruning."""

    criterion: str
    ranking: str  # within a layer, over all layers, or over all layers of a kind
    heads: bool | None  # whole heads go, or dimensions of all heads; None: no attention

    @property
    def name(self) -> str:
        parts = ["Torch-Pruning", self.criterion, self.ranking]
        return " ".join(parts if self.heads is None else [*parts, "dims heads".split()[self.heads]])


def variants(model: nn.Module) -> Iterator[Variant]:
    """All ways that make sense for a model."""
    attention = any(_attentions(model))
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for criterion in CRITERIA:
        if criterion == "BNScale" and not normed:
            continue
        for ranking in RANKINGS:
            for heads in (False, True) if attention else (None,):
                yield Variant(criterion, ranking, heads)


def pruned(
    task: Task, model: nn.Module, found: Gradients, variant: Variant, macs_kept: float, seed: int
) -> tuple[float, nn.Module]:
    """The share of the MACs that the result keeps, as near to the wanted one as it comes, and it.

    Raises:
        RuntimeError: It comes to no such result; the message says why.
    """
    inputs = task.example()
    dense = sum(measure.counted_macs(model, (inputs,)).values())
    low, high, best = 0.0, 1.0, None
    reason = ""
    for _ in range(STEPS):
        ratio = (low + high) / 2
        try:
            slim = _once(model, inputs, found, variant, ratio, seed)
            kept = sum(measure.counted_macs(slim, (inputs,)).values()) / dense
        except Exception as error:  # noqa: BLE001  (any failure of the peer's is its result)
            source = traceback.extract_tb(error.__traceback__)[-1].line
            reason = f"{measure.first_line(error)} [{source}]"
            high = ratio
            continue
        if best is None or abs(kept - macs_kept) < abs(best[0] - macs_kept):
            best = kept, slim
        if abs(kept - macs_kept) < NEAR:
            break
        low, high = (ratio, high) if kept > macs_kept else (low, ratio)
    if best is None:
        raise RuntimeError(reason)
    kept, slim = best
    if measure.shapes(slim, (inputs,)) != measure.shapes(model, (inputs,)):
        raise RuntimeError("the outputs have other shapes")
    if abs(kept - macs_kept) > LIMIT:
        cause = f" ({reason})" if reason else " (nothing is removed)" * (kept == 1.0)
        raise RuntimeError(f"no ratio comes within {LIMIT} of the MACs{cause}")
    return kept, slim


def _once(
    model: nn.Module, inputs: Tensor, found: Gradients, variant: Variant, ratio: float, seed: int
) -> nn.Module:
    model = copy.deepcopy(model)
    torch.manual_seed(seed)  # for the criterion that draws
    by_heads = bool(variant.heads)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=CRITERIA[variant.criterion](model, found),
        **RANKINGS[variant.ranking],
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        in_channel_groups={},  # its defaults are shared between pruners
        out_channel_groups={},
        num_heads={attention.qkv: attention.num_heads for attention in _attentions(model)},
        prune_num_heads=by_heads,
        prune_head_dims=not by_heads,
        head_pruning_ratio=ratio if by_heads else 0.0,
        unwrapped_parameters=[
            (p, p.dim() - 1) for name, p in model.named_parameters() if name == "positions"
        ],
    )
    pruner.step()
    for attention in _attentions(model):
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.weight.shape[0] // 3 // attention.num_heads
    return model.eval()


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if hasattr(module, "qkv"))
