"""What can be chosen beside model, ratio and data: defined, documented and checked in one place."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, TypedDict

from depcut.allocate.choose import check_ratio
from depcut.allocate.order import ALLOCATIONS
from depcut.calibration.data import BATCHES
from depcut.errors import InputError, listed
from depcut.plan.cost import COSTS
from depcut.plan.workload import is_whole, settings_of
from depcut.scores import CRITERIA, Criterion, Score, score_name
from depcut.support.checks import (
    LARGEST,
    THREADS,
    check_flag,
    check_integer,
    check_names,
    check_number,
)
from depcut.support.failures import shown
from depcut.support.keywords import option
from depcut.support.memory import check_memory
from depcut.support.toml_files import read_options

QUANTITIES = (*COSTS, "latency")
ONNXRUNTIME = "onnxruntime"  # what runs models unless another runtime is asked for
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What options of pruning and of retraining share."""

    seed: int = option(0, "Seed of everything that draws.")
    resume: bool = option(
        True, "Whether to go on from what the checkpoint folder holds; else it is cleared."
    )
    progress: bool = option(True, "Whether to show progress on standard error.")

    def __post_init__(self) -> None:
        self._integer("seed", 0, LARGEST)
        for name in ("resume", "progress"):
            self._flag(name)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; this is its constructor

    def _integer(
        self, name: str, least: int, most: float = math.inf, *, optional: bool = False
    ) -> None:
        """Make an option a plain integer of a range."""
        value = getattr(self, name)
        if value is not None or not optional:
            self._set(name, check_integer(value, name, least, most))

    def _flag(self, name: str) -> None:
        check_flag(getattr(self, name), name)

    def _one_of(self, name: str, allowed: Iterable[str], what: str = "") -> None:
        value, known = getattr(self, name), list(allowed)
        if not isinstance(value, str) or value not in known:
            named = what and isinstance(value, str)
            raise InputError(
                f"unknown {what} {shown(value)}" if named else f"{name} is {shown(value)}",
                where=f"{name}=",
                remedy=f"use one of {', '.join(known)}",
            )


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What can be chosen for pruning. Immutable; made from keywords, or read from a TOML file.

    `shrink`, `Analysis.plan`, `Plan.apply`, `iterate`, `Gradual` and the command line take these
    as flat keywords, or the object as options=. `help(depcut.shrink)` lists what each means.

    Raises:
        InputError: A value is of the wrong type or out of its range.
    """

    of: str = option(
        "macs",
        'What is budgeted: "macs", "params", "channels" (every layer loses that share of them) or '
        '"latency" (measured in `runtime` on the CPU of this machine, on the inputs as given).',
    )
    latency_ms: float | None = option(None, "In place of a ratio: milliseconds to come to.")
    score: str | Score | Criterion | None = option(
        None,
        "A criterion by name (see `depcut.scores`), as `depcut.Score` with options, or as a "
        'function of (coupling, model, seed); left out, "obs" with data, given or made, and '
        '"magnitude" without.',
    )
    batches: int = option(BATCHES, "How many items of the data to read at most.")
    compensate: bool | str = option(
        "auto",
        "Whether to re-solve the weights that read what was removed, so that every layer's outputs "
        'come close to the dense ones on the data; "auto": if there is data, and else fold removed '
        "units that are constant into biases, exactly, and the means of others, where batch norms "
        "know them, into biases and running statistics.",
    )
    memory: str | int | None = option(
        None,
        "What passes over the data may hold of it in memory, beside one stretch of the model: an "
        'amount such as "4GiB", or bytes; the rest goes to temporary files. Left out, half of what '
        "is free.",
    )
    allocation: str | None = option(
        None,
        '"uniform" (same share everywhere) or "global" (least loss per cost first; of scores that '
        'only rank, what many layers read, as the residual stream, goes last); left out, "global".',
    )
    align: int | str = option(
        8,
        "Kept widths are multiples of it where the width allows; 1: any width; "
        '"auto": what the kernels of `runtime` work in.',
    )
    ignore: tuple[str, ...] = option(
        (), "Globs over module or parameter names whose width must stay."
    )
    ratios: Mapping[str, float] | None = option(
        None, "Fraction of units removed, by glob, for groups that the budget does not decide."
    )
    runtime: str = option(
        ONNXRUNTIME,
        'What runs the model where time is measured, see `depcut.bench`: "onnxruntime", '
        '"openvino", "torch" or "torch.compile".',
    )
    threads: int = option(1, "Threads that one operator may use, where time is measured.")
    workload: Mapping[str, Any] | None = option(
        None,
        "The calls whose summed time is budgeted, by name, in place of one of the inputs as given: "
        "batch_size, threads, inputs, module and times (how often it is made) of each, see "
        "`depcut.plan.workload.Setting`.",
    )
    depth: bool = option(
        False,
        "Whether residual branches may be dropped as a whole, beside narrowing the rest; where the "
        "class is built from a config (`rebuildable`), whole layers of them.",
    )
    generated: str = option(
        "allowed",
        "Whether modules may be generated from the captured graph where neither a class's "
        'attributes nor a patch of its source gives the new widths: "allowed", or "never", which '
        "keeps the groups concerned whole and says which.",
    )
    rebuildable: bool | str = option(
        "auto",
        "Whether the smaller model is to be what its class builds from a config alone, so that it "
        "is saved and loaded without depcut: widths that the config says once are cut alike in all "
        "layers, with depth=True whole layers go, what it cannot say is not cut; "
        '"auto": of models whose class is built from a config (transformers); False: every width '
        "is cut for itself.",
    )
    optimizer_state: str = option(
        "slice",
        'What becomes of the optimizer\'s state at each step: "slice" it along, or "reset" it.',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("of", QUANTITIES, "quantity")
        self._check_latency()
        self._check_score()
        self._integer("batches", 1, sys.maxsize)
        self._check_align()
        self._check_runtime()
        self._check_workload()
        self._integer("threads", 1, THREADS)
        self._flag("depth")
        self._set("memory", check_memory(self.memory))
        chosen: Any = self.compensate
        if not isinstance(chosen, bool) and not (isinstance(chosen, str) and chosen == "auto"):
            raise InputError(
                f"compensate is {shown(chosen)}",
                where="compensate=",
                remedy='use "auto" (if there is data), True or False',
            )
        if not isinstance(self.rebuildable, bool):
            self._one_of("rebuildable", ("auto",))
        if self.allocation is not None:
            self._one_of("allocation", ALLOCATIONS, "allocation")
        self._one_of("optimizer_state", ("slice", "reset"))
        self._one_of("generated", ("allowed", "never"))
        self._check_ignore()
        self._check_ratios()

    def _check_latency(self) -> None:
        if self.latency_ms is not None:
            remedy = "pass milliseconds, more than 0"
            self._set("latency_ms", check_number(self.latency_ms, "latency_ms", remedy, above=0))

    def _check_align(self) -> None:
        if not isinstance(self.align, str) or self.align != AUTO:
            remedy = 'pass an integer of at least 1, or "auto"'
            self._set("align", check_integer(self.align, "align", 1, LARGEST, remedy=remedy))

    def _check_runtime(self) -> None:
        if not isinstance(self.runtime, str):
            raise InputError(
                f"runtime is {shown(self.runtime)}",
                where="runtime=",
                remedy='pass the name of one, such as "onnxruntime"',
            )

    def _check_workload(self) -> None:
        if self.workload is None:
            return
        self._set("workload", settings_of(self.workload))
        if self.of != "latency" and self.latency_ms is None:
            raise InputError(
                f"a workload, and a budget of {self.of}",
                where="workload=",
                remedy='pass of="latency" or latency_ms=, or leave the workload out',
            )

    def _check_score(self) -> None:
        given: Any = self.score
        if isinstance(given, Mapping):
            try:
                self._set("score", Score(**given))
            except TypeError as error:
                raise InputError(
                    f"score is {shown(given)}",
                    where="score=",
                    remedy='write, say, {name = "taylor", aggregate = "max"}',
                ) from error
        if self.score is not None and not (
            isinstance(self.score, str | Score) or callable(self.score)
        ):
            raise InputError(
                f"score is a {type(self.score).__name__}",
                where="score=",
                remedy="pass the name of a criterion, a depcut.Score or a function",
            )

    def _check_ignore(self) -> None:
        """Globs as a tuple; what can be read only once is read here."""
        remedy = 'pass globs over module or parameter names, such as ("head*",)'
        self._set("ignore", check_names(self.ignore, "ignore", remedy))

    def _check_ratios(self) -> None:
        given: Any = self.ratios
        if given is None:
            return
        if not isinstance(given, Mapping) or not all(isinstance(glob, str) for glob in given):
            raise InputError(
                f"ratios is {shown(given)}",
                where="ratios=",
                remedy='pass a fraction to remove by glob, such as {"layer3*": 0.3}',
            )
        for glob, ratio in given.items():
            if isinstance(ratio, bool) or not isinstance(ratio, Real) or ratio != 0:
                check_ratio(ratio, f"ratios[{glob!r}]")
        self._set("ratios", {glob: float(ratio) for glob, ratio in given.items()})

    @property
    def reading(self) -> dict[str, Any]:
        """What reading data, or making it, takes of the options."""
        names = ("batches", "memory", "progress", "seed")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def of_record(saved: Mapping[str, Any]) -> Options:
        """Options from what `record` gave, less functions and tensors (`score`, `workload`).

        Args:
            saved: Names and values.
        """
        unknown = [name for name in saved if name not in {f.name for f in fields(Options)}]
        if unknown:
            raise InputError(
                f"unknown options: {listed(unknown)}",
                where="the record of a plan",
                remedy="make the plan anew, or use the depcut that wrote it",
            )
        score = saved.get("score")
        lost = {"score"} if isinstance(score, str) and score not in CRITERIA else set()
        lost |= set() if is_whole(saved.get("workload") or {}) else {"workload"}
        return Options(**{n: v for n, v in saved.items() if n not in lost})

    def record(self) -> dict[str, Any]:
        """What is not the default, as JSON; a criterion that is a function by its name alone."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default:
                continue
            if isinstance(value, Score):
                value = {k: v for k, v in asdict(value).items() if v is not None}
            elif callable(value):
                value = score_name(value)
            elif f.name == "workload":
                value = {name: setting.record() for name, setting in value.items()}
            out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @staticmethod
    def read(path: str | Path) -> Options:
        """Options from a TOML file: one `name = value` a line, `[ratios]` as a table.

        Args:
            path: The file.

        Raises:
            InputError: It cannot be read, names an unknown option, or a value is wrong.
        """
        values = read_options(path)
        known = [f.name for f in fields(Options)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InputError(
                f"unknown options: {', '.join(unknown)}",
                where=str(path),
                remedy=f"there are {', '.join(known)}",
            )
        return Options(**values)


class _Reading(TypedDict, total=False):
    batches: int
    memory: str | int | None
    progress: bool


class CalibrateKeywords(_Reading, total=False):
    """Flat keywords of `Analysis.calibrate`."""


class ApplyKeywords(_Reading, total=False):
    """Flat keywords of `Plan.apply`."""

    compensate: bool | str


class GradualKeywords(_Reading, total=False):
    """Flat keywords of `Gradual`."""

    of: str
    score: str | Score | Criterion | None
    allocation: str | None
    align: int | str
    ignore: Iterable[str]
    seed: int


class IterateKeywords(GradualKeywords, total=False):
    """Flat keywords of `iterate`."""

    compensate: bool | str
    optimizer_state: str
    resume: bool


class FrontierKeywords(GradualKeywords, total=False):
    """Flat keywords of `Analysis.frontier`."""

    runtime: str
    threads: int
    depth: bool
    generated: str
    rebuildable: bool | str


class PlanKeywords(FrontierKeywords, total=False):
    """Flat keywords of `Analysis.plan`."""

    latency_ms: float | None
    workload: Mapping[str, Any] | None
    ratios: Mapping[str, float] | None


class ShrinkKeywords(PlanKeywords, total=False):
    """Flat keywords of `shrink`."""

    compensate: bool | str


class CheckpointKeywords(_Reading, total=False):
    """Flat keywords of `shrink_checkpoint`."""

    of: str
    score: str | Score | Criterion | None
    allocation: str | None
    align: int | str
    ignore: Iterable[str]
    ratios: Mapping[str, float] | None
    seed: int
    compensate: bool | str
