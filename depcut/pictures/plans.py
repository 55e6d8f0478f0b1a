"""A plan as rows, as records of a page, and in short."""

from __future__ import annotations

from typing import Any

from torch import nn

from depcut.branches.find import residuals
from depcut.coupling.groups import Coupling
from depcut.pictures.alike import Record, Repeated, repeated_groups
from depcut.pictures.record import analysis_record, layer_records, plain
from depcut.pictures.summary import Summary, Table
from depcut.plan.data import PlanData
from depcut.support.quantities import quantity


def plan_rows(plan: PlanData) -> list[Record]:
    """A row for each group: its units, how many stay, and in how many rows they are chosen.

    Args:
        plan: A plan.
    """
    rows = []
    for name, units in plan.sizes.items():
        kept = plan.kept.get(name)
        count = units if kept is None else int(kept.shape[-1])
        share = count / units if units else 1.0
        rows.append({"group": name, "units": units, "kept": count, "share": share})
    return rows


def plan_records(plan: PlanData, coupling: Coupling | None, model: nn.Module | None) -> Record:
    """What a page shows of a plan, by the part of the page.

    Args:
        plan: A plan.
        coupling: The analysed architecture; None where it is not known.
        model: The model it was made for; None where it is not known.
    """
    found: dict[str, Any] = {
        "plan": {
            "digest": plan.digest,
            "settings": plain(plan.settings),
            "dropped": list(plan.dropped),
            "groups": plan_rows(plan),
        }
    }
    if coupling is not None and model is not None:
        branches = residuals(coupling).branches
        found["analysis"] = analysis_record(coupling, model, branches)
        found["layers"] = layer_records(plan.keep(coupling), model)
    return found


def with_kept(groups: list[Record], plan: Record | None) -> list[Record]:
    """Groups of an analysis with how many of their units stay.

    Args:
        groups: See `depcut.pictures.record.group_record`.
        plan: The plan's part of `plan_records`; None: all stay.
    """
    kept = {row["group"]: row["kept"] for row in plan["groups"]} if plan else {}
    return [{**group, "kept": kept.get(group["group"], group["units"])} for group in groups]


def plan_summary(plan: PlanData, records: Record) -> Summary:
    """A plan in short, as notebooks show it.

    Args:
        plan: A plan.
        records: What a page shows of it.
    """
    facts = {"narrowed groups": f"{len(plan.kept)} of {len(plan.sizes)}"}
    facts |= {name: str(plan.settings[name]) for name in ("ratio", "of") if name in plan.settings}
    layers = records.get("layers", [])
    for name, text in (("macs", "MACs"), ("params", "parameters")) if layers else ():
        dense, now = (sum(layer[key] for layer in layers) for key in (name, f"{name}_now"))
        facts[text] = f"{quantity(dense)} → {quantity(now)}"
    if "analysis" in records:
        groups = with_kept(records["analysis"]["groups"], records["plan"])
        rows = [
            (f"{r.label}  {r.times}".rstrip(), r.span("units"), r.span("kept"), *_lists(r))
            for r in repeated_groups(groups)
        ]
        table = Table(("group", "units", "kept", "narrows", "read by"), rows, "groups")
    else:
        counts = [(r["group"], str(r["units"]), str(r["kept"])) for r in plan_rows(plan)]
        table = Table(("group", "units", "kept"), counts, "groups")
    notes = tuple(plan.without)
    return Summary(f"Plan {plan.digest}", facts, (table,), notes)


def _lists(alike: Repeated) -> tuple[str, str]:
    return ", ".join(alike.all("narrows")), ", ".join(alike.all("read_by"))
