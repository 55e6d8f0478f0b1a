"""Jobs of the study that prune without training: every criterion, and Torch-Pruning's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from accuracy_tasks import Task
from measure import Row
from torch import nn

import depcut
from depcut.scores import CRITERIA

if TYPE_CHECKING:
    import accuracy_peer as peer

REMOVED = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
BATCHES, BATCH_SIZE = 8, 32  # calibration, for every method that reads data
SAME = ("l2",)  # another name of magnitude
DEFAULT = "obs"  # the criterion of depcut.shrink where there is data


@dataclass(frozen=True)
class Job:
    """What is measured at once, and remembered as done at once.

    Attributes:
        part: What it belongs to.
        method: What is done.
        run: Yields its rows, each with what it adds to part and method.
    """

    part: str
    method: str
    run: Callable[[], Iterator[Row]]


class Subject:
    """One trained model and what all jobs share: its analysis and its calibration."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed
        self.model, self.inputs = task.trained(seed), task.example()
        self.metric = task.metric(self.model)
        self.pairs = task.calibration(seed, BATCHES, BATCH_SIZE)
        self.macs = total_macs(self.model, self.inputs)
        self.params = measure.params_of(self.model)

    @cached_property
    def analysis(self) -> depcut.Analysis:
        return depcut.analyze(self.model, self.inputs)

    @cached_property
    def calibration(self) -> depcut.Calibration:
        return self.analysis.calibrate(
            self.pairs, loss=self.task.loss, batches=BATCHES, progress=False
        )

    @cached_property
    def gradients(self) -> peer.Gradients:
        import accuracy_peer as peer

        return peer.gradients(self.task, self.model, self.pairs)

    def judged(self, model: nn.Module) -> Row:
        """What is left of the metric, and what is lost: positive is worse."""
        metric = self.task.metric(model)
        lost = self.metric - metric if self.task.higher_is_better else metric - self.metric
        return {"metric": round(metric, 5), "dense": round(self.metric, 5), "lost": round(lost, 5)}

    def sized(self, model: nn.Module) -> Row:
        """Shares of the dense model's MACs and parameters."""
        macs = total_macs(model, self.inputs) / self.macs
        return {
            "macs": round(macs, 5),
            "params": round(measure.params_of(model) / self.params, 5),
        }


def total_macs(model: nn.Module, inputs: Any) -> float:
    return sum(measure.counted_macs(model, (inputs,)).values())


def criteria(subject: Subject) -> Iterator[Job]:
    """Every criterion, units scored once for all ratios, with and without compensation."""
    for name in CRITERIA:
        if name not in SAME:
            yield Job("criteria", name, partial(_of_criterion, subject, name))


def _of_criterion(subject: Subject, name: str) -> Iterator[Row]:
    start = time.perf_counter()
    try:
        frontier = subject.analysis.frontier(
            REMOVED,
            data=subject.calibration,
            score=name,
            align=1,
            seed=subject.seed,
            progress=False,
        )
    except depcut.DepcutError as error:
        yield {"error": measure.first_line(error)}
        return
    scored = (time.perf_counter() - start) / len(REMOVED)
    for removed, reason in frontier.unreached.items():
        yield {"removed": removed, "error": reason}
    for row in frontier:
        for compensated in (False, True):
            start = time.perf_counter()
            if compensated:
                slim = row.apply(subject.model, data=subject.calibration, progress=False)
                facts = {**subject.judged(slim), **subject.sized(slim)}
            else:
                facts = _uncompensated(subject, row.plan)
            seconds = round(scored + time.perf_counter() - start, 2)
            yield {"removed": row.ratio, "compensated": compensated, **facts, "seconds": seconds}


def _uncompensated(subject: Subject, plan: depcut.Plan) -> Row:
    """The plan judged by masks, or by a smaller model where no zeros express it."""
    try:
        with plan.masked(subject.model) as model:
            facts = subject.judged(model)
    except depcut.PlanError:
        slim = plan.apply(subject.model, compensate=False, progress=False)
        return {**subject.judged(slim), **subject.sized(slim), "masked": False}
    macs, params = plan.macs / subject.analysis.macs, plan.params / subject.params
    return {**facts, "macs": round(macs, 5), "params": round(params, 5), "masked": True}


def rivals(subject: Subject) -> Iterator[Job]:
    """Torch-Pruning: every criterion and ranking, heads by their dimensions."""
    if subject.task.name == "mlp_table":
        return  # its example would be taken for a picture
    import accuracy_peer as peer  # whose library tests do without

    for variant in peer.variants(subject.model):
        if not variant.heads:
            yield Job("rivals", variant.name, partial(_of_peer, subject, variant))


def _of_peer(subject: Subject, variant: peer.Variant) -> Iterator[Row]:
    import accuracy_peer as peer

    for removed in REMOVED:
        start = time.perf_counter()
        try:
            _, slim = peer.pruned(
                subject.task,
                subject.model,
                subject.gradients,
                variant,
                1 - removed,
                seed=subject.seed,
            )
        except RuntimeError as error:
            reason = measure.first_line(error).removeprefix("RuntimeError: ")
            yield {"removed": removed, "error": reason}
            continue
        seconds = round(time.perf_counter() - start, 2)
        facts = {**subject.judged(slim), **subject.sized(slim), "seconds": seconds}
        yield {"removed": removed, "compensated": False, **facts}


def times(subject: Subject) -> Iterator[Job]:
    """What the default's models take in onnxruntime: milliseconds, beside the dense one."""
    if subject.seed == 0:
        yield Job("times", "default", partial(_timed, subject))


def _timed(subject: Subject) -> Iterator[Row]:
    one = subject.inputs[:1]
    with tempfile.TemporaryDirectory(prefix="depcut-") as folder:
        files: dict[str, Any] = {}
        for removed in (0.0, *REMOVED):
            model = subject.model
            if removed:
                plan = subject.analysis.plan(removed, data=subject.calibration)
                model = plan.apply(model, data=subject.calibration, progress=False)
            path = Path(folder) / f"{removed}.onnx"
            depcut.export(model, path, one)
            files[str(removed)] = path
        result = depcut.bench(files, one, rounds=30)
        dense = result.timings["0.0"].median
        for removed in REMOVED:
            key = str(removed)
            yield {
                "removed": removed,
                "ms": round(1e3 * result.timings[key].median, 4),
                "dense_ms": round(1e3 * dense, 4),
                "speedup": round(result.speedup("0.0", key).ratio, 3),
                "bytes": files[key].stat().st_size,
                "dense_bytes": files["0.0"].stat().st_size,
            }
