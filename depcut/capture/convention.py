"""The convention that a model follows: example inputs, caches and outputs, as its library says."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from depcut.support.conventions import adapters


class Convention(Protocol):
    """What a library says of all its models, of whatever architecture.

    Attributes:
        library: Its name.
    """

    library: str

    def follows(self, model: nn.Module) -> bool:
        """Whether a model is one of the library's."""

    def example_inputs(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Keyword arguments that the model may take, likeliest first; nobody has tried them."""

    def settings(self, model: nn.Module, given: Collection[str]) -> dict[str, Any]:
        """Keyword arguments that a capture adds to those that are given, by their names."""

    def first_tokens(self, model: nn.Module) -> list[int]:
        """Ids that texts may start with, those of an encoder's or only text, likeliest first."""

    def mask_token(self, model: nn.Module) -> int | None:
        """Id of the token that stands for one to be predicted, None where it is not said."""

    def written(
        self, model: nn.Module, start: Tensor, length: int, seconds: float
    ) -> Tensor | None:
        """Texts (rows, length) that go on from `start` as likely as the model says, with its cache.

        It draws from torch's generators. Texts are shorter where time is up; None where the library
        does not write with this model.
        """

    def auxiliary(self, result: Any) -> frozenset[str]:
        """Names of the outputs, of what a forward returned, that are no results of their own."""


def convention_of(model: nn.Module) -> Convention | None:
    """The convention that a model follows, None where none is known.

    Args:
        model: Any module.
    """
    found = (getattr(adapter, "convention", None) for adapter in adapters(model))
    return next((c for c in found if c is not None and c.follows(model)), None)
