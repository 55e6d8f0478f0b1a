"""`depcut shrink` of a checkpoint that exceeds the memory: from shards to shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from depcut.cli.inputs import example_inputs
from depcut.cli.models import hub_folder
from depcut.cli.output import Output
from depcut.cli.written import Written
from depcut.errors import InputError, listed
from depcut.integrations.pretrained_folder import CONFIG
from depcut.options import CheckpointKeywords, Options
from depcut.streaming.shrink import shrink_checkpoint
from depcut.support import files
from depcut.support.keywords import names_of
from depcut.support.memory import check_memory, free_memory

# What only a model that is loaded as a whole can be asked for.
_WHOLE = ("data", "loss", "weights", "part", "outputs", "onnx", "time", "latency_ms", "depth")


def too_large(options: argparse.Namespace, chosen: Options) -> Path | None:
    """The folder of a checkpoint that is larger than the memory; None where the model is loaded.

    Args:
        options: Of the command.
        chosen: The options of pruning.

    Raises:
        InputError: It is larger than `--memory`, and something is asked for that needs all of it.
    """
    folder = hub_folder(options.model)
    if folder is None:
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    limit = check_memory(chosen.memory)
    if size <= (free_memory() if limit is None else limit):
        return None
    asked = [name for name in _WHOLE if vars(options).get(name) or getattr(chosen, name, False)]
    asked += ["rebuildable=false"] if chosen.rebuildable is False else []
    asked += ["of=latency"] if chosen.of == "latency" else []
    if asked and chosen.memory is not None:
        names = listed([f"--{name.replace('_', '-').replace('=', ' ')}" for name in asked])
        raise InputError(
            f"{names} with a checkpoint of {size:,} bytes, larger than --memory",
            where=str(folder),
            remedy="leave these out, or allow the memory to load the model",
        )
    return None if asked else folder


def shrink_streamed(
    folder: Path, options: argparse.Namespace, chosen: Options, output: Output
) -> None:
    """Shrink a checkpoint a tensor at a time, and say what was done.

    Args:
        folder: Of the dense checkpoint.
        options: Of the command.
        chosen: The options of pruning.
        output: Of the command.

    Raises:
        DepcutError: See `depcut.shrink_checkpoint`.
    """
    known = {name: getattr(chosen, name) for name in names_of(Options, CheckpointKeywords)}
    inputs = example_inputs(options.input_shape)
    done = shrink_checkpoint(folder, options.out, options.ratio, inputs, options=Options(**known))
    output.say("report", done)
    (name,) = files.read_json(options.out / CONFIG)["architectures"]
    loading = f"transformers.{name}.from_pretrained({str(options.out)!r})"
    Written(options.out, loading).say(output)
