"""The report on an applied plan, which the smaller model carries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from depcut.errors import InputError, PlanError, listed
from depcut.pictures.record import layer_of_record, layer_record, plain
from depcut.pictures.reports import report_summary
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary
from depcut.plan.budget import NEAR, missed
from depcut.plan.layers import LayerSizes
from depcut.rebuild.record import lines as rebuild_lines
from depcut.repair.compensate import Compensation, Repair
from depcut.support.quantities import quantity
from depcut.support.unwrap import unwrapped

# A string: deepcopy and pickle take it along, and nothing of depcut is needed to load it.
REPORT = "_depcut_report"


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What a plan did to a model.

    Attributes:
        digest: Of the plan.
        settings: How the plan was made: ratio and options.
        generated: Modules that were generated where a class's code cannot express the new sizes,
            with the reason.
        error: Largest difference that verification saw, relative to the outputs' scale; NaN where
            the weights have no values.
        macs: MACs of one example, dense and now.
        params: Number of parameters, dense and now.
        compensation: What was re-solved on data, None without.
        patched: Modules whose class was patched where its code gets numbers wrong, with what
            changed: a diff of the source.
        unreached: Layers with parameters that the example call did not run; they are as wide as
            they were, and may not fit what feeds them.
        notes: What the capture had to assume, in words.
        layers: Sizes of every layer, dense and now.
    """

    digest: str
    settings: Mapping[str, Any]
    generated: Mapping[str, str] = field(default_factory=dict)
    error: float = math.nan
    macs: tuple[int, int] = (0, 0)
    params: tuple[int, int] = (0, 0)
    compensation: Compensation | None = None
    patched: Mapping[str, str] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[LayerSizes, ...] = ()

    @property
    def lineage(self) -> dict[str, str]:
        """The plan's digest and request, for the metadata of exported files."""
        request = {n: str(self.settings[n]) for n in ("ratio", "of") if n in self.settings}
        return {"plan_digest": self.digest, **request}

    @property
    def missed(self) -> float | None:
        """By which share of the budget more is left than that, less if negative.

        None where no ratio of MACs or parameters was asked for.
        """
        pair = {"macs": self.macs, "params": self.params}.get(str(self.settings.get("of")))
        if pair is None or not pair[0] or "ratio" not in self.settings:
            return None
        return missed(self.settings, *pair)

    def _patches(self) -> dict[str, list[str]]:
        """Modules by what was changed in them."""
        out: dict[str, list[str]] = {}
        for name, change in self.patched.items():
            out.setdefault(change, []).append(name or "the model itself")
        return out

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; a number that is not finite is None."""
        layers = [layer_record(layer) for layer in self.layers]
        return {**plain(replace(self, layers=())), "layers": layers}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [layer_record(layer) for layer in self.layers]

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        data = self.to_dict()
        return {"report": data, "layers": data["layers"]}

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        (macs, macs_now), (params, params_now) = self.macs, self.params
        return (
            f"Report on plan {self.digest}: MACs {quantity(macs)} -> {quantity(macs_now)}, "
            f"parameters {quantity(params)} -> {quantity(params_now)}"
        )

    def summary(self) -> Summary:
        """What notebooks show."""
        return report_summary(self.to_dict())

    def __str__(self) -> str:
        lines = [f"plan {self.digest}"]
        for name, (dense, now) in (("MACs", self.macs), ("parameters", self.params)):
            share = f" ({now / dense:.1%})" if dense else ""
            lines.append(f"  {name}: {dense:,} -> {now:,}{share}")
        if self.missed is not None and abs(self.missed) > NEAR:
            lines.append(
                f"  {self.missed:+.1%} of the {self.settings['of']} that were to be left: widths "
                "move in whole units and heads, ties and steps of align"
            )
        lines.append(f"  largest difference seen by verification: {self.error:.2g} of the scale")
        lines += [
            f"  generated in place of {name or 'the whole model'}: {why}"
            for name, why in self.generated.items()
        ]
        for change, names in self._patches().items():
            lines.append(f"  patched: {listed(names)}")
            lines += [f"    {line}" for line in change.splitlines()]
        whole = self.settings.get("kept_whole")
        if whole:
            lines.append(
                f"  kept whole, as their new widths need a generated module: "
                f"{listed(whole['groups'])} ({whole['share_of_macs']:.1%} of the MACs)"
            )
        lines += [f"  {line}" for line in rebuild_lines(self.settings)]
        if self.unreached:
            left = listed(list(self.unreached))
            lines.append(f"  not reached by the example inputs, left as wide as it was: {left}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.compensation is not None:
            lines += [f"  {line}" for line in str(self.compensation).splitlines()]
        return "\n".join(lines)


def record(model: nn.Module, report: Report) -> None:
    """Write a report into a model; it replaces that of an earlier plan.

    Args:
        model: The smaller model.
        report: What was done to it.
    """
    # Not by setattr: the class may have a __setattr__ of its own.
    layers = [layer_record(layer) for layer in report.layers]
    vars(model)[REPORT] = json.dumps({**asdict(replace(report, layers=())), "layers": layers})


def amend(model: nn.Module, **changes: Any) -> None:
    """Change some fields of a model's report.

    Args:
        model: A model with a report.
        **changes: New values by field.
    """
    record(model, replace(report(model), **changes))


def report(model: nn.Module) -> Report:
    """What was done to a model: sizes, generated modules, the largest difference, repairs.

    Copies and pickles of the model carry the same report.

    Args:
        model: What `depcut.shrink`, `Plan.apply` or `depcut.compact` returned.

    Raises:
        InputError: It is no module.
        PlanError: No plan was applied to it.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a torch.nn.Module",
            where="depcut.report",
            remedy="pass what depcut.shrink returned",
        )
    text = vars(model).get(REPORT)
    if text is None:
        raise PlanError(
            "no plan was applied to this model",
            where=type(model).__name__,
            remedy="pass what depcut.shrink, Plan.apply or depcut.compact returned",
        )
    return report_of_record(json.loads(text))


def report_of_record(record: Mapping[str, Any]) -> Report:
    """The report that `report_record` gave as plain data.

    Args:
        record: The data.
    """
    data = dict(record)
    done = data.pop("compensation")
    if done is not None:
        done = Compensation(tuple(Repair(**r) for r in done["repairs"]), done["left"])
    data |= {name: tuple(data.get(name, ())) for name in ("macs", "params", "unreached")}
    data |= {name: tuple(data[name]) for name in ("macs", "params", "notes")}
    data["layers"] = tuple(map(layer_of_record, data.get("layers", ())))
    return Report(**data, compensation=done)


def report_record(model: nn.Module) -> dict[str, Any]:
    """A model's report as plain data.

    Args:
        model: A model with a report.
    """
    data: dict[str, Any] = json.loads(vars(model)[REPORT])
    return data


def lineage_of(model: nn.Module) -> dict[str, str]:
    """The plan's digest and request, for the files made from a model; {} for a dense one.

    Args:
        model: Any model.
    """
    return report(model).lineage if REPORT in vars(model) else {}
