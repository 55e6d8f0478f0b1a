"""What all results have in common: a short repr, plain data, a DataFrame, HTML, and a page."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from depcut.errors import InputError
from depcut.pictures.optional import needs
from depcut.pictures.page import fragment, write_page
from depcut.pictures.summary import Summary
from depcut.support.failures import shown

if TYPE_CHECKING:
    import pandas as pd

_LONGEST = 280  # characters of a repr
_RESULTS = "pass what analyze, Plan, report, compare, bench or compaction made"


class Shown(ABC):
    """A result that shows itself."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for JSON."""

    @abstractmethod
    def summary(self) -> Summary:
        """The result in short, as notebooks show it."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """One line that says what it is; it costs nothing to make."""

    def records(self) -> dict[str, Any]:
        """What it adds to a page, by the part of the page."""
        return {}

    def rows(self) -> list[dict[str, Any]]:
        """Its rows, all with the same names, for tables."""
        return []

    def to_pandas(self) -> pd.DataFrame:
        """Its rows as a DataFrame.

        Raises:
            InputError: pandas is not installed.
        """
        with needs("pandas", "to_pandas"):
            import pandas as pd
        return pd.DataFrame(self.rows())

    def to_html(self, path: str | os.PathLike[str], *others: Shown, title: str = "") -> None:
        """Write a page on this and other results: one file, that needs no network.

        Args:
            path: The file to make or replace.
            *others: More to show on it: a plan beside its analysis, the report on the smaller
                model, a comparison. Of two that tell the same, the later one counts.
            title: Of the page; the model's class when left out.

        Raises:
            InputError: One of the others is no result.
            DepcutError: The file cannot be written.
        """
        records: dict[str, Any] = {}
        for result in (self, *others):
            if not isinstance(result, Shown):
                raise InputError(
                    f"{shown(result)} is no result of depcut", where="to_html", remedy=_RESULTS
                )
            records |= result.records()
        write_page(path, records, title)

    def _repr_html_(self) -> str:
        return fragment(self.summary())

    def __repr__(self) -> str:
        line = self.headline
        return f"<{line if len(line) <= _LONGEST else line[: _LONGEST - 3] + '...'}>"
