"""What units of the work on a checkpoint cost on this machine, see estimate.py."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import depcut
from depcut.plan.keep import Keep
from depcut.reference.run import Reference, example
from depcut.repair.sites import SiteRepair
from depcut.scores import reconstruction
from depcut.streaming.source import Source
from depcut.streaming.weights import Single
from depcut.support.weights import Stored, write_part_by_part

SIZES = {**checkpoints.SIZES, "70B": (8192, 28672, 80, 64, 8, 128256)}
HALF = 2  # bytes of a number in bfloat16
WIDE, NARROW = 768, 384  # hidden sizes at which scoring and solving are timed
_PROBE = 2**27  # bytes of a shard that is written and read


@dataclass(frozen=True)
class Shape:
    """A decoder and the data.

    Attributes:
        hidden: Width of the stream.
        inner: Of the layers between.
        layers: How many.
        heads: Of queries.
        pairs: Heads of keys and values.
        words: Of the vocabulary.
        head: Width of a head.
        batches: Of one text each.
        length: Tokens of a text.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    pairs: int
    words: int
    head: int
    batches: int
    length: int

    @staticmethod
    def of(size: str, batches: int, length: int) -> Shape:
        """That of a size by name."""
        hidden, inner, layers, heads, pairs, words = SIZES[size]
        return Shape(hidden, inner, layers, heads, pairs, words, hidden // heads, batches, length)

    def divided(self, hidden: int, layers: int) -> Shape:
        """All widths and tokens divided by one number, so that the stream has about some width."""
        head = max(2, 2 * round(self.head * hidden / self.hidden / 2))
        share = head / self.head
        return replace(
            self,
            hidden=self.heads * head,
            inner=8 * round(self.inner * share / 8),
            layers=layers,
            words=64,
            head=head,
            length=max(1, round(self.length * share)),
        )

    def model(self, device: str = "meta") -> nn.Module:
        """It, with random weights or none."""
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.pairs, head_dim=self.head,
            vocab_size=self.words, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()

    def data(self) -> list[torch.Tensor]:
        """Texts of random words."""
        drawn = torch.Generator().manual_seed(0)
        return [
            torch.randint(self.words, (1, self.length), generator=drawn)
            for _ in range(self.batches)
        ]


@dataclass(frozen=True)
class Units:
    """What things cost here.

    Attributes:
        read: Bytes of a shard in a second, from the disk into single precision.
        write: Bytes of a shard in a second, hashed, until they are on the disk.
        products: Multiply-accumulates in a second, in single precision.
        node: Seconds of an operator of a small model.
    """

    read: float
    write: float
    products: float
    node: float


@contextmanager
def timed(*steps: tuple[Any, str]) -> Iterator[Callable[[], float]]:
    """Seconds that are spent within some of depcut's own steps.

    Args:
        *steps: Owner and name of each.
    """
    spent, real = [0.0], [getattr(owner, name) for owner, name in steps]

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return step(*given, **named)
            finally:
                spent[0] += time.perf_counter() - start

        return run

    for (owner, name), step in zip(steps, real, strict=True):
        setattr(owner, name, watched(step))
    try:
        yield lambda: spent[0]
    finally:
        for (owner, name), step in zip(steps, real, strict=True):
            setattr(owner, name, step)


def calibrated(shape: Shape) -> tuple[float, float]:
    """Seconds of scoring units and of repairing weights, without the walks over the graph.

    Args:
        shape: A decoder that is small enough to have.
    """
    model, data = shape.model("cpu"), shape.data()
    analysis = depcut.analyze(model, data[0])
    elimination = reconstruction._Elimination
    with timed((elimination, "_go_on"), (elimination, "_gather")) as scoring:
        plan = analysis.plan(0.3, data=data, rebuildable=True, progress=False)
    with timed((SiteRepair, "see"), (SiteRepair, "finish")) as repairing:
        plan.apply(model, data=data, progress=False)
    return scoring(), repairing()


def extrapolated(shape: Shape) -> tuple[float, float]:
    """Seconds of scoring and of repairing at full size, from two smaller ones.

    A layer takes a + b f^3, f being the share of all widths and of the tokens; what one layer takes
    is the difference between two and one.

    Args:
        shape: The decoder.
    """
    shares, layers = [], []
    for hidden in (min(NARROW, shape.hidden // 4), min(WIDE, shape.hidden // 2)):
        one, two = (shape.divided(hidden, count) for count in (1, 2))
        shares.append((one.hidden / shape.hidden) ** 3)
        once, twice = calibrated(one), calibrated(two)
        layers.append([max(b - a, a / 4) for a, b in zip(once, twice, strict=True)])
    out = []
    for small, large in zip(*layers, strict=True):
        growth = max((large - small) / (shares[1] - shares[0]), large / shares[1] / 2)
        out.append(shape.layers * (max(small - growth * shares[0], 0.0) + growth))
    return out[0], out[1]


def units(shape: Shape) -> Units:
    """Measure what things cost in this process.

    Args:
        shape: The decoder: of which sizes products are.
    """
    return Units(*_disk(), _products(shape), _node())


def _disk() -> tuple[float, float]:
    """Bytes in a second of reading and of writing a shard."""
    rows = _PROBE // HALF // 4096
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, given = Path(name), torch.randn(256, 4096).to(torch.bfloat16)
        layout = {str(i): Stored("BF16", HALF, (rows // 8, 4096)) for i in range(8)}
        start = time.perf_counter()
        write_part_by_part(
            layout, lambda _: [given] * (rows // 8 // 256), folder / "model.safetensors"
        )
        written = time.perf_counter() - start
        (folder / "config.json").write_text("{}")
        descriptor = os.open(folder / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        single = Single(Source(folder))
        start = time.perf_counter()
        for tensor in layout:
            single[tensor].sum()
        return _PROBE / (time.perf_counter() - start), _PROBE / written


def _products(shape: Shape) -> float:
    """Multiply-accumulates in a second of a layer's products."""
    outputs = min(shape.inner, 2**24 // shape.hidden)
    x, w = torch.randn(shape.length, shape.hidden), torch.randn(outputs, shape.hidden)
    took = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        took.append(time.perf_counter() - start)
    return shape.length * shape.hidden * outputs / min(took)


def _node() -> float:
    """Seconds of an operator on next to nothing."""
    shape = Shape(16, 16, 2, 2, 1, 16, 8, 1, 4)
    model, data = shape.model("cpu"), shape.data()
    coupling = depcut.analyze(model, data[0]).coupling
    reference = Reference(Keep(coupling, {}), model)
    nodes = sum(n.op == "call_function" for n in coupling.program.graph.graph.nodes)
    took = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.no_grad():
            reference.run(tree_leaves(example(reference.keep)))
        took.append(time.perf_counter() - start)
    return min(took) / nodes
