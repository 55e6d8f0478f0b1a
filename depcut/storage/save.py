"""Write a smaller model into a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.apply.carried import carried
from depcut.apply.report import report
from depcut.capture.refusals import check_module
from depcut.storage import folder as folders
from depcut.storage.dense import architecture_of
from depcut.storage.values import Description
from depcut.support import files


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model that depcut made into a folder, from which `depcut.load` reads it.

    The folder holds the weights (safetensors; what is shared is stored once), the plan, the
    modules with their patches as data, the report, and a model card. Nothing is pickled.

    Args:
        model: What `depcut.shrink`, `Plan.apply`, `depcut.compact` or a training run returned; it
            is only read.
        folder: A new or empty folder, or one that an earlier call wrote, which is replaced as a
            whole.

    Raises:
        PlanError: No plan was applied to the model.
        InputError: The folder holds something else, or a tensor cannot be stored.
        DepcutError: The folder cannot be written; what was there is there still.
    """
    check_module(model)
    done = report(model)
    description = Description(model)
    with folders.written(folder) as draft:
        description.tensors.write(draft)
        data = description.data()
        kind = (
            data["modules"][0].get("generated", {}).get("replaces") or data["modules"][0]["class"]
        )
        data["architecture"] = architecture_of(model, kind, draft)
        data["torch"] = str(torch.__version__)
        files.write_json(draft / folders.MODEL, data)
        plans = carried(model)
        for number, plan in enumerate(plans):
            files.write_json(draft / folders.plan_name(number, len(plans)), plan, indent=1)
        del done
