"""One checkpoint on its way: planned, written shard by shard, checked, and closed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from depcut.allocate.choose import criterion_or_default
from depcut.analysis import Analysis
from depcut.apply.carried import carry
from depcut.apply.plan import Plan
from depcut.apply.report import Report, record, report, report_of_record
from depcut.calibration.data import Calibration
from depcut.capture.program import Program
from depcut.errors import InputError, VerificationError, listed
from depcut.integrations.pretrained_folder import INDEX, Shards, write_config
from depcut.options import Options
from depcut.plan.keep import Keep
from depcut.rebuild.rebuilding import recorded
from depcut.rebuild.recipe import recipe_of
from depcut.rebuild.same_graph import Pairs, captured_of, paired
from depcut.rebuild.stock import prove
from depcut.rewrite.build import Slim
from depcut.storage import folder as folders
from depcut.storage.companions import carry_over
from depcut.storage.save import write_pretrained_card, write_record
from depcut.streaming.check import check_written
from depcut.streaming.criteria import streamed
from depcut.streaming.folding import Folded, folded
from depcut.streaming.journal import PLAN, Journal
from depcut.streaming.narrowing import Picked, parts, picks, stored
from depcut.streaming.progress import Progress
from depcut.streaming.solving import Solution, solution
from depcut.streaming.source import Source
from depcut.streaming.structure import on_cpu
from depcut.streaming.weights import Weights
from depcut.support import files
from depcut.support.weights import Stored, write_part_by_part


@dataclass(frozen=True, eq=False)
class Built:
    """The class as the new config builds it.

    Attributes:
        model: It; its weights are on the meta device.
        program: Its graph.
        pairs: The nodes of that by those of the dense graph.
    """

    model: nn.Module
    program: Program
    pairs: Pairs


@dataclass(frozen=True, eq=False)
class Job:
    """What is written of one checkpoint.

    Attributes:
        source: The dense checkpoint.
        names: Of its tensors that are written.
        analysis: The structure of its model.
        plan: What stays.
        keep: The same, evaluated.
        slim: The smaller model, without the values of its weights.
        built: The class as the new config builds it.
        picked: Kept indices by tensor, of those that narrow.
        solved: What data changed, if there is any.
        folded: What took over constants of removed units, if there is no data.
    """

    source: Source
    names: tuple[str, ...]
    analysis: Analysis
    plan: Plan
    keep: Keep
    slim: Slim
    built: Built
    picked: Mapping[str, Picked]
    solved: Solution | None = None
    folded: Folded | None = None

    @property
    def shards(self) -> dict[str, dict[str, Stored]]:
        """What each file is to hold, by its name: as the dense checkpoint is divided."""
        out: dict[str, dict[str, Stored]] = {}
        for name in self.names:
            file = self.source.entries[name].file
            out.setdefault(file, {})[name] = stored(self.source, name, self.picked.get(name))
        return out

    def solve(self, calibration: Calibration, begun: Journal) -> Job:
        """The same with the weights that read what goes re-solved.

        Args:
            calibration: Batches to reproduce the dense outputs on.
            begun: What is written.

        Raises:
            InputError: A file cannot be written.
        """
        weights = Weights(self.source, self.analysis.model)
        return replace(self, solved=solution(self.keep, weights, calibration, begun))

    def fold(self, dense: nn.Module) -> Job:
        """The same with the constants that removed units leave in biases.

        Args:
            dense: The dense model, on the meta device.
        """
        weights = Weights(self.source, self.analysis.model)
        return replace(self, folded=folded(self.keep, dense, weights))

    def _parts(self, name: str) -> Iterator[Tensor]:
        """What is written of a tensor, part by part."""
        if self.folded is not None and name in self.folded.tensors:
            yield self.folded.tensors[name]
            return
        if self.solved is not None:
            tensors = self.solved.tensors
            same = (name, *self.keep.coupling.program.aliases.get(name, ()))
            changed = next((other for other in same if other in tensors.changed), None)
            if changed is not None:
                yield tensors.stored(changed)
                return
        yield from parts(self.source, self.picked, name)

    def write(self, begun: Journal, progress: Progress) -> None:
        """Write the shards that are not written yet, each under a temporary name at first.

        Args:
            begun: What is written.
            progress: Shows how far it is.

        Raises:
            InputError: A shard cannot be read or written.
        """
        shards, done = self.shards, 0
        total = sum(t.bytes for layout in shards.values() for t in layout.values())
        for file, layout in shards.items():
            if not begun.finished(file):
                path = begun.folder / file
                sha256 = write_part_by_part(layout, self._parts, path, f"shard {file}", InputError)
                begun.finish(file, {"bytes": path.stat().st_size, "sha256": sha256})
            done += sum(t.bytes for t in layout.values())
            progress.show("writing", done, total)

    def check(self, begun: Journal, progress: Progress) -> float:
        """Compare what was written with the dense checkpoint, by value.

        Args:
            begun: What is written.
            progress: Shows how far it is.

        Returns:
            The largest difference, relative to the scale.

        Raises:
            VerificationError: They differ.
        """
        shards = Shards({name: frozenset(layout) for name, layout in self.shards.items()})
        after = Weights(Source(begun.folder, shards), self.built.model)
        before = Weights(self.source, self.analysis.model)
        shown = partial(progress.show, "checking")
        built = self.built.program, self.built.pairs
        changed = self.solved.tensors if self.solved is not None else None
        return check_written(self.keep, built, (before, after), shown, changed, self.folded)

    def close(self, begun: Journal, dense: nn.Module, error: float) -> Report:
        """Write what makes the shards a checkpoint: index, records, and the config at last.

        Args:
            begun: What is written.
            dense: The dense model.
            error: The largest difference that the check saw.

        Raises:
            DepcutError: A file cannot be written.
        """
        model = self.slim.model
        solved = self.solved.done if self.solved is not None else None
        unknown = [name for name in self.source if name not in self.names]
        notes = [f"tensors that the class does not have were left out: {listed(unknown, 3)}"]
        done = self.plan.report_on(
            self.slim, self.analysis.model, error, solved, tuple(notes if unknown else ())
        )
        record(model, done)
        carry(model, self.plan)
        write_record(model, begun.folder)
        carry_over(self.source.folder, begun.folder)
        if self.source.shards.metadata is not None:
            _write_index(begun.folder, self.shards, self.source.shards.metadata)
        write_config(model, dense, begun.folder)
        write_pretrained_card(model, type(dense), begun.folder)
        begun.close()
        return report(model)


def _write_index(
    folder: Path, shards: Mapping[str, Mapping[str, Stored]], metadata: Mapping[str, Any]
) -> None:
    tensors = {name: t for layout in shards.values() for name, t in layout.items()}
    sizes = {
        "total_size": sum(t.bytes for t in tensors.values()),
        "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
    }
    said = {**metadata, **{n: v for n, v in sizes.items() if n in metadata}}
    said.setdefault("total_size", sizes["total_size"])
    where = {name: file for file, layout in shards.items() for name in layout}
    index = {"metadata": said, "weight_map": dict(sorted(where.items()))}
    files.write_json(folder / INDEX, index, "index", indent=2)


def planned(
    source: Source,
    names: tuple[str, ...],
    analysis: Analysis,
    request: tuple[float, Options],
    calibration: Calibration | None,
    begun: Journal,
) -> Job:
    """Choose what stays of a checkpoint, and find out what its config becomes.

    Args:
        source: The dense checkpoint.
        names: Of its tensors that are written.
        analysis: The structure of its model.
        request: Fraction removed, and what else is chosen.
        calibration: Data, for criteria that need it.
        begun: What is written; the plan is, from here on.

    Raises:
        InputError: An option has a wrong value.
        BudgetError: The ratio cannot be reached.
        VerificationError: The class cannot be built with the new widths.
    """
    model, path = analysis.model, begun.folder / PLAN
    if begun.finished(PLAN):
        plan = replace(Plan.load(path), coupling=analysis.coupling, model=model)
    else:
        plan = _chosen(source, analysis, *request, calibration)
        plan.save(path)
        begun.finish(PLAN, folders.entry(path))
    keep = plan.keep()
    slim = recorded(plan.settings, model, keep)
    if slim is None:
        raise InputError(
            "nothing was removed that the config can say",
            where=str(source.folder),
            remedy="ask for a larger ratio",
        )
    prove(slim.model, keep)
    job = Job(source, names, analysis, plan, keep, slim, _built(slim, keep), picks(keep, names))
    _check_shapes(job)
    return job


def _chosen(
    source: Source,
    analysis: Analysis,
    ratio: float,
    chosen: Options,
    calibration: Calibration | None,
) -> Plan:
    """The plan for a checkpoint."""
    rebuilding, why = analysis.rebuilding
    if rebuilding is None:
        raise InputError(
            f"the model cannot be rebuilt from its config: {why}",
            where=str(source.folder),
            remedy="use depcut.shrink of the loaded model, which cuts widths freely",
        )
    criterion = criterion_or_default(chosen.score, has_data=calibration is not None)
    reading = streamed(criterion, Weights(source, analysis.model), calibration)
    plan = analysis.plan(ratio, options=replace(chosen, score=reading, rebuildable=True))
    read = {"examples": calibration.rows} if calibration is not None else {}
    return replace(plan, settings={**plan.settings, **read, "options": chosen.record()})


def _built(slim: Slim, keep: Keep) -> Built:
    """The class as the new config builds it, which computes what it should."""
    recipe = recipe_of(slim.model)
    assert recipe is not None
    model = recipe.build({}).eval()
    program = on_cpu(captured_of(keep.coupling.program, model))
    pairs, why = paired(keep, program)
    if why is not None:
        raise VerificationError(
            f"the class that is built from the new config computes otherwise: {why}",
            where=type(model).__name__,
            remedy="ask for another ratio, or use depcut.shrink of the loaded model",
        )
    return Built(model, program, pairs)


def _check_shapes(job: Job) -> None:
    """Check that the new config builds the tensors that are to be written."""
    state = job.built.model.state_dict(keep_vars=True)
    for layout in job.shards.values():
        for name, tensor in layout.items():
            built = tuple(state[name].shape) if name in state else None
            if built != tensor.shape:
                raise VerificationError(
                    f"the new config builds {built}, and {tensor.shape} stays",
                    where=name,
                    remedy="use depcut.shrink of the loaded model; please report it",
                )


def report_of(folder: Path) -> Report:
    """The report in a folder that is complete.

    Args:
        folder: It.
    """
    return report_of_record(files.read_json(folder / folders.REPORT))
