"""What do gradual masks cost a training step?

A model and its masked twin train in turns on the same batches, one thread, AdamW; masks remove 30 %
of the MACs. The numbers are medians of seconds, and of the paired ratio, of a step
between two choices of masks; a choice is timed by itself, and spread over the steps between two.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import measure
import torch
import zoo
from measure import Row
from torch import Tensor, nn

import depcut

LIMIT = 1.10
MEMBERS: dict[str, tuple[tuple[int, ...], int]] = {
    "tv/resnet18": ((3, 64, 64), 16),
    "tv/mobilenet_v2": ((3, 64, 64), 16),
    "timm/deit_tiny_patch16_224": ((3, 224, 224), 4),
    "hf/bert": ((32,), 16),
}
COLUMNS = {
    "name": lambda r: r["name"],
    "batch": lambda r: str(r["batch"]),
    "parameters": lambda r: f"{r['parameters'] / 1e6:.1f} M",
    "MACs masked": lambda r: f"{r['masked']:.0%}",
    "step ms": lambda r: f"{1e3 * r['dense_s']:.1f}",
    "with masks ms": lambda r: f"{1e3 * r['masked_s']:.1f}",
    "paired ratio": lambda r: f"{r['ratio']:.3f}",
    "one choice ms": lambda r: f"{1e3 * r['choice_s']:.1f}",
    "ratio, choice every 100 steps": lambda r: f"{r['amortized']:.3f}",
}


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    zoo.libraries()
    console = measure.console()
    rows = [row(name, options.rounds) for name in options.names or MEMBERS]
    console.print(measure.table("Gradual masks beside plain training", COLUMNS, rows))
    worst = {
        key: max((r[key] for r in rows if key in r), default=None) for key in ("ratio", "amortized")
    }
    for path in measure.write("gradual_cost", rows, worst):
        console.print(f"written: {path}")
    return int(any("error" in r or r["amortized"] > LIMIT for r in rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"members, of {', '.join(MEMBERS)}")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps")
    return parser.parse_args()


def row(name: str, rounds: int) -> Row:
    try:
        return attempt(name, rounds)
    except Exception as error:  # noqa: BLE001  (a member that fails becomes a row)
        return {"name": name, "error": measure.first_line(error)}


def attempt(name: str, rounds: int) -> Row:
    shape, batch = MEMBERS[name]
    inputs: Any = (
        {"input_ids": zoo.ids(batch, shape[0])}
        if name.startswith("hf/")
        else (torch.randn(batch, *shape),)
    )
    dense = zoo.build(name).train()
    masked = deepcopy(dense)
    gradual = depcut.training.Gradual(masked, 0.3, inputs, start=0, end=1, every=1, align=1)
    plain, _ = stepper(dense, inputs)
    step, optimizer = stepper(masked, inputs)
    for _ in range(2):
        plain()
        step()
    start = time.perf_counter()
    gradual.step()  # makes the one and final choice
    choice = time.perf_counter() - start

    def both() -> None:
        step()
        gradual.step()

    samples = measure.interleaved([clocked(plain), clocked(both)], rounds)
    pairs = [b / a for a, b in zip(*samples, strict=True)]
    dense_s, masked_s = map(median, samples)
    gradual.commit(optimizer=optimizer)
    return {
        "name": name,
        "batch": batch,
        "parameters": sum(p.numel() for p in dense.parameters()),
        "masked": gradual.removed,
        "dense_s": dense_s,
        "masked_s": masked_s,
        "ratio": median(pairs),
        "choice_s": choice,
        "amortized": median(pairs) + choice / 100 / dense_s,
    }


def clocked(function: Callable[[], None]) -> Callable[[], float]:
    return lambda: measure.timed(function)[0]


def stepper(model: nn.Module, inputs: Any) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        output = measure.call(model, inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        logits.square().mean().backward()
        optimizer.step()

    return step, optimizer


if __name__ == "__main__":
    raise SystemExit(main())
