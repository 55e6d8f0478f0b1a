"""What the configuration of a transformers model, and those of its parts, say."""

from __future__ import annotations

from typing import Any

from torch import nn


def configs_of(model: nn.Module) -> list[Any]:
    """A model's configuration and those nested in it, outer ones first.

    Args:
        model: A `PreTrainedModel`.
    """
    found: list[Any] = []
    waiting = [getattr(model, "config", None)]
    while waiting:
        config = waiting.pop(0)
        if config is None or any(config is other for other in found):
            continue
        found.append(config)
        waiting += [value for value in vars(config).values() if hasattr(value, "model_type")]
    return found


def every(model: nn.Module, *names: str) -> list[Any]:
    """What configurations have under any of these names, but for None.

    Args:
        model: A `PreTrainedModel`.
        *names: Names of settings, by preference.
    """
    values = [getattr(c, name, None) for name in names for c in configs_of(model)]
    return [value for value in values if value is not None]


def number(model: nn.Module, *names: str, default: int) -> int:
    """The first whole number that a configuration has under one of these names.

    Args:
        model: A `PreTrainedModel`.
        *names: Names of settings, by preference.
        default: Where there is none.
    """
    values = every(model, *names)
    return next((v for v in values if type(v) is int and v > 0), default)


def special_ids(model: nn.Module) -> set[int]:
    """Ids of tokens that mean something to the model's code: padding, ends, places of images.

    Args:
        model: A `PreTrainedModel`.
    """
    found: set[int] = set()
    for config in configs_of(model):
        for name in [*vars(config), "pad_token_id", "bos_token_id", "eos_token_id"]:
            value = getattr(config, name, None)
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                found.update(v for v in (value if isinstance(value, list) else [value]) if v)
                found.update({0} if value == 0 else ())
    return {i for i in found if isinstance(i, int)}
