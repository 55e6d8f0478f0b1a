"""The plans that a smaller model carries: those that were applied to it, one after the other."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from depcut.apply.report import REPORT
from depcut.plan.data import PlanData

# A string, as the report is one.
PLANS = "_depcut_plans"


def carry(model: nn.Module, plan: PlanData) -> None:
    """Write a plan into the model that it made, after those of the model that it was applied to.

    Args:
        model: The smaller model.
        plan: What was applied.
    """
    # Not by setattr: the class may have a __setattr__ of its own.
    vars(model)[PLANS] = json.dumps([*carried(model), plan.to_dict()], default=_unknown)


def carried(model: nn.Module) -> list[dict[str, Any]]:
    """The plans that were applied to a model, as `PlanData.record`; each is of what the last left.

    Args:
        model: Any model.
    """
    plans: list[dict[str, Any]] = json.loads(vars(model).get(PLANS, "[]"))
    return plans


def put_back(model: nn.Module, plans: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Write what `carried` and `report_record` gave into a model that was made anew.

    Args:
        model: The smaller model.
        plans: The plans that were applied.
        report: What was done.
    """
    vars(model)[REPORT] = json.dumps(report)
    vars(model)[PLANS] = json.dumps(plans)


def _unknown(_: object) -> None:
    """In place of an argument of the example call that is no plain data."""
