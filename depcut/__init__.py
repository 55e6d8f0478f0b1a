"""depcut: a structured-pruning compiler for PyTorch models."""

from __future__ import annotations

from depcut.support import torch_floor  # noqa: F401  (it refuses a torch that is too old)

# isort: split
from depcut.analysis import Analysis, analyze
from depcut.api import shrink
from depcut.calibration.data import Calibration
from depcut.coupling.groups import Frozen, Group, Member
from depcut.dead_units import Compaction, compact, compaction
from depcut.deploy.export import ExportReport, export
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
from depcut.integrations.callbacks import lightning_callback, transformers_callback
from depcut.latency.model import LatencyModel
from depcut.ops.registry import Op, rule
from depcut.plan.plan import Plan
from depcut.repair.compensate import Compensation
from depcut.scores import Score
from depcut.timing.bench import bench
from depcut.timing.comparison import Comparison, compare
from depcut.training.budget import Phase, budget_phases, run_phases
from depcut.training.distance import relative_distance
from depcut.training.distillation import Distillation
from depcut.training.fresh import fresh, scratch_epochs
from depcut.training.gradual import Gradual
from depcut.training.iterative import Iterated, iterate
from depcut.training.loop import Retrained, retrain
from depcut.training.outputs import output_distance
from depcut.training.schedules import OriginalSchedule, schedule
from depcut.training.snapshots import LotteryTicket, Snapshots, lottery_ticket, rewind
from depcut.training.sparsity import GroupLasso, GrowingRegularization
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
    "Distillation",
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
    "LotteryTicket",
    "Member",
    "Op",
    "OriginalSchedule",
    "Phase",
    "Plan",
    "PlanError",
    "Retrained",
    "RuleError",
    "Score",
    "Snapshots",
    "TrainingError",
    "VerificationError",
    "__version__",
    "analyze",
    "bench",
    "budget_phases",
    "compact",
    "compaction",
    "compare",
    "export",
    "fresh",
    "iterate",
    "lightning_callback",
    "lottery_ticket",
    "output_distance",
    "relative_distance",
    "retrain",
    "rewind",
    "rule",
    "run_phases",
    "schedule",
    "scratch_epochs",
    "shrink",
    "transformers_callback",
]
