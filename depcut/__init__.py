"""depcut: a structured-pruning compiler for PyTorch models."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from depcut.support import torch_floor  # noqa: F401  (it refuses a torch that is too old)

# isort: split
from depcut.analysis import Analysis, analyze
from depcut.api import shrink
from depcut.apply.plan import Plan
from depcut.apply.report import report
from depcut.calibration.data import Calibration
from depcut.dead_units import compact, compaction
from depcut.deploy.export import export
from depcut.errors import (
    BudgetError,
    CaptureError,
    DepcutError,
    ExportError,
    InputError,
    LatencyError,
    PlanError,
    RuleError,
    TrainingError,
    VerificationError,
)
from depcut.ops.registry import Op, rule
from depcut.options import Options
from depcut.scores import Score
from depcut.storage.load import load
from depcut.storage.save import save
from depcut.streaming.shrink import shrink_checkpoint
from depcut.support import conventions
from depcut.timing.bench import bench
from depcut.timing.comparison import compare
from depcut.version import __version__

if TYPE_CHECKING:
    from depcut import integrations, training

__all__ = [
    "Analysis",
    "BudgetError",
    "Calibration",
    "CaptureError",
    "DepcutError",
    "ExportError",
    "InputError",
    "LatencyError",
    "Op",
    "Options",
    "Plan",
    "PlanError",
    "RuleError",
    "Score",
    "TrainingError",
    "VerificationError",
    "__version__",
    "analyze",
    "bench",
    "compact",
    "compaction",
    "compare",
    "export",
    "integrations",
    "load",
    "report",
    "rule",
    "save",
    "shrink",
    "shrink_checkpoint",
    "training",
]

_LATER = ("integrations", "training")  # loaded when first asked for
# Adapters of libraries of models, by library; loaded for those alone.
_ADAPTERS = {
    "timm": "timm",
    "transformers": "pretrained",
    "diffusers": "pretrained",
    "huggingface_hub": "pretrained",
}

for _library, _adapter in _ADAPTERS.items():
    conventions.register(
        _library, functools.partial(importlib.import_module, f"depcut.integrations.{_adapter}")
    )


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"depcut.{name}")
    raise AttributeError(f"module 'depcut' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
