"""Adapters to other people's training loops and model libraries."""

from depcut.integrations.callbacks import lightning_callback, transformers_callback
from depcut.integrations.decoding import DecodingStep, decoding_step

__all__ = ["DecodingStep", "decoding_step", "lightning_callback", "transformers_callback"]


def __dir__() -> list[str]:
    return sorted(__all__)
