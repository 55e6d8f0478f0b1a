"""depcut: a structured-pruning compiler for PyTorch models."""

from __future__ import annotations

from depcut.analysis import Analysis, analyze
from depcut.api import shrink
from depcut.calibration.data import Calibration
from depcut.compensate import Compensation
from depcut.coupling import Frozen, Group, Member
from depcut.errors import (
    BudgetError,
    CaptureError,
    DepcutError,
    ExportError,
    InputError,
    LatencyError,
    PlanError,
    RuleError,
    VerificationError,
)
from depcut.export import ExportReport, export
from depcut.latency.model import LatencyModel
from depcut.ops.registry import Op, rule
from depcut.plan import Plan
from depcut.report import Comparison, compare
from depcut.scores import Score
from depcut.timing.bench import bench
from depcut.training.budget import Phase, budget_phases, run_phases
from depcut.training.callbacks import lightning_callback, transformers_callback
from depcut.training.gradual import Gradual
from depcut.training.iterative import Iterated, iterate
from depcut.training.sparsity import GroupLasso, GrowingRegularization
from depcut.version import __version__

__all__ = [
    "Analysis",
    "BudgetError",
    "Calibration",
    "CaptureError",
    "Comparison",
    "Compensation",
    "DepcutError",
    "ExportError",
    "ExportReport",
    "Frozen",
    "Gradual",
    "Group",
    "GroupLasso",
    "GrowingRegularization",
    "InputError",
    "Iterated",
    "LatencyError",
    "LatencyModel",
    "Member",
    "Op",
    "Phase",
    "Plan",
    "PlanError",
    "RuleError",
    "Score",
    "VerificationError",
    "__version__",
    "analyze",
    "bench",
    "budget_phases",
    "compare",
    "export",
    "iterate",
    "lightning_callback",
    "rule",
    "run_phases",
    "shrink",
    "transformers_callback",
]
