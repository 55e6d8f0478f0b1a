"""Jobs of the study with unstructured zeros: what they cost, and what they save on this machine."""

from __future__ import annotations

import copy
import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row
from safetensors.torch import save
from study_prune import REMOVED, Job, Subject
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import depcut

SPARSITIES = (0.5, 0.65, 0.8, 0.9, 0.95)
TIMED = 0.8
RENORMED = ", norms anew"  # batch norms' statistics are estimated again behind the zeros
SHARES = ", shares by magnitude"  # of zeros in each layer
OBS_SHARES = ", shares of obs"  # of parameters in each layer, as depcut's default leaves them
AS_MANY = "as many as obs"
DAMP = 0.01  # of the mean of the Hessian's diagonal, as in SparseGPT
BLOCK = 32  # columns whose masks are chosen together (128 in the paper, whose layers are wider)

Sparsify = Callable[[nn.Module, Subject, float], None]


def unstructured(subject: Subject) -> Iterator[Job]:
    """Zeros anywhere in the matrices: by magnitude, two of four, by Wanda and by SparseGPT."""
    for name, sparsify in METHODS.items():
        if RENORMED not in name or batch_norms(subject.model):
            yield Job("unstructured", name, partial(_of_method, subject, name, sparsify))
    for name, sparsify in (
        ("magnitude", by_magnitude),
        ("SparseGPT", by_sparsegpt),
        (f"SparseGPT{SHARES}", by_sparsegpt_of_shares),
        (f"SparseGPT{OBS_SHARES}", None),
    ):
        yield Job("unstructured", f"{name}, {AS_MANY}", partial(_as_many, subject, sparsify))


def _as_many(subject: Subject, sparsify: Sparsify | None) -> Iterator[Row]:
    """As many parameters are left as depcut's default leaves, whose repair renews norms, too."""
    weights = sum(m.weight.numel() for m in matrices(subject.model).values())
    for removed in REMOVED:
        plan = subject.analysis.plan(removed, data=subject.calibration, align=1, seed=subject.seed)
        share = (subject.params - plan.params) / weights
        if share >= 1:
            yield {"removed": removed, "error": "the matrices hold fewer parameters than go"}
            continue
        sparse = copy.deepcopy(subject.model)
        renormed(sparsify or of_layers(_slim(subject, plan)), sparse, subject, share)
        params = round(nonzero(sparse) / subject.params, 5)
        yield {"removed": removed, **subject.judged(sparse), "params": params, **sizes(sparse)}


def sparse_times(subject: Subject) -> Iterator[Job]:
    """A file whose weights are mostly zeros, in onnxruntime's dense kernels."""
    if subject.seed == 0:
        yield Job("sparse_times", "magnitude", partial(_timed, subject))


def _of_method(subject: Subject, name: str, sparsify: Sparsify) -> Iterator[Row]:
    for sparsity in (0.5,) if "2:4" in name else SPARSITIES:
        start = time.perf_counter()
        sparse = copy.deepcopy(subject.model)
        sparsify(sparse, subject, sparsity)
        seconds = round(time.perf_counter() - start, 2)
        yield {
            "removed": sparsity,
            **subject.judged(sparse),
            "params": round(nonzero(sparse) / subject.params, 5),
            **sizes(sparse),
            "seconds": seconds,
        }


def _timed(subject: Subject) -> Iterator[Row]:
    sparse = copy.deepcopy(subject.model)
    by_magnitude(sparse, subject, TIMED)
    one = subject.inputs[:1]
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        files = {}
        for name, model in (("dense", subject.model), ("sparse", sparse)):
            files[name] = Path(folder) / f"{name}.onnx"
            depcut.export(model, files[name], one)
        result = depcut.bench(files, one, rounds=30)
        yield {
            "removed": TIMED,
            "ms": round(1e3 * result.timings["sparse"].median, 4),
            "dense_ms": round(1e3 * result.timings["dense"].median, 4),
            "speedup": round(result.speedup("dense", "sparse").ratio, 3),
            "bytes": files["sparse"].stat().st_size,
            "dense_bytes": files["dense"].stat().st_size,
        }


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Layers whose weights get zeros: all linear and convolutional ones, in order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def nonzero(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def sizes(model: nn.Module) -> Row:
    """Bytes on disk: as it is, compressed by zip, and as a bit for each value beside what is left.

    The last is what a format for zeros can come to that needs no search for a value's place.
    """
    whole = save({name: t.contiguous() for name, t in model.state_dict().items()})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.safetensors", whole)
    bits = sum(
        (p.numel() + 7) // 8 + p.element_size() * int(p.count_nonzero())
        for p in model.state_dict().values()
    )
    return {"bytes": len(whole), "zip_bytes": len(packed.getvalue()), "bitmap_bytes": bits}


def by_magnitude(model: nn.Module, _subject: Subject, sparsity: float) -> None:
    """The smallest weights of all matrices together (torch.nn.utils.prune)."""
    places = [(layer, "weight") for layer in matrices(model).values()]
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=sparsity)
    for layer, name in places:
        prune.remove(layer, name)


