"""Adapters to other people's training loops and model libraries."""

from depcut.integrations.callbacks import lightning_callback, transformers_callback

__all__ = ["lightning_callback", "transformers_callback"]


def __dir__() -> list[str]:
    return sorted(__all__)
