"""Read a smaller model from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from depcut.errors import DepcutError, InputError
from depcut.storage import dense
from depcut.storage import folder as folders
from depcut.storage.rebuild import Rebuild
from depcut.storage.tensors import STATE, Loaded
from depcut.support import files


def load(
    folder: str | os.PathLike[str],
    net: Callable[[], nn.Module] | nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Read a model that `depcut.save` wrote: equal outputs, the same class, its report.

    The dense architecture is built without values, and made the stored one: classes are patched
    again, in sources that must be the same, and every tensor is read by name. Nothing is
    unpickled, but the model's own module is imported.

    Args:
        folder: The folder.
        net: What makes the dense model, called without arguments: its class or a function; or such
            a model, which is only read. Left out, the model is built from its configuration
            (transformers, timm), or by its class where that needs no arguments.
        device: Where the tensors go.

    Raises:
        InputError: A file is missing, damaged or of another format; or what makes the dense model
            is not known.
        PlanError: The dense model is another architecture, or its source is another one.
    """
    path = folders.checked(folder)
    if not (path / folders.MODEL).exists():
        raise InputError(
            "the folder holds what from_pretrained takes, and its record",
            where=str(path),
            remedy="load it with transformers, as if depcut had not been there",
        )
    try:
        data = files.read_json(path / folders.MODEL)
        plans = [files.read_json(file) for file in sorted(path.glob("plan*.json"))]
        architecture = data["architecture"]
        built = dense.build(architecture, path) if net is None else dense.given(net)
        state = {s["key"]: s["shape"] for s in data["tensors"] if s["file"] == STATE}
        remedy = f"pass what makes the dense {architecture['class'].rpartition(':')[2]}"
        dense.check_shapes(built, state, plans, remedy)
        tensors = Loaded(data["tensors"], path, torch.device(device))
        return Rebuild(data, tensors, remedy).model(built)
    except DepcutError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise folders.reading(error, path) from error