def by_magnitude_of_layer(model: nn.Module, _subject: Subject, sparsity: float) -> None:
    """The smallest weights of each matrix."""
    for layer in matrices(model).values():
        _smallest_of_layer(layer, sparsity)


def by_magnitude_2_of_4(model: nn.Module, _subject: Subject, _sparsity: float) -> None:
    """The two smallest of every four neighbours in a row (Mishra et al., 2021)."""
    for layer in matrices(model).values():
        weight = layer.weight.data.flatten(1)
        if weight.shape[1] % 4 == 0:
            layer.weight.data = (weight * _largest_two(weight.abs())).view_as(layer.weight)


def _largest_two(scores: Tensor) -> Tensor:
    fours = scores.reshape(len(scores), -1, 4)
    kept = torch.zeros_like(fours).scatter_(2, fours.topk(2, dim=2).indices, 1.0)
    return kept.view_as(scores)


def by_wanda(model: nn.Module, subject: Subject, sparsity: float) -> None:
    """Within each output, by |weight| times the norm of its input (Sun et al., Wanda, 2024)."""
    for name, layer in matrices(model).items():
        if _grouped(layer):
            _smallest_of_layer(layer, sparsity)
            continue
        norms = hessian(model, name, subject).diagonal().sqrt()
        weight = layer.weight.data.flatten(1)
        scores = weight.abs() * norms
        drop = scores.topk(round(sparsity * weight.shape[1]), dim=1, largest=False).indices
        layer.weight.data = weight.scatter(1, drop, 0.0).view_as(layer.weight)


def by_sparsegpt(
    model: nn.Module, subject: Subject, sparsity: float, *, four: bool = False
) -> None:
    """Layer by layer, what is left makes up for what goes (Frantar & Alistarh, SparseGPT, 2023).

    Algorithm 1 of the paper: the inverse Hessian's Cholesky factor, masks chosen block by block of
    columns by the squared weight over the squared diagonal, errors carried into later columns. The
    inputs of a layer are those behind the layers before it, with their zeros.
    """
    for name, layer in matrices(model).items():
        _solve(model, name, layer, subject, sparsity, four=four)


def by_sparsegpt_of_shares(model: nn.Module, subject: Subject, sparsity: float) -> None:
    """SparseGPT, in each layer the share that falls to it where all magnitudes are compared.

    The paper's layers are alike and get the same share each; those of a CNN are not.
    """
    masked = copy.deepcopy(model)
    by_magnitude(masked, subject, sparsity)
    for name, layer in matrices(masked).items():
        share = float((layer.weight == 0).float().mean())
        _solve(model, name, model.get_submodule(name), subject, min(share, 0.999), four=False)


def of_layers(slim: nn.Module) -> Sparsify:
    """SparseGPT that leaves each layer the share of what is left that it has in a smaller model.

    Were the best zeros found, nothing could be lost by it: the smaller model is one of its choices.
    """
    left = {name: layer.weight.numel() for name, layer in matrices(slim).items()}

    def sparsify(model: nn.Module, subject: Subject, sparsity: float) -> None:
        layers: dict[str, Any] = matrices(model)
        weights = sum(layer.weight.numel() for layer in layers.values())
        times = (1 - sparsity) * weights / sum(left.values())
        for name, layer in layers.items():
            share = 1 - min(1.0, times * left.get(name, 0) / layer.weight.numel())
            if share > 0:
                _solve(model, name, layer, subject, min(share, 0.999), four=False)

    return sparsify


