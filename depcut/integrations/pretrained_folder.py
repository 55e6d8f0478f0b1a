"""A folder that `save_pretrained` of transformers wrote: its class, its shards, its conventions."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.errors import InputError, listed
from depcut.support import files
from depcut.support.failures import first_line, reraise_fatal

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WRITE = "write it with save_pretrained of transformers, which makes both"


@dataclass(frozen=True)
class Shards:
    """Which file holds which tensors.

    Attributes:
        files: Names of the tensors by the name of the file; None: whatever the file holds.
        metadata: Of the index; None where one file holds all, without an index.
    """

    files: Mapping[str, frozenset[str] | None]
    metadata: Mapping[str, Any] | None = None


def shards_of(folder: Path) -> Shards:
    """Which files of a folder hold which tensors.

    Args:
        folder: The folder.

    Raises:
        InputError: It has no config, its weights are pickled or missing, or the index is damaged.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), remedy="check the path")
    if not (folder / CONFIG).is_file():
        raise InputError(f"the folder has no {CONFIG}", where=str(folder), remedy=_WRITE)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / WEIGHTS).is_file():
        return Shards({WEIGHTS: None})
    pickled = [name for name in _PICKLED if (folder / name).is_file()]
    if pickled:
        raise InputError(
            f"the weights are pickled: {listed(pickled)}",
            where=str(folder),
            remedy="load the model with transformers and save it again: it writes safetensors",
        )
    raise InputError(
        f"the folder has neither {WEIGHTS} nor {INDEX}", where=str(folder), remedy=_WRITE
    )


def _indexed(folder: Path) -> Shards:
    try:
        index = files.read_json(folder / INDEX)
        of_tensor, metadata = index["weight_map"], dict(index.get("metadata") or {})
        held: dict[str, set[str]] = {}
        for name, file in of_tensor.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name} is in {file!r}, which is no name of a file")
            held.setdefault(file, set()).add(name)
        if not held:
            raise ValueError("it names no tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the index of the shards is damaged: {first_line(error)}",
            where=str(folder / INDEX),
            remedy="copy the file again",
        ) from error
    return Shards({file: frozenset(held[file]) for file in sorted(held)}, metadata)


def model_of(folder: Path) -> nn.Module:
    """The class that a folder's config names, in eval mode, all of it on the meta device.

    Args:
        folder: The folder.

    Raises:
        InputError: The config is damaged, says that weights are quantized, or names a class that
            transformers does not have or cannot build.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"transformers cannot be imported: {error}",
            where=str(folder),
            remedy="pip install transformers",
        ) from error
    try:
        said = files.read_json(folder / CONFIG)
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"the config cannot be read: {first_line(error)}",
            where=str(folder / CONFIG),
            remedy="copy the file again, or use a transformers that has its model_type",
        ) from error
    if said.get("quantization_config") is not None:
        raise InputError(
            "the weights are quantized",
            where=str(folder / CONFIG),
            remedy="shrink the model that they were made from, and quantize the result",
        )
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise InputError(
            f"transformers {transformers.__version__} has no class {name}",
            where=str(folder / CONFIG),
            remedy="use a transformers that has it; code that lies beside the weights is not run",
        )
    try:
        with warnings.catch_warnings(), preserved(), quiet(), torch.device("meta"):
            warnings.simplefilter("ignore")
            make = kind.from_config if kind.__name__.startswith("Auto") else kind
            built: nn.Module = make(config)
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"{name} cannot be built from the config: {first_line(error)}",
            where=str(folder / CONFIG),
            remedy="use a transformers of the version that wrote it",
        ) from error
    return built.eval()


def write_config(slim: nn.Module, dense: nn.Module, folder: Path) -> None:
    """Write the config of a smaller model, with the class and the precision of the dense one.

    Args:
        slim: The smaller model.
        dense: What `model_of` returned.
        folder: Where.

    Raises:
        DepcutError: It cannot be written.
    """
    config: Any = slim.config
    config.architectures = [type(dense).__name__]
    files.write_text(folder / CONFIG, config.to_json_string(use_diff=True), "config")
