"""`depcut demo`: train, shrink, retrain, export and time a small ResNet on real digits."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.nn import functional

from depcut.allocate.choose import check_ratio
from depcut.api import shrink
from depcut.cli.demo_net import DigitNet
from depcut.cli.digits import Digits, accuracy, load_digits
from depcut.cli.options import Command, Subcommand
from depcut.cli.output import Output
from depcut.deploy.export import ExportReport, export
from depcut.errors import InputError
from depcut.plan.cost import count_macs, count_params
from depcut.support import files
from depcut.support.checks import LARGEST, check_integer
from depcut.support.quantities import quantity
from depcut.timing.bench import bench, check_timing
from depcut.timing.measurements import BenchResult

_BATCH = 64
_REPAIR_BATCHES = 4  # more take longer, and change nothing here
_MOST_EPOCHS = 10_000
_RETRAIN_RATE = 0.02
_TRAIN_RATE = 0.1


@dataclass(frozen=True)
class DemoModel:
    """Test accuracy in [0, 1], parameters, MACs of one image and ONNX file of one model."""

    accuracy: float
    params: int
    macs: int
    file: ExportReport


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        dense: The trained model.
        slim: The model after shrinking and retraining.
        cut_accuracy: Accuracy of a model that was shrunk by its weights alone, and not retrained.
        made_accuracy: The same, ranked and repaired on inputs made from the dense model itself.
        repaired_accuracy: Accuracy of the slim model before it was retrained: units were ranked,
            and weights re-solved, on training images without their labels.
        timing: Both in onnxruntime, one image at a time.
    """

    dense: DemoModel
    slim: DemoModel
    cut_accuracy: float
    made_accuracy: float
    repaired_accuracy: float
    timing: BenchResult

    def __rich__(self) -> Table:
        table = Table(title="a ResNet on digits: dense and slim")
        for column in ("", "dense", "slim", "slim / dense"):
            table.add_column(column, justify="right" if column else "left")
        dense, slim = self.dense, self.slim
        gained = 100 * (slim.accuracy - dense.accuracy)
        table.add_row(
            "test accuracy",
            f"{dense.accuracy:.2%}",
            f"{slim.accuracy:.2%}",
            f"{gained:+.2f} points",
        )
        for label, share in (
            ("- not retrained", self.repaired_accuracy),
            ("- nor given data: on inputs made from the model", self.made_accuracy),
            ("- nor repaired at all", self.cut_accuracy),
        ):
            table.add_row(
                label, "", f"{share:.2%}", f"{100 * (share - dense.accuracy):+.2f} points"
            )
        for label, full, less in (
            ("parameters", dense.params, slim.params),
            ("MACs per image", dense.macs, slim.macs),
            ("file, bytes", dense.file.bytes, slim.file.bytes),
        ):
            table.add_row(label, quantity(full), quantity(less), f"{less / full:.1%}")
        times = self.timing.timings
        speedup = self.timing.speedup("dense", "slim")
        before, after = (f"{1e3 * times[name].median:.3g} ms" for name in ("dense", "slim"))
        table.add_row("latency", before, after, str(speedup))
        table.caption = self.timing.conditions
        return table


