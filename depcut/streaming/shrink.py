"""One call from a folder of shards to a smaller one, a tensor at a time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from depcut.allocate.choose import check_budget, criterion_or_default
from depcut.analysis import Analysis
from depcut.apply.report import Report
from depcut.calibration.data import Calibration, Data, calibrate, read_with_inputs
from depcut.calibration.trail import Trail
from depcut.capture.inputs import Inputs
from depcut.errors import InputError
from depcut.integrations.pretrained_folder import model_of
from depcut.options import CheckpointKeywords, Options
from depcut.repair.after_rewrite import wants_repair
from depcut.streaming.criteria import streamable
from depcut.streaming.job import planned, report_of
from depcut.streaming.journal import TRAIL, Journal, digest, journal
from depcut.streaming.progress import Progress
from depcut.streaming.source import Source
from depcut.streaming.structure import structure
from depcut.streaming.weights import check_fits
from depcut.support import files
from depcut.support.checks import check_path
from depcut.support.keywords import settled, takes_options
from depcut.support.torch_private import pytree
from depcut.version import __version__


@takes_options(Options, CheckpointKeywords)
def shrink_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    ratio: float,
    inputs: Inputs = None,
    *,
    data: Data | None = None,
    options: Options | None = None,
    **given: Unpack[CheckpointKeywords],
) -> Report:
    """Make a checkpoint smaller that need not fit in memory.

    The model's structure is found without its weights; these are read, narrowed and written one by
    one, and what was written is then compared by value with the dense checkpoint, operator by
    operator. The smaller folder is one that `from_pretrained` loads. A run that is killed goes on
    where it was, when it is asked for the same again, and ends with the same files.

    Args:
        src: A folder that `save_pretrained` of transformers wrote: safetensors, in one file or in
            shards, and a config. It is only read.
        dst: A new or empty folder, or one that an earlier run of the same request began.
        ratio: Fraction removed of the quantity named by `of`, in (0, 1).
        inputs: Example inputs, see `depcut.analyze`; left out, made as transformers has them.
        data: Calibration data: any iterable of what the model takes. The weights that read what
            goes are re-solved on it, layer by layer, and criteria that need data alone are taken.
            Without data, constants that removed units leave are folded into biases.
        options: What else is chosen, as one object; the keywords that follow go before it.
        **given: The fields of `depcut.Options`.

    Returns:
        What was done; `depcut.report` of the folder's report.json is the same.

    Raises:
        InputError: The folder lacks something or is damaged, its weights are pickled, quantized or
            of other shapes than the config says, `dst` holds something else, or an option has a
            wrong value: a criterion that reads a whole model, too.
        BudgetError: The ratio cannot be reached.
        VerificationError: What was written does not compute what it should.
        DepcutError: The model cannot be captured, or a file not be written.
    """
    chosen = settled(Options, options, given, CheckpointKeywords, "shrink_checkpoint")
    check_budget(ratio, chosen.of, chosen.latency_ms)
    has_data = data is not None
    repairs = wants_repair(chosen.compensate, has_data)
    streamable(criterion_or_default(chosen.score, has_data=has_data), has_data=has_data)
    source = Source(check_path(src, "src"))
    _check_apart(source.folder, check_path(dst, "dst"))
    dense = model_of(source.folder)
    names = check_fits(source, dense)
    items, inputs = read_with_inputs(data, chosen.batches, inputs, dense, False)
    request = {"depcut": __version__, "ratio": ratio, "inputs": _shapes(inputs)}
    # Neither says what is made.
    recorded = replace(chosen, progress=True, memory=None)
    key = digest({**request, **recorded.record(), "data": _values(items)})
    with journal(Path(dst), key, source.fingerprint) as begun:
        if begun.complete:
            return report_of(begun.folder)
        analysis = structure(dense, inputs)
        calibration = _read(items, dense, analysis, chosen, begun)
        job = planned(source, names, analysis, (ratio, recorded), calibration, begun)
        if repairs and calibration is not None:
            job = job.solve(calibration, begun)
        elif chosen.compensate:
            job = job.fold(dense)
        with Progress(chosen.progress) as progress:
            job.write(begun, progress)
            error = job.check(begun, progress)
        return job.close(begun, dense, error)


def _read(
    items: Any, dense: nn.Module, analysis: Analysis, chosen: Options, begun: Journal
) -> Calibration | None:
    """Data bound to the structure of a model; None where there is none."""
    if items is None:
        return None
    program = analysis.program
    bound = calibrate(
        program,
        dense,
        items,
        batches=chosen.batches,
        memory=chosen.memory,
        progress=chosen.progress,
    )
    folder = begun.folder / TRAIL
    files.make_folder(folder, "dst=", InputError)
    trail = Trail(folder) if bound.everyone.size == 1 else None
    return replace(bound, device=torch.device("cpu"), trail=trail)


def _check_apart(src: Path, dst: Path) -> None:
    """Refuse to write into the dense checkpoint, or around it."""
    source, target = src.resolve(), dst.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise InputError(
            "the folder to write is the dense checkpoint's, in it, or around it",
            where="dst=",
            remedy="choose a folder beside it",
        )


def _shapes(inputs: Inputs) -> Any:
    """Example inputs as a request records them: their values do not matter."""
    return [
        [list(leaf.shape), str(leaf.dtype)] if hasattr(leaf, "shape") else leaf
        for leaf in pytree.tree_leaves(inputs)
    ]


def _values(items: Any) -> list[str]:
    """A hash of each item of data."""
    leaves = [leaf for leaf in pytree.tree_leaves(items) if leaf is not None]
    return [digest(leaf.tolist() if hasattr(leaf, "tolist") else leaf) for leaf in leaves]
