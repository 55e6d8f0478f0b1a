"""How an analysis shows itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn

from depcut.branches.branch import Branch
from depcut.coupling.groups import Coupling
from depcut.pictures.listing import analysis_summary, listing
from depcut.pictures.record import analysis_record, group_record, layer_records
from depcut.pictures.shown import Shown
from depcut.pictures.summary import Summary
from depcut.plan.keep import Keep


class ShownAnalysis(Shown):
    """An analysis, as far as it is shown."""

    model: nn.Module
    coupling: Coupling

    @property
    @abstractmethod
    def branches(self) -> tuple[Branch, ...]:
        """Residual branches that a plan can drop as a whole."""

    @property
    def frozen_share(self) -> float:
        """Share of the parameters of which no index can be removed."""
        return self.coupling.frozen_share

    def listing(self, *, full: bool = False) -> str:
        """The groups as a table, and what else there is to say.

        Args:
            full: A row for each group with all of its layers; otherwise groups that are alike in
                repeated layers share one, as in `print`.
        """
        return listing(self.to_dict(), full=full)

    def to_dict(self) -> dict[str, Any]:
        """Groups, frozen dimensions, branches and costs as plain data."""
        return analysis_record(self.coupling, self.model, self.branches)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group."""
        return [group_record(group) for group in self.coupling.groups]

    def records(self) -> dict[str, Any]:
        """What a page shows of it."""
        dense = layer_records(Keep(self.coupling, {}), self.model)
        return {"analysis": self.to_dict(), "layers": dense}

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        groups, frozen = len(self.coupling.groups), len(self.coupling.frozen)
        name = type(self.model).__name__
        return f"Analysis of {name}: {groups} groups, {frozen} frozen dimensions"

    def summary(self) -> Summary:
        """What notebooks show."""
        return analysis_summary(self.to_dict())

    def __str__(self) -> str:
        return self.listing()
