"""Models that a library builds again from data: a configuration, or the name of an architecture."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from depcut.errors import InputError
from depcut.support import files

_CONFIG = "config.json"


def recipe_of(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """How a library builds the architecture of a model; None where none does.

    Args:
        model: A model of transformers or timm, or any other.
        folder: Where its configuration is written.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        config: Any = model.config
        text = config.to_json_string(use_diff=False)
        files.write_text(folder / _CONFIG, text, "configuration")
        return {"library": "transformers", "configuration": _named(type(config))}
    described = getattr(model, "pretrained_cfg", None)
    name = described.get("architecture") if isinstance(described, dict) else None
    if "timm" in sys.modules and isinstance(name, str):
        arguments = {"num_classes": getattr(model, "num_classes", None)}
        return {"library": "timm", "name": name, "arguments": arguments}
    return None


def built_from(recipe: dict[str, Any], kind: Any, folder: Path) -> nn.Module:
    """The architecture that a library builds, on the current device.

    Args:
        recipe: What `recipe_of` gave.
        kind: The model's class.
        folder: Where the configuration is.

    Raises:
        InputError: The recipe is damaged.
    """
    if recipe["library"] == "timm":
        timm: Any = importlib.import_module("timm")
        arguments = {k: v for k, v in recipe["arguments"].items() if v is not None}
        built: nn.Module = timm.create_model(recipe["name"], pretrained=False, **arguments)
        return built
    transformers: Any = importlib.import_module("transformers")
    module, _, name = recipe["configuration"].partition(":")
    config_class: Any = getattr(importlib.import_module(module), name, None)
    sound = isinstance(config_class, type) and isinstance(kind, type)
    if (
        recipe["library"] != "transformers"
        or not sound
        or not issubclass(config_class, transformers.PretrainedConfig)
        or not issubclass(kind, transformers.PreTrainedModel)
    ):
        raise InputError(
            f"{name} is no configuration of transformers, or {kind} no model of it",
            where=str(folder),
            remedy="save the model again",
        )
    made: nn.Module = kind(config_class.from_json_file(str(folder / _CONFIG)))
    return made


def _named(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