def _slim(subject: Subject, plan: depcut.Plan) -> nn.Module:
    return plan.apply(subject.model, compensate=False, progress=False)


def _solve(
    model: nn.Module, name: str, layer: Any, subject: Subject, sparsity: float, *, four: bool
) -> None:
    if not _grouped(layer):
        layer.weight.data = _solved(
            layer.weight.data.flatten(1), hessian(model, name, subject), sparsity, four=four
        ).view_as(layer.weight)
    elif not four:
        _smallest_of_layer(layer, sparsity)


def _solved(weight: Tensor, products: Tensor, sparsity: float, *, four: bool) -> Tensor:
    dtype, weight = weight.dtype, weight.double().clone()
    count = weight.shape[1]
    if four and count % 4:
        return weight.to(dtype)
    dead = products.diagonal() == 0
    products = products.clone()
    products[dead, dead] = 1.0
    weight[:, dead] = 0.0
    damped = products + DAMP * products.diagonal().mean() * torch.eye(count, dtype=torch.double)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for first in range(0, count, BLOCK):
        columns = range(first, min(first + BLOCK, count))
        block = slice(first, columns.stop)
        scores = weight[:, block] ** 2 / factor.diagonal()[block] ** 2
        if four:
            kept = _largest_two(scores)
        else:
            limit = scores.flatten().kthvalue(max(1, round(sparsity * scores.numel()))).values
            kept = (scores > limit).double()
        for column in columns:
            value = weight[:, column] * kept[:, column - first]
            error = (weight[:, column] - value) / factor[column, column]
            weight[:, column:] -= error[:, None] * factor[column, column:]
            weight[:, column] = value
    return weight.to(dtype)


def _grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


def _smallest_of_layer(layer: Any, sparsity: float) -> None:
    weight = layer.weight.data
    limit = weight.abs().flatten().kthvalue(max(1, round(sparsity * weight.numel()))).values
    layer.weight.data = weight * (weight.abs() > limit)


@torch.no_grad()
def hessian(model: nn.Module, name: str, subject: Subject) -> Tensor:
    """X X^T of the vectors that a layer's weight multiplies, over the calibration data."""
    layer = model.get_submodule(name)
    total: list[Tensor] = []

    def collect(_module: nn.Module, args: tuple[Any, ...]) -> None:
        vectors = _vectors(layer, args[0]).double()
        total.append(vectors.T @ vectors)

    handle = layer.register_forward_pre_hook(collect)
    try:
        for inputs, _ in subject.pairs:
            model(inputs)
    finally:
        handle.remove()
    return torch.stack(total).sum(0)


def _vectors(layer: nn.Module, inputs: Tensor) -> Tensor:
    """[vectors, columns of the flat weight]."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        patches = functional.unfold(
            inputs, layer.kernel_size, layer.dilation, padding, layer.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)
    return inputs.flatten(0, -2)


@torch.no_grad()
def renormed(sparsify: Sparsify, model: nn.Module, subject: Subject, sparsity: float) -> None:
    """Zeros, with batch norms' means and variances estimated anew from the calibration data.

    Meanwhile norms take each batch's own: what later layers are solved for is what they will read.
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
    sparsify(model, subject, sparsity)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    if norms:
        for inputs, _ in subject.pairs:
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


METHODS: Mapping[str, Sparsify] = {
    "magnitude": by_magnitude,
    f"magnitude{RENORMED}": partial(renormed, by_magnitude),
    "magnitude by layer": by_magnitude_of_layer,
    "Wanda": by_wanda,
    f"Wanda{RENORMED}": partial(renormed, by_wanda),
    "SparseGPT": by_sparsegpt,
    f"SparseGPT{RENORMED}": partial(renormed, by_sparsegpt),
    f"SparseGPT{SHARES}": by_sparsegpt_of_shares,
    f"SparseGPT{SHARES}{RENORMED}": partial(renormed, by_sparsegpt_of_shares),
    "magnitude 2:4": by_magnitude_2_of_4,
    "SparseGPT 2:4": partial(by_sparsegpt, four=True),
}


def share_of_zeros(model: nn.Module) -> float:
    """Of the weights of all matrices."""
    weights = [layer.weight for layer in matrices(model).values()]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return float(np.divide(zeros, sum(w.numel() for w in weights)))
