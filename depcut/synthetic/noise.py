"""Noise that is smooth along the dimensions of an image or of a wave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depcut.synthetic.floats import Layout, Scales, Tensors

STEEPEST = 2.0  # amplitudes fall by frequency to this power at most; natural images: by about 1
CONTRASTS = 0.25, 2.0  # standard deviations of the rows, by that of the noise
BRIGHTNESS = 0.5  # standard deviation of the rows' means, alike
LONG = 512  # numbers of a row that are a wave; fewer are a table


def spatial(shape: Sequence[int]) -> tuple[int, ...]:
    """Dimensions of a tensor along which neighbours may be alike; none of a table.

    Args:
        shape: With the rows first.
    """
    inner = range(1, len(shape))
    if len(shape) == 2:
        return (1,) if shape[1] >= LONG else ()
    # The channels come first, or last.
    channels = min((1, len(shape) - 1), key=lambda d: shape[d])
    return tuple(d for d in inner if d != channels and shape[d] > 3)


def smooth(plan: Layout, rows: int, generator: torch.Generator, scales: Scales) -> Tensors:
    """Noise of several smoothnesses, contrasts and brightnesses; white where nothing is spatial.

    Args:
        plan: What is made.
        rows: Of the call.
        generator: Draws it, on the CPU.
        scales: Mean and standard deviation of each tensor.
    """
    made = plan.noise(rows, generator, dict.fromkeys(plan.made, (0.0, 1.0)))
    for position, white in made.items():
        mean, std = scales[position]
        dims = spatial(white.shape)
        drawn = _filtered(white, dims, generator) if dims else white
        made[position] = mean + std * drawn
    return made


def _filtered(white: Tensor, dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    per_row = (len(white), *[1] * (white.ndim - 1))
    steepness = (STEEPEST * torch.rand(per_row, generator=generator)).to(white)
    least, most = CONTRASTS
    contrast = (least + (most - least) * torch.rand(per_row, generator=generator)).to(white)
    brightness = (BRIGHTNESS * torch.randn(per_row, generator=generator)).to(white)
    squared = torch.zeros([1] * white.ndim).to(white)
    for dim in dims:
        line = torch.fft.fftfreq(white.shape[dim]).to(white)
        squared = squared + line.square().view([-1 if d == dim else 1 for d in range(white.ndim)])
    frequency = squared.sqrt().clamp_min(1 / max(white.shape[d] for d in dims))
    waves = torch.fft.fftn(white, dim=dims) / frequency**steepness
    out = torch.fft.ifftn(waves, dim=dims).real
    inner = list(range(1, white.ndim))
    out = out / out.std(inner, keepdim=True).clamp_min(1e-12)
    made: Tensor = contrast * out + brightness
    return made


def roughness(made: Tensors) -> Tensor:
    """Mean absolute difference of neighbours along the spatial dimensions; zero without any.

    Args:
        made: Inputs.
    """
    parts = [
        tensor.diff(dim=dim).abs().mean()
        for tensor in made.values()
        for dim in spatial(tensor.shape)
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())
