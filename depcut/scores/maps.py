"""Statistics of feature maps (units, indices of a unit, examples, *positions), one a unit."""

from __future__ import annotations

import torch

_ENTRIES = 1 << 24  # of a block of matrices, 128 MiB in double precision
_PLANE = 2
_EXAMPLES = 4  # of a batch whose nuclear norms are taken: one eigenproblem a unit and example


def rank(slices: torch.Tensor, precision: float) -> torch.Tensor:
    """Mean rank of each unit's maps, see `depcut.scores.activation.hrank`.

    Args:
        slices: (units, indices of a unit, examples, *positions).
        precision: Of the activations: relative size of what is zero, times the larger side.
    """
    units, indices, examples, *positions = slices.shape
    if len(positions) >= _PLANE:
        maps = slices.reshape(units, indices * examples, positions[0], -1)
    elif positions and indices > 1:
        maps = slices.permute(0, 2, 3, 1)
    elif positions:
        maps = slices
    else:
        maps = slices.transpose(1, 2)[:, None]
    tolerance = precision * max(maps.shape[-2:])
    step = max(1, _ENTRIES // max(1, maps[0].numel()))
    ranks = [torch.linalg.matrix_rank(part, rtol=tolerance) for part in maps.split(step)]
    return torch.cat(ranks).double().mean(1)


def independence(slices: torch.Tensor, _: float) -> torch.Tensor:
    """Mean loss of nuclear norm, see `depcut.scores.activation.chip`.

    The nuclear norm is the sum of the roots of the eigenvalues of the smaller Gram matrix.

    Args:
        slices: (units, indices of a unit, examples, *positions).
    """
    units, indices = slices.shape[:2]
    maps = slices.flatten(3).permute(2, 0, 1, 3) if slices.ndim > 3 else slices[None]
    maps = maps[:: -(-len(maps) // _EXAMPLES)]
    total = slices.new_zeros(units)
    for feature_maps in maps:
        lines = feature_maps.reshape(units * indices, -1)
        wide = lines.shape[1] > len(lines)
        total += _nuclear(lines @ lines.T if wide else lines.T @ lines) - _without(feature_maps)
    return total / len(maps)


def _nuclear(gram: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.eigvalsh(gram.reshape(-1, *gram.shape[-2:]))
    return values.clamp(min=0).sqrt().sum(-1)


def _without(maps: torch.Tensor) -> torch.Tensor:
    """Nuclear norm of (units, indices, positions) without each of the units."""
    units, indices, positions = maps.shape
    lines = maps.reshape(units * indices, positions)
    side = min(lines.shape)
    step = max(1, _ENTRIES // (side * side))
    out = []
    for start in range(0, units, step):
        block = torch.arange(start, min(start + step, units), device=maps.device)
        if positions <= len(lines):
            own = maps[block]
            gram = lines.T @ lines - own.transpose(1, 2) @ own
        else:
            owner = torch.arange(units, device=maps.device).repeat_interleave(indices)
            kept = (owner[None] != block[:, None]).double()
            gram = (lines @ lines.T) * kept[:, :, None] * kept[:, None, :]
        out.append(_nuclear(gram))
    return torch.cat(out)
