"""How many passes over the calibration data do obs scores and compensation take?

Paired with one forward pass of the dense model over all batches, taken in turns in this process on
one thread; medians of processor seconds of the process, since other programs may share the machine.
Half of the MACs of a character Llama of four layers (8 batches of 32 windows of the standard
library's source) and of torchvision's ResNet-50 (16 images of 224 x 224 in two batches, weights and
running statistics random) go. Rows are added to results/calibration_time.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import accuracy_tasks
import measure
import torch
import zoo
from measure import Row
from torch import Tensor, nn

import depcut
from depcut.repair.compensate import compensate
from depcut.rewrite.build import rewrite
from depcut.scores import score

TARGETS = {"llama": 8.0, "resnet50": 12.0}  # passes, obs and compensation together
BATCHES = {"llama": 8, "resnet50": 2}

# What is timed by itself, and the item it counts to; the rest is the runs of the graph.
PARTS = {
    "depcut.calibration.backward": {"Backward._differentiate": "sensitivities"},
    "depcut.calibration.sensitivity": {"Sensitivity._take": "sensitivities"},
    "depcut.scores.reconstruction": {
        "Inputs.add": "moments",
        "_add_terms": "moments",
        "readers": "inverses",
        "eliminated": "elimination",
    },
    "depcut.calibration.folds": {"Folds.add": "moments", "Folds.moments": "moments"},
    "depcut.repair.sites": {"solve": "solves"},
    "depcut.repair.shared_inputs": {"SharedInputs.see": "moments", "solve_gaps": "solves"},
}
ITEMS = ("runs", "moments", "sensitivities", "inverses", "elimination", "solves")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--label", default="", help="what the rows are told apart by")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    zoo.libraries()
    rows = measure.read("calibration_time")["rows"]
    new = [measured(name, options.repeat, options.label) for name in options.nets]
    rows += new
    measure.write("calibration_time", rows, {r["name"]: r["passes"] for r in new})
    measure.console().print(measure.table("processor time of obs and compensation", COLUMNS, rows))
    return 0


def llama() -> tuple[nn.Module, list[Any]]:
    """Width 128, 4 layers, 4 query heads on 2 of keys and values; 8 x 32 windows of 128."""
    transformers = zoo.libraries()["transformers"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=accuracy_tasks.CONTEXT,
        use_cache=False,
    )
    model = perturbed(transformers.LlamaForCausalLM(config).eval())
    pairs = accuracy_tasks.TASKS["char_gpt"].calibration(0, BATCHES["llama"], 32)
    return model, [{"input_ids": tokens} for tokens, _ in pairs]


def resnet50() -> tuple[nn.Module, list[Any]]:
    """Torchvision's, 2 batches of 8 images of 224 x 224."""
    torch.manual_seed(0)
    model = perturbed(zoo.libraries()["torchvision"].models.resnet50())
    data = [smooth(8) for _ in range(BATCHES["resnet50"])]
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(smooth(8))
    return model.eval(), data


def smooth(count: int) -> Tensor:
    """Images whose neighbouring pixels are alike, as those of photographs are."""
    coarse = torch.randn(count, 3, 28, 28)
    fine = nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")
    return fine + 0.2 * torch.randn(count, 3, 224, 224)


def perturbed(model: nn.Module) -> nn.Module:
    """Norms and biases away from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


NETS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {"llama": llama, "resnet50": resnet50}


class Clock:
    """Processor seconds by item, each without what is timed inside of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(ITEMS, 0.0)
        self.running = ["runs"]
        self.since = time.process_time()

    def switch(self) -> None:
        now = time.process_time()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def around(self, function: Callable[..., Any], item: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(item)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return timed


@contextmanager
def itemised() -> Iterator[Clock]:
    clock, before = Clock(), []
    for module, names in PARTS.items():
        for path, item in names.items():
            owner, _, name = path.rpartition(".")
            place = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            before.append((place, name, getattr(place, name)))
            setattr(place, name, clock.around(getattr(place, name), item))
    try:
        with measure.without_collection():
            clock.since = time.process_time()
            yield clock
            clock.switch()
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def measured(name: str, repeat: int, label: str) -> Row:
    model, data = NETS[name]()
    example = data[0]
    analysis = depcut.analyze(model, example)
    calibration = analysis.calibrate(data, batches=len(data), progress=False)
    plan = analysis.plan(0.5, data=calibration, score="magnitude", rebuildable=False)
    keep = plan.keep(analysis.coupling)
    samples: list[Row] = []
    for _ in range(repeat):
        start = time.process_time()
        for item in data:
            measure.outputs(model, item if isinstance(item, dict) else (item,))
        forward = time.process_time() - start
        with itemised() as scoring:
            score("obs", analysis.coupling, model, 0, calibration)
        slim = rewrite(model, keep).model
        with itemised() as repairing:
            compensate(slim, model, keep, calibration)
        samples.append(sample(forward, scoring, repairing))
        print(name, {k: round(v, 2) for k, v in samples[-1].items()}, flush=True)
    middle = {key: median(s[key] for s in samples) for key in samples[0]}
    return {"name": name, "label": label, "target": TARGETS[name], **middle}


def sample(forward: float, scoring: Clock, repairing: Clock) -> Row:
    parts = {"obs": scoring.seconds, "compensate": repairing.seconds}
    totals = {part: sum(seconds.values()) for part, seconds in parts.items()}
    shares = {
        f"{part} {item}": seconds[item] / forward
        for part, seconds in parts.items()
        for item in ITEMS
        if seconds[item]
    }
    passes = {part: total / forward for part, total in totals.items()}
    return {"forward_s": forward, "passes": sum(passes.values()), **passes, **shares}


def shown(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row.get(key, 0.0):.2f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "net": lambda r: f"{r['name']} {r['label']}".strip(),
    "forward, s": shown("forward_s"),
    "passes": shown("passes"),
    "at most": lambda r: f"{r['target']:.0f}",
    "obs": shown("obs"),
    **{f"o: {item}": shown(f"obs {item}") for item in ITEMS[:5]},
    "compensation": shown("compensate"),
    **{f"c: {item}": shown(f"compensate {item}") for item in ("runs", "moments", "solves")},
}


if __name__ == "__main__":
    sys.exit(main())