def run_demo(
    out: Path | None = None,
    *,
    ratio: float = 0.5,
    epochs: int = 12,
    retrain_epochs: int = 4,
    widths: tuple[int, ...] = (64, 128, 256),
    threads: int = 1,
    rounds: int = 30,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Train a ResNet on scikit-learn's digits, shrink it, retrain it, and compare the two.

    It is shrunk twice: by its weights alone, and on a few batches of training images. The second is
    what is retrained, exported and timed.

    Args:
        out: Folder for dense.onnx and slim.onnx; a fresh temporary one when left out.
        ratio: Share of the MACs to remove.
        epochs: Passes over the training images for the dense model.
        retrain_epochs: Passes for the slim one.
        widths: Channels of the net's stages.
        threads: Threads for timing.
        rounds: Turns that both models have when they are timed.
        seed: Seed of the split, of the weights and of the order of the images.
        console: Where to print; standard output when left out.

    Returns:
        The results, which have been printed too.

    Raises:
        DepcutError: scikit-learn is missing, or a step failed.
        InputError: An argument is out of its range; nothing has been done then.
    """
    check_ratio(ratio, "ratio=")
    check_timing(threads, rounds, 0, None, memory=False)
    for name, value in (("epochs", epochs), ("retrain_epochs", retrain_epochs)):
        check_integer(value, name, 0, _MOST_EPOCHS)
    seed = check_integer(seed, "seed", 0, LARGEST)
    console = console or Console()
    digits = load_digits(seed)
    folder = Path(tempfile.mkdtemp(prefix="depcut-demo-")) if out is None else out
    files.make_folder(folder, "out=", InputError)
    image = digits.test_images[:1]
    with torch.random.fork_rng(devices=[]), _progress(console) as progress:
        torch.manual_seed(seed)
        dense = DigitNet(widths)
        _train(dense, digits, epochs, _TRAIN_RATE, _ticker(progress, "train", epochs, digits))
        step = progress.add_task("shrink", total=3)
        cut_accuracy = accuracy(shrink(dense, ratio, image, data=None), digits)
        progress.advance(step)
        made = shrink(dense, ratio, image, progress=False)
        made_accuracy = accuracy(made, digits)
        progress.advance(step)
        images = digits.train_images[: _REPAIR_BATCHES * _BATCH].split(_BATCH)
        slim = shrink(dense, ratio, data=images, progress=False)
        repaired_accuracy = accuracy(slim, digits)
        progress.advance(step)
        tick = _ticker(progress, "retrain slim", retrain_epochs, digits)
        _train(slim, digits, retrain_epochs, _RETRAIN_RATE, tick)
        step = progress.add_task("export and time", total=3)
        models = {}
        for name, model in (("dense", dense), ("slim", slim)):
            file = export(model, folder / f"{name}.onnx", image)
            models[name] = DemoModel(
                accuracy(model, digits), count_params(model), count_macs(model, image), file
            )
            progress.advance(step)
        written = {name: model.file.path for name, model in models.items()}
        timing = bench(written, image, threads=threads, rounds=rounds)
        progress.advance(step)
    accuracies = cut_accuracy, made_accuracy, repaired_accuracy
    result = DemoResult(models["dense"], models["slim"], *accuracies, timing)
    console.print(result)
    console.print(f"written: {written['dense']} and {written['slim']}", soft_wrap=True)
    return result


def _train(
    model: nn.Module, digits: Digits, epochs: int, peak_rate: float, tick: Callable[[], None]
) -> None:
    """Train with momentum on a one-cycle schedule; the model is in evaluation mode afterwards."""
    steps = epochs * _batches(digits)
    if steps == 0:
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=peak_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels))
        for batch in order.split(_BATCH):
            scores = model(digits.train_images[batch])
            loss = functional.cross_entropy(scores, digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            tick()
    model.eval()


def _batches(digits: Digits) -> int:
    """Batches in one epoch."""
    return -(-len(digits.train_labels) // _BATCH)


def _ticker(progress: Progress, label: str, epochs: int, digits: Digits) -> Callable[[], None]:
    """A function to call after every batch."""
    task = progress.add_task(label, total=epochs * _batches(digits))
    return lambda: progress.advance(task)


def _progress(console: Console) -> Progress:
    """The demo's progress bars."""
    return Progress(
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _declare(command: Command) -> None:
    command.add("--out", type=Path, metavar="DIR", help="folder for the ONNX files; else a new one")
    command.add("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    command.add("--epochs", type=int, default=12, help="passes over the data before shrinking")
    command.add("--retrain-epochs", type=int, default=4, help="passes after it")
    command.add("--seed", type=int, default=0, help="seed of data split, weights and order")
    command.timing()


def _run(options: argparse.Namespace, output: Output) -> None:
    result = run_demo(
        options.out,
        ratio=options.ratio,
        epochs=options.epochs,
        retrain_epochs=options.retrain_epochs,
        threads=options.threads,
        rounds=options.rounds,
        seed=options.seed,
        console=Console(stderr=output.as_json),
    )
    output.entry("demo", result)


DEMO = Subcommand(
    "demo", "train, shrink, export and time a small ResNet on real digits", _declare, _run
)
