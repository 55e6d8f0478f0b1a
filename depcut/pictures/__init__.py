"""Results shown: short and collapsed texts, tables, plots, and one HTML page."""

from __future__ import annotations

from depcut.pictures.plots import Point, frontier, pareto

__all__ = ["Point", "frontier", "pareto"]
