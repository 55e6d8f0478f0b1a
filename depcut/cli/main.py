"""The `depcut` command: demo, analyze, shrink, compact, export, bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from depcut.allocate.choose import check_budget
from depcut.analysis import analyze
from depcut.apply.plan import Plan
from depcut.apply.report import report
from depcut.calibration.data import inputs_of, read_items
from depcut.capture.inputs import Inputs
from depcut.cli.demo import run_demo
from depcut.cli.loading import (
    build_data,
    build_model,
    example_inputs,
    import_function,
)
from depcut.cli.options import Command, Help, options_of, threads_of
from depcut.dead_units import compaction
from depcut.deploy.export import export
from depcut.errors import DepcutError, InputError
from depcut.support import files
from depcut.support.torch_private import pytree
from depcut.support.weights import load_weights, save_weights
from depcut.timing.backends import Candidate
from depcut.timing.bench import bench, check_timing
from depcut.timing.comparison import compare
from depcut.timing.runtimes import RUNTIMES, check_runtime
from depcut.version import __version__

_EPILOG = """\
MODEL is package.module:factory; the factory is called without arguments and returns the model.
Modules in the current folder are found. Example: torchvision.models:resnet18
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; `sys.argv` when left out.

    Returns:
        The exit code: 0, 2 after a message on standard error, 130 after an interrupt.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DepcutError as error:
        sys.stderr.write(f"depcut {options.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    run_demo(
        options.out,
        ratio=options.ratio,
        epochs=options.epochs,
        retrain_epochs=options.retrain_epochs,
        threads=threads_of(options),
        rounds=options.rounds,
        seed=options.seed,
    )


def _analyze(options: argparse.Namespace) -> None:
    analysis = analyze(_model(options), example_inputs(options.input_shape))
    print(analysis.explain(options.explain) if options.explain else analysis)


def _shrink(options: argparse.Namespace) -> None:
    timing = _timing(options)
    if not options.time:
        idle = [name for name in ("provider", "batch_size", "pin", "memory") if vars(options)[name]]
        if idle:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise InputError(f"{names} without --time", remedy="add --time, or leave them out")
        timing["runtime"] = None
    chosen = options_of(options)
    check_budget(options.ratio, chosen.of, chosen.latency_ms, chosen.depth)
    dense = _model(options)
    inputs: Inputs = example_inputs(options.input_shape)
    data = read_items(build_data(options.data), chosen.batches) if options.data else None
    loss = import_function(options.loss) if options.loss else None
    if data is not None and inputs is None:
        inputs = inputs_of(data[0], dense, loss is not None)
    analysis = analyze(dense, inputs)
    calibration = analysis.calibrate(data, loss=loss, options=chosen)
    plan = analysis.plan(options.ratio, data=calibration, options=chosen)
    slim = plan.apply(dense, data=calibration, options=chosen)
    out = _folder(options.out)
    plan.save(out / "plan.json")
    save_weights(slim, out / "weights.safetensors")
    written = [out / "plan.json", out / "weights.safetensors"]
    if options.onnx:
        written.append(export(slim, out / "model.onnx", inputs).path)
    if "latency" in plan.settings:
        print(
            "latency: {measured_ms:.3g} ms, dense {dense_ms:.3g} ms".format(
                **plan.settings["latency"]
            )
        )
    print(report(slim))
    if options.time:
        dense, slim = _placed(options, [dense, slim])
    print(compare(dense, slim, inputs, batch_size=options.batch_size, **timing))
    print("written:", ", ".join(map(str, written)))


def _compact(options: argparse.Namespace) -> None:
    inputs = example_inputs(options.input_shape)
    dead = compaction(_model(options), inputs)
    print(dead)
    slim = dead.apply()
    out = _folder(options.out)
    dead.plan.save(out / "plan.json")
    save_weights(slim, out / "weights.safetensors")
    written = [out / "plan.json", out / "weights.safetensors"]
    if options.onnx:
        written.append(export(slim, out / "model.onnx", inputs).path)
    print("written:", ", ".join(map(str, written)))


def _export(options: argparse.Namespace) -> None:
    inputs = example_inputs(options.input_shape)
    print(export(_slim(options, _model(options)), options.out, inputs))


def _bench(options: argparse.Namespace) -> None:
    timing = _timing(options)
    inputs = example_inputs(options.input_shape)
    candidates: dict[str, Candidate] = {}
    for target in options.targets:
        is_file = target.endswith(".onnx")
        candidates[target] = target if is_file else build_model(target)
    first = next(iter(candidates.values()))
    if isinstance(first, nn.Module) and options.weights:
        load_weights(first, options.weights)
    if options.plan:
        if not isinstance(first, nn.Module):
            raise InputError(
                f"{first} is a file: no plan applies to it",
                where="--plan",
                remedy="name the model first, as package.module:factory",
            )
        candidates[f"{options.targets[0]} after {options.plan}"] = _slim(options, first)
    candidates = _placed(options, candidates)
    print(bench(candidates, inputs, batch_sizes=options.batch_size, **timing))


