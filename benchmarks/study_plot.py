"""Curves of the study: the metric against what is left, a panel a task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import measure
import numpy as np
from figures import save
from measure import Row
from study_tasks import STUDY

IMAGES = measure.HERE.parent / "docs" / "images"

Curve = tuple[str, Callable[[Row], bool], str]  # label, which rows, colour


def of(part: str, method: str, compensated: bool | None = None) -> Callable[[Row], bool]:
    return lambda row: (
        row["part"] == part
        and row["method"] == method
        and (compensated is None or row.get("compensated") == compensated)
    )


def zeros(method: str) -> Callable[[Row], bool]:
    """Rows of zeros by a method; behind batch norms, with these estimated anew as a repair does."""
    plain, anew = of("unstructured", method), of("unstructured", f"{method}, norms anew")
    return lambda row: anew(row) or (plain(row) and not has_batch_norm(row["task"]))


@functools.cache
def has_batch_norm(task: str) -> bool:
    net = STUDY[task].build() if task in STUDY else None
    return net is not None and any("BatchNorm" in type(m).__name__ for m in net.modules())


ONE_SHOT: Sequence[Curve] = (
    ("obs, repaired (the default)", of("criteria", "obs", True), "tab:blue"),
    ("obs", of("criteria", "obs", False), "tab:cyan"),
    ("magnitude, repaired", of("criteria", "magnitude", True), "tab:green"),
    ("magnitude", of("criteria", "magnitude", False), "tab:orange"),
    ("taylor", of("criteria", "taylor", False), "tab:purple"),
    ("random, repaired", of("criteria", "random", True), "tab:brown"),
    ("random", of("criteria", "random", False), "tab:red"),
)
SPARSE: Sequence[Curve] = (
    ("obs, repaired: whole units", of("criteria", "obs", True), "tab:blue"),
    ("zeros by SparseGPT", zeros("SparseGPT"), "tab:green"),
    ("SparseGPT, shares by magnitude", zeros("SparseGPT, shares by magnitude"), "tab:cyan"),
    (
        "SparseGPT, shares of obs",
        of("unstructured", "SparseGPT, shares of obs, as many as obs"),
        "tab:red",
    ),
    ("zeros by Wanda", zeros("Wanda"), "tab:purple"),
    ("zeros by magnitude", zeros("magnitude"), "tab:orange"),
)
TRAINED: Sequence[Curve] = (
    ("dense, rate rewound", of("tickets", "dense, rate rewound"), "black"),
    ("rate rewound", of("tickets", "rate rewound"), "tab:blue"),
    ("distilled", of("tickets", "distilled"), "tab:cyan"),
    ("fine-tuned", of("tickets", "fine-tuned"), "tab:orange"),
    ("ticket of step 0", of("tickets", "ticket of step 0"), "tab:green"),
    ("early ticket", of("tickets", "early ticket"), "tab:olive"),
    ("scratch-E", of("tickets", "scratch-E"), "tab:red"),
    ("scratch-B", of("tickets", "scratch-B"), "tab:brown"),
)
EQUAL: Sequence[Curve] = (
    ("large-sparse", of("sparse_dense", "large-sparse, gradual"), "tab:green"),
    ("gradual, structured", of("sparse_dense", "gradual, structured"), "tab:blue"),
    ("small-dense", of("sparse_dense", "small-dense"), "tab:red"),
)
PICTURES: Mapping[str, tuple[Sequence[Curve], str, str]] = {
    "study_one_shot": (ONE_SHOT, "macs", "MACs kept"),
    "study_sparse": (SPARSE, "params", "parameters that are not zero"),
    "study_trained": (TRAINED, "macs", "MACs kept"),
    "study_equal": (EQUAL, "params", "parameters that are not zero"),
}


def main(good: Sequence[Row]) -> list[Path]:
    """Draw every picture that there are rows for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for name, (curves, along, label) in PICTURES.items():
        shown = [row for row in good if any(picks(row) for _, picks, _ in curves)]
        tasks = [task for task in STUDY if any(row["task"] == task for row in shown)]
        if not tasks:
            continue
        lines = -(-len(tasks) // 3)
        figure, panels = plt.subplots(
            lines, 3, figsize=(11, 3.1 * lines), layout="constrained", squeeze=False
        )
        for axes, task in zip(panels.flat, tasks, strict=False):
            panel(axes, task, [row for row in shown if row["task"] == task], curves, along)
            axes.set_xlabel(label)
        for axes in panels.flat[len(tasks) :]:
            axes.axis("off")
        found = {
            text: handle
            for axes in panels.flat
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(found.values(), found, loc="outside lower center", ncols=4)
        written.append(IMAGES / f"{name}.png")
        save(figure, written[-1])
        plt.close(figure)
    return written


def panel(axes: Any, task: str, shown: Sequence[Row], curves: Sequence[Curve], along: str) -> None:
    """One task: a curve a method, from the dense model down; bands are standard deviations."""
    dense = list({row["seed"]: row["dense"] for row in shown}.values())
    for label, picks, colour in curves:
        own = [row for row in shown if picks(row)]
        points = sorted({row["removed"] for row in own})
        if not points:
            continue
        if points == [0.0]:  # a control of which nothing is removed stands beside every ratio
            middle = mean(row["metric"] for row in own)
            axes.axhline(middle, color=colour, label=label, lw=1.2, linestyle="--")
            continue
        at = [[row for row in own if row["removed"] == point] for point in points]
        kept = [1.0] + [mean(row[along] for row in found) for found in at]
        metrics = [np.array(dense)] + [np.array([row["metric"] for row in found]) for found in at]
        middle = np.array([values.mean() for values in metrics])
        band = np.array([values.std(ddof=1) if len(values) > 1 else 0.0 for values in metrics])
        axes.plot(kept, middle, color=colour, marker=".", label=label, lw=1.1)
        axes.fill_between(kept, middle - band, middle + band, color=colour, alpha=0.15, lw=0)
    axes.axhline(mean(dense), color="lightgray", lw=0.8, zorder=0)
    axes.set_title(task)
    axes.set_ylabel(STUDY[task].unit, fontsize=7)
    if not STUDY[task].higher_is_better:
        axes.set_ylim(top=min(axes.get_ylim()[1], 3 * mean(dense)))
    axes.invert_xaxis()
