"""Masks on a model in training: zeros in parameters and gradients, and the values set aside."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from depcut.masking.places import Place
from depcut.masking.probe import Flags, staying
from depcut.plan.keep import Keep


@dataclass(eq=False)
class _Masked:
    """One parameter with zeros.

    Attributes:
        parameter: The model's own.
        factors: Zeros and ones, one tensor a masked dimension, that broadcast to the parameter.
            Products with them are cheaper than `masked_fill`.
        values: What stood where it is zero.
        handle: Of the hook that keeps its gradient zero there, if it has one.
    """

    parameter: nn.Parameter
    factors: list[torch.Tensor]
    values: torch.Tensor
    handle: Any = None

    @property
    def mask(self) -> torch.Tensor:
        """True where it is zero."""
        kept = torch.ones(self.parameter.shape, dtype=torch.bool, device=self.factors[0].device)
        for factor in self.factors:
            kept &= factor.bool()
        return ~kept

    def apply(self, tensor: torch.Tensor) -> None:
        """Zero what is masked in a tensor of the parameter's shape, in place."""
        for number, factor in enumerate(self.factors):
            if factor.device != tensor.device or factor.dtype != tensor.dtype:
                self.factors[number] = factor.to(tensor)
            tensor.mul_(self.factors[number])

    def restore(self) -> None:
        """Put the values back."""
        parameter = self.parameter
        parameter[self.mask.to(parameter.device)] = self.values.to(parameter)


class Masks:
    """Zeros of masked units in a live model, and the values that they stand for.

    Parameters stay the same objects under the same names, so that optimizers, checkpoints and
    wrappers of the model work as before.

    Args:
        model: The model that is being trained.
        places: (parameter, dimension) pairs to zero, by group number.
        aliases: Names that share one tensor, by each of these names.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[int, frozenset[Place]],
        aliases: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.places = places
        self.held = dict(model.named_parameters(remove_duplicate=False))
        self._aliases = aliases
        self._masked: dict[str, _Masked] = {}

    def set(self, keep: Keep) -> None:
        """Mask these units and no others; those that return have the values they had before.

        Args:
            keep: What is not masked.
        """
        self.clear()
        for name, dims in staying(keep, self.places, self._aliases).items():
            parameter = self.held[name]
            factors = [_factor(parameter, stays) for stays in dims.values()]
            entry = _Masked(parameter, factors, parameter.new_empty(0))
            with torch.no_grad():
                entry.values = parameter.detach()[entry.mask]
                entry.apply(parameter)
            if parameter.requires_grad:
                entry.handle = parameter.register_post_accumulate_grad_hook(_gradient_hook(entry))
            self._masked[name] = entry

    def sizes(self, keep: Keep) -> dict[str, int]:
        """How many elements of each parameter `set` would zero.

        Args:
            keep: What is not masked.
        """
        out = {}
        for name, dims in staying(keep, self.places, self._aliases).items():
            left = functools.reduce(np.logical_and, dims.values())
            # every entry stands for a block of equal size
            out[name] = self.held[name].numel() // left.size * int((~left).sum())
        return out

    def clear(self) -> None:
        """Put all values back, and take all hooks off."""
        self._restore()
        self.release()

    def release(self) -> None:
        """Take all hooks off; what is zero stays zero."""
        for entry in self._masked.values():
            if entry.handle is not None:
                entry.handle.remove()
        self._masked = {}

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero again what an optimizer (momentum, Adam, weight decay) may have moved."""
        for entry in self._masked.values():
            entry.apply(entry.parameter)

    @torch.no_grad()
    def _restore(self) -> None:
        for entry in self._masked.values():
            entry.restore()

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """Within the context, parameters hold the values that are masked otherwise."""
        self._restore()
        try:
            yield
        finally:
            self.enforce()

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The values that are masked, flat, by parameter name."""
        return {name: entry.values for name, entry in self._masked.items()}

    @torch.no_grad()
    def load_values(self, values: Mapping[str, torch.Tensor]) -> None:
        """Exchange the remembered values for others of the same masks.

        Args:
            values: As `values` returned them.
        """
        for name, entry in self._masked.items():
            entry.values = values[name].detach().to(entry.parameter).clone()


def _factor(parameter: torch.Tensor, stays: Flags) -> torch.Tensor:
    """Ones at what stays, zeros elsewhere, to broadcast over the dimensions before the first."""
    factor = torch.from_numpy(stays).to(parameter.detach())
    first = next((i for i, n in enumerate(stays.shape) if n > 1), 0)
    # With what follows filled in, the product runs along contiguous memory.
    return factor.expand(*stays.shape[:first], *parameter.shape[first:]).contiguous()


def _gradient_hook(entry: _Masked) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            entry.apply(gradient)

    return hook
