"""One call from a model to a smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from depcut.allocate.choose import check_budget
from depcut.analysis import analyze
from depcut.calibration.data import BATCHES, Data, Loss, read_with_inputs
from depcut.capture.inputs import Inputs
from depcut.repair.mend import wants_repair
from depcut.scores import Criterion, Score

ModelT = TypeVar("ModelT", bound=nn.Module)


def shrink(
    model: ModelT,
    ratio: float | None = None,
    inputs: Inputs = None,
    *,
    of: str = "macs",
    latency_ms: float | None = None,
    score: str | Score | Criterion | None = None,
    data: Data | None = None,
    loss: Loss | None = None,
    batches: int = BATCHES,
    compensate: bool | str = "auto",
    low_memory: bool = False,
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
        inputs: A tensor, a tuple of positional or a dict of keyword arguments; left out, the first
            item of the data, or inferred from the first layer where that is unambiguous.
        of: "macs", "params", "channels" (every group loses that share) or "latency" (measured in
            onnxruntime on this machine's CPU, on the inputs as given).
        latency_ms: In place of a ratio: milliseconds to come to.
        score: A criterion by name (see `depcut.scores`), as `depcut.Score` with options, or as a
            function of (coupling, model, seed); by default "obs" with data, "magnitude" without.
        data: Calibration data: any iterable of what the model takes, or of (input, target) pairs.
        loss: A function of (output, target) that returns a scalar, for criteria with gradients.
        batches: How many items of the data to read at most.
        compensate: Whether to re-solve the weights that read what was removed, so that every
            layer's outputs come close to the dense ones on the data; "auto": if there is data.
        low_memory: Whether to trade time for memory.
        allocation: "uniform" (same share everywhere) or "global" (least loss per cost first); by
            default "global" for latency and for scores that are losses ("obs"), else "uniform".
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
    wants_repair(compensate, data is not None)
    items, inputs = read_with_inputs(data, batches, inputs, model, loss is not None)
    analysis = analyze(model, inputs)
    calibration = analysis.calibrate(
        items, loss=loss, batches=batches, low_memory=low_memory, progress=progress
    )
    plan = analysis.plan(
        ratio,
        of=of,
        latency_ms=latency_ms,
        score=score,
        data=calibration,
        allocation=allocation,
        align=align,
        keep=keep,
        ratios=ratios,
        seed=seed,
        threads=threads,
        progress=progress,
        depth=depth,
    )
    slim = plan.apply(model, optimizer=optimizer, data=calibration, compensate=compensate)
    return cast(ModelT, slim)
