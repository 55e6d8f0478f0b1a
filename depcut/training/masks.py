"""Masks on a live model: zeros in place, gradients that stay zero, values that can come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depcut.keep import Keep
from depcut.training.places import Place
from depcut.training.probe import element_masks


@dataclass(eq=False)
class _Masked:
    """One parameter with zeros.

    Attributes:
        parameter: The model's own.
        mask: True where it is zero.
        values: What stood there before.
        handle: Of the hook that keeps its gradient zero there, if it has one.
    """

    parameter: nn.Parameter
    mask: torch.Tensor
    values: torch.Tensor
    handle: Any = None


class Masks:
    """Zeros of masked units in a live model, and the values that they stand for.

    Parameters stay the same objects under the same names: optimizers, checkpoints and wrappers of
    the model notice nothing.

    Args:
        model: The model that is being trained.
        places: (parameter, dimension) pairs to zero, by group number.
    """

    def __init__(self, model: nn.Module, places: Mapping[int, frozenset[Place]]) -> None:
        self.places = places
        self.held = dict(model.named_parameters(remove_duplicate=False))
        self._masked: dict[str, _Masked] = {}

    def set(self, keep: Keep) -> None:
        """Mask these units and no others; those that return have the values they had before.

        Args:
            keep: What is not masked.
        """
        self.clear()
        shapes = {name: parameter.shape for name, parameter in self.held.items()}
        names: dict[int, str] = {}
        masks: dict[str, torch.Tensor] = {}
        for name, mask in element_masks(keep, self.places, shapes).items():
            # A shared parameter is zero wherever one of its names says so.
            first = names.setdefault(id(self.held[name]), name)
            masks[first] = masks[first] | mask if first in masks else mask
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = self.held[name]
                mask = mask.to(parameter.device)  # noqa: PLW2901
                entry = _Masked(parameter, mask, parameter.detach()[mask])
                parameter.masked_fill_(mask, 0)
                if parameter.requires_grad:
                    entry.handle = parameter.register_post_accumulate_grad_hook(_still(entry))
                self._masked[name] = entry

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
            _follow(entry)
            entry.parameter.masked_fill_(entry.mask, 0)

    @torch.no_grad()
    def _restore(self) -> None:
        for entry in self._masked.values():
            _follow(entry)
            entry.parameter[entry.mask] = entry.values

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """The values back in their place for a while, to be looked at."""
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


def _follow(entry: _Masked) -> None:
    """Move the mask to where the parameter is now."""
    if entry.mask.device != entry.parameter.device:
        entry.mask = entry.mask.to(entry.parameter.device)
        entry.values = entry.values.to(entry.parameter.device)


def _still(entry: _Masked) -> Any:
    def hook(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            gradient.masked_fill_(entry.mask.to(gradient.device), 0)

    return hook