def _timing(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `bench` from the options; InputError if this machine lacks the runtime."""
    check_runtime(options.runtime, options.provider)
    sizes = options.batch_size if isinstance(options.batch_size, list) else [options.batch_size]
    check_timing(
        threads_of(options),
        options.rounds,
        0,
        None if options.batch_size is None else sizes,
        options.memory,
    )
    return {
        "runtime": options.runtime,
        "provider": options.provider,
        "threads": threads_of(options),
        "pin": _cpus(options.pin),
        "memory": options.memory,
        "rounds": options.rounds,
    }


def _cpus(text: str | None) -> bool | tuple[int, ...]:
    """The processors that `--pin` names."""
    if text is None or text == "auto":
        return text is not None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise InputError(
            f"cannot read the CPUs {text!r}", where="--pin", remedy='write "auto" or, say, 2,3'
        ) from error


def _placed(options: argparse.Namespace, models: Any) -> Any:
    """The models, moved to the GPU if PyTorch is to time them there."""
    if not RUNTIMES[options.runtime].in_place or options.provider != "cuda":
        return models
    return pytree.tree_map_only(nn.Module, lambda model: model.to("cuda"), models)


def _model(options: argparse.Namespace) -> nn.Module:
    """The dense model with its weights, if some are named."""
    model = build_model(options.model)
    if options.weights:
        load_weights(model, options.weights)
    return model


def _slim(options: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The model after the plan and with the slim weights that the options name, if any."""
    if options.plan:
        model = Plan.load(options.plan).apply(model, example_inputs(options.input_shape))
    elif options.slim_weights:
        raise InputError(
            "--slim-weights without --plan",
            remedy="name the plan that made the model slim, or use --weights",
        )
    if options.slim_weights:
        load_weights(model, options.slim_weights)
    return model


def _folder(path: Path) -> Path:
    """The folder, made if it is not there."""
    files.make_folder(path, "--out")
    return path


def _demo_options(command: Command) -> None:
    command.add("--out", type=Path, metavar="DIR", help="folder for the ONNX files; else a new one")
    command.add("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    command.add("--epochs", type=int, default=12, help="passes over the data before shrinking")
    command.add("--retrain-epochs", type=int, default=4, help="passes after it")
    command.add("--seed", type=int, default=0, help="seed of data split, weights and order")
    command.timing()


def _analyze_options(command: Command) -> None:
    command.model()
    command.add("--explain", metavar="NAME", help="say all about one layer instead")


def _shrink_options(command: Command) -> None:
    command.model()
    budget = command.exclusive()
    budget("--ratio", type=float, help="share to remove, between 0 and 1")
    budget("--latency-ms", type=float, help="milliseconds to come to in onnxruntime on this CPU")
    command.add("--data", metavar="DATA", help="calibration data, as package.module:factory")
    command.add("--loss", metavar="LOSS", help="of (output, target), as package.module:function")
    command.pruning()
    command.add("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    command.add("--onnx", action="store_true", help="write the smaller model as ONNX too")
    command.add("--time", action="store_true", help="time both models, as below")
    command.runtime(several_batches=False)


def _compact_options(command: Command) -> None:
    command.model()
    command.add("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    command.add("--onnx", action="store_true", help="write the smaller model as ONNX too")


def _export_options(command: Command) -> None:
    command.model()
    command.plan()
    command.add("--out", type=Path, required=True, metavar="FILE", help="ONNX file to write")


def _bench_options(command: Command) -> None:
    command.add(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="MODEL or an .onnx file; the first is what the others are compared with",
    )
    command.inputs()
    command.plan()
    command.runtime(several_batches=True)


_COMMANDS: dict[
    str, tuple[Callable[[argparse.Namespace], None], str, Callable[[Command], None]]
] = {
    "demo": (_demo, "train, shrink, export and time a small ResNet on real digits", _demo_options),
    "analyze": (_analyze, "show what can shrink, and why the rest cannot", _analyze_options),
    "shrink": (_shrink, "write a plan and the weights of the smaller model", _shrink_options),
    "compact": (_compact, "remove the units that are dead, and nothing else", _compact_options),
    "export": (_export, "write a model as ONNX, checked in onnxruntime", _export_options),
    "bench": (_bench, "time models or ONNX files in turns", _bench_options),
}


def _parser() -> argparse.ArgumentParser:
    """The parser with its six commands."""
    parser = argparse.ArgumentParser(
        prog="depcut",
        description="Structured pruning of PyTorch models, verified: a smaller dense model out.",
    )
    parser.add_argument("--version", action="version", version=f"depcut {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, text, options) in _COMMANDS.items():
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="" if name == "demo" else _EPILOG,
            formatter_class=Help,
        )
        options(Command(added, run))
    return parser
