"""depcut: a structured-pruning compiler for PyTorch models."""

from __future__ import annotations

from depcut.analysis import Analysis, analyze
from depcut.api import shrink
from depcut.calibration.data import Calibration
from depcut.compact import Compaction, compact, compaction
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
from depcut.version import __version__

__all__ = [
    "Analysis",
    "BudgetError",
    "Calibration",
    "CaptureError",
    "Compaction",
    "Comparison",
    "Compensation",
    "DepcutError",
    "ExportError",
    "ExportReport",
    "Frozen",
    "Group",
    "InputError",
    "LatencyError",
    "LatencyModel",
    "Member",
    "Op",
    "Plan",
    "PlanError",
    "RuleError",
    "Score",
    "VerificationError",
    "__version__",
    "analyze",
    "bench",
    "compact",
    "compaction",
    "compare",
    "export",
    "rule",
    "shrink",
]
