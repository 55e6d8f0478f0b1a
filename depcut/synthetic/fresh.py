"""Whether weights are as they were drawn, or trained: what nothing was learnt by says nothing.

The entries of a weight that was drawn are independent, so its largest singular value stays at the
edge of the Marchenko-Pastur law, within fluctuations of Tracy and Widom's law (Johnstone, On the
distribution of the largest eigenvalue in principal components analysis, Annals of Statistics 2001,
eq. 1.3-1.5). Training adds directions of low rank that stand out (Martin & Mahoney, Implicit
Self-Regularization in Deep Neural Networks, JMLR 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from depcut.capture.held import held_tensors
from depcut.capture.program import Program

_SIDE = 256  # rows and columns of a matrix that are looked at; more of one where fewer of the other
_LEAST = 4  # rows and columns that a matrix must have to be looked at
_MATRICES = 48  # that are looked at
_EDGE = 4.0  # standardised largest eigenvalue of a drawn matrix: Tracy and Widom's exceeds it never
_ITERATIONS = 50
_SHARE = 0.1  # of the matrices that stand out in a trained model; some are not drawn but set


def fresh(program: Program, model: torch.nn.Module) -> bool:
    """Whether the weights of a model are as they were drawn at initialisation.

    Args:
        program: The captured model.
        model: The model; it is only read.
    """
    return share_standing_out(program, model) < _SHARE


def share_standing_out(program: Program, model: torch.nn.Module) -> float:
    """The share of some of a model's matrices with directions that no drawing gives.

    Args:
        program: The captured model.
        model: The model; it is only read.
    """
    edges = [standing_out(matrix) for matrix in _matrices(program, model)]
    return sum(edge > _EDGE for edge in edges) / max(len(edges), 1)


def standing_out(matrix: torch.Tensor) -> float:
    """How far the largest eigenvalue of a matrix's Gram lies above that of independent entries.

    Args:
        matrix: [rows, columns], both more than 1.

    Returns:
        In the units of Tracy and Widom's law (mean -1.2, deviation 1.3 for independent entries).
    """
    values = _levelled(matrix.detach().double().cpu())
    if min(values.shape) < _LEAST or not bool(torch.isfinite(values).all()):
        return float("-inf")
    scale = float(values.square().mean())
    n, p = (np.sqrt(side - 0.5) for side in values.shape)
    centre, width = (n + p) ** 2, (n + p) * (1 / n + 1 / p) ** (1 / 3)
    return float((_largest(values) / scale - centre) / width)


def _levelled(values: torch.Tensor) -> torch.Tensor:
    """Rows and columns of the same scale each, those of zeros left out.

    Units that were scaled, or masked, are no sign of training.
    """
    there = values != 0
    values = torch.where(there, values - values.sum() / there.sum().clamp(min=1), 0.0)
    for dim in (1, 0):
        scales = values.square().mean(dim, keepdim=True).sqrt()
        left = (scales > 0).flatten()
        values = values[left] if dim else values[:, left]
        values = values / (scales[left] if dim else scales[:, left])
    return values


def _largest(values: torch.Tensor) -> float:
    """The largest eigenvalue of a Gram matrix, by power iteration: never more than it is."""
    gram = values @ values.T if len(values) <= values.shape[1] else values.T @ values
    vector = gram[gram.diagonal().argmax()]
    for _ in range(_ITERATIONS):
        vector = gram @ (vector / vector.norm())
    return float(vector.norm())


def _matrices(program: Program, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Some weights of the model as matrices, at most so many numbers of each.

    A convolution's kernel is one of outputs, and one of places: what is trained is smooth.
    """
    held = held_tensors(model)
    names = sorted(name for name in program.parameters if name in held)
    values = [t for t in map(held.__getitem__, names) if t.is_floating_point() and not t.is_meta]
    # Tables that are set and not drawn are kept from training, where anything is trained.
    values = [t for t in values if t.requires_grad] or values
    shown = [t.flatten(1) for t in values if t.ndim > 1 and t.numel()]
    kernels = [t.flatten(2) for t in values if t.ndim > 3 and t.numel()]
    shown += [k.permute(2, 0, 1) for k in kernels]  # their other dimensions are flattened late
    large = [t for t in shown if min(_shape(t)) >= _LEAST and not _repeats(t)]
    for tensor in large[:: -(-len(large) // _MATRICES) or 1]:
        height, width = _shape(tensor)
        short = min(height, width, _SIDE)
        sides = (short, _SIDE * _SIDE // short)
        rows, columns = sides if height <= width else sides[::-1]
        matrix = tensor[:: -(-height // rows)].flatten(1)
        yield matrix[:, :: -(-width // columns)]


def _shape(tensor: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of what is a matrix but for its flattening."""
    return tensor.shape[0], tensor[0].numel()


def _repeats(tensor: torch.Tensor) -> bool:
    """Whether its rows or its columns are all the same, as no drawing leaves them."""
    first = tensor[0]
    if torch.equal(first, tensor[-1]) and bool((tensor == first).all()):
        return True
    if not bool((first == first.flatten()[0]).all()):
        return False
    column = tensor[(slice(None), *[slice(1)] * first.ndim)]
    return bool((tensor == column).all())
