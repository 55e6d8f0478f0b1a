"""Read a smaller model from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from depcut.apply.carried import put_back
from depcut.errors import DepcutError, InputError
from depcut.storage import dense
from depcut.storage import folder as folders
from depcut.storage.rebuild import Rebuild
from depcut.storage.tensors import Loaded
from depcut.support import files
from depcut.support.failures import first_line

# What plain data of other shapes than `depcut.save` writes lead to.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


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
            is not known, or there is no such device.
        PlanError: The dense model is another architecture, or its source is another one.
    """
    place = _device(device)
    path = folders.checked(folder)
    if not (path / folders.MODEL).exists():
        raise InputError(
            "the folder holds what from_pretrained takes, and its record",
            where=str(path),
            remedy="load it with transformers, as if depcut had not been there",
        )
    try:
        data = files.read_json(path / folders.MODEL)
        plans = [files.read_json(path / name) for name in folders.plan_names(path)]
        shapes = plans[0]["shapes"] if plans else {}
        architecture = data["architecture"]
        built = dense.build(architecture, path) if net is None else dense.given(net)
        remedy = f"pass what makes the dense {architecture['class'].rpartition(':')[2]}"
        dense.check_shapes(built, data, shapes, remedy)
        tensors = Loaded(data["tensors"], path, place)
        model = Rebuild(data, tensors, remedy).model(built)
        put_back(model, plans, files.read_json(path / folders.REPORT))
        return model
    except DepcutError:
        raise
    except _DAMAGE as error:
        raise folders.reading(error, path) from error


def _device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"there is no such device: {first_line(error)}",
            where="device=",
            remedy='pass one of torch, such as "cpu" or "cuda"',
        ) from error
