"""Retraining after pruning, and pruning while training: parts for any loop, and a loop."""

from depcut.training.budget import Phase, budget_phases, run_phases
from depcut.training.distance import relative_distance
from depcut.training.distillation import Distillation
from depcut.training.fresh import fresh, scratch_epochs
from depcut.training.gradual import Gradual
from depcut.training.iterative import Iterated, iterate
from depcut.training.loop import Retrained, retrain
from depcut.training.options import TrainingOptions
from depcut.training.outputs import output_distance
from depcut.training.schedules import OriginalSchedule, schedule
from depcut.training.snapshots import LotteryTicket, Snapshots, lottery_ticket, rewind
from depcut.training.sparsity import GroupLasso, GrowingRegularization

__all__ = [
    "Distillation",
    "Gradual",
    "GroupLasso",
    "GrowingRegularization",
    "Iterated",
    "LotteryTicket",
    "OriginalSchedule",
    "Phase",
    "Retrained",
    "Snapshots",
    "TrainingOptions",
    "budget_phases",
    "fresh",
    "iterate",
    "lottery_ticket",
    "output_distance",
    "relative_distance",
    "retrain",
    "rewind",
    "run_phases",
    "schedule",
    "scratch_epochs",
]


def __dir__() -> list[str]:
    return sorted(__all__)
