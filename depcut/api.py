"""One call from a model to a smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from depcut.analysis import analyze
from depcut.choose import check_budget
from depcut.inputs import Inputs
from depcut.scores import Criterion

ModelT = TypeVar("ModelT", bound=nn.Module)


def shrink(
    model: ModelT,
    ratio: float | None = None,
    inputs: Inputs = None,
    *,
    of: str = "macs",
    latency_ms: float | None = None,
    score: str | Criterion = "magnitude",
    allocation: str | None = None,
    align: int = 8,
    keep: Iterable[str] = (),
    ratios: Mapping[str, float] | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    depth: bool = False,
) -> ModelT:
    """A smaller model of the same class that computes the same on the units that stay.

    Args:
        model: Any module that torch.export can capture; it is not changed.
        ratio: Fraction removed of the quantity named by `of`, in (0, 1).
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; left out, inferred
            from the first layer where that is unambiguous.
        of: "macs", "params", "channels" (every group loses that share) or "latency" (measured in
            onnxruntime on this machine's CPU, on the inputs as given).
        latency_ms: In place of a ratio: milliseconds to come to.
        score: Name of a criterion ("magnitude", "l1", "l2", "random") or a function.
        allocation: "uniform" (same share everywhere) or "global" (least score per cost first); by
            default "global" for latency, "uniform" for all else.
        align: Kept widths are multiples of it where the width allows; 1: any width.
        keep: Globs over module or parameter names whose width must stay.
        ratios: Fraction of units removed, by glob, for groups that the budget does not decide.
        seed: For criteria that draw.
        threads: Threads that one operator may use, where time is measured.
        progress: Whether to show on standard error what is being measured.
        optimizer: One that trains `model`; its state is sliced, and it trains the result.
        depth: Whether residual branches may be dropped as a whole, beside narrowing the rest.

    Raises:
        DepcutError: See `depcut.analyze`, `Analysis.plan` and `Plan.apply`.
    """
    check_budget(ratio, of, latency_ms, depth)
    plan = analyze(model, inputs).plan(
        ratio,
        of=of,
        latency_ms=latency_ms,
        score=score,
        allocation=allocation,
        align=align,
        keep=keep,
        ratios=ratios,
        seed=seed,
        threads=threads,
        progress=progress,
        depth=depth,
    )
    return cast(ModelT, plan.apply(model, optimizer=optimizer))
