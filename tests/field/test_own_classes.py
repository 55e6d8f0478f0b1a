"""No generated module: UNet, torch's transformers, ModernBERT; the zoo's are in `test_zoo`.

A handful run by default, all of them with `-m sweep`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import places
import pytest
import torch
from oracle import assert_untouched, outputs, snapshot
from patch_nets import assert_same, drawn, zeroed
from torch import Tensor, nn

import depcut

FAST = ("encoder 64",)
ATTENTION = ("unet", "modernbert", "encoder 64", "decoder 64, pre-norm", "transformer 128")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def assert_patched(name: str, ratio: float) -> tuple[nn.Module, nn.Module]:
    """Shrink without a generated module; other batches run."""
    if name == "modernbert":
        pytest.importorskip("transformers")
    model = places.build(name)
    before = snapshot(model)
    slim = depcut.shrink(  # uniform: every width changes
        model, ratio, places.inputs(name, 2), allocation="uniform", rebuildable=False
    )
    report = depcut.report(slim)
    assert not report.generated
    assert report.patched or ratio < 0.5  # a third of the MACs goes without a head
    assert type(slim) is type(model)
    assert_untouched(model, before)
    for batch in (2, 3):
        dense, narrow = (outputs(m, places.inputs(name, batch)) for m in (model, slim))
        assert [t.shape for t in narrow] == [t.shape for t in dense]
        assert all(t.isfinite().all() for t in narrow)
    return slim, model


@pytest.mark.parametrize("name", FAST)
def test_place(name: str) -> None:
    assert_patched(name, 0.5)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in places.PLACES if name not in FAST])
def test_every_place(name: str) -> None:
    assert_patched(name, 0.5)


@pytest.mark.sweep
@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_at_other_ratios(name: str, ratio: float) -> None:
    assert_patched(name, ratio)


@pytest.mark.sweep
def test_other_calls_of_a_unet() -> None:
    slim, model = assert_patched("unet", 0.5)
    image, step, context = places.unet_inputs(2, 24, 11)
    assert slim(image, step, context).shape == model(image, step, context).shape
    slim.train().double()(image.double(), step.double(), context.double()).sum().backward()
    assert all(p.grad is not None for p in slim.parameters())


class Crossing(nn.Module):
    """One attention as diffusers writes it; the example call gives it no context and no mask."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 32)
        self.attention = places.Attention(32, None, 4, 8, processor=processor())
        self.head = nn.Linear(32, 3)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return self.head(self.attention(self.stem(x), context, mask))


@functools.cache
def _crossing(processor: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Crossing(processor).eval()
    x = drawn(2, 6, 5)
    analysis = depcut.analyze(net, x)
    groups = {g.name: g.size for g in analysis.groups}
    inside = {name: size for name, size in groups.items() if size != 32}
    kept = {name: list(range(size - 1)) for name, size in inside.items()}
    plan = analysis.plan_keeping(kept)
    dense = zeroed(net, plan.tensor_indices())
    slim = plan.apply(dense)
    assert not depcut.report(slim).generated
    assert slim.attention.to_q.out_features < 32
    return slim, dense


CALLS = {
    "as in the example": lambda: (drawn(2, 6, 5),),
    "another length": lambda: (drawn(3, 9, 5),),
    "a context": lambda: (drawn(2, 6, 5), drawn(2, 9, 32)),
    "a mask": lambda: (drawn(2, 6, 5), None, drawn(2, 6, 6)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_processor_that_the_module_calls(call: Any) -> None:
    assert_same(*_crossing(places.AttnProcessor2_0), *call())


def test_another_processor_is_refused() -> None:
    slim = copy.deepcopy(_crossing(places.AttnProcessor2_0)[0])
    slim.attention.processor = places.AttnProcessor()
    with pytest.raises(
        depcut.DepcutError, match="calls AttnProcessor where it called AttnProcessor2_0"
    ):
        slim(drawn(2, 6, 5))


class Twice(nn.Module):
    """Its inputs have batches of their own until the first attention combines them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Crossing(places.AttnProcessor), Crossing(places.AttnProcessor2_0)
        self.between = nn.Linear(3, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.second(self.between(self.first(x, context)))


def test_batches_that_turn_out_to_be_one() -> None:
    torch.manual_seed(0)
    net, call = Twice().eval(), (drawn(2, 6, 5), drawn(2, 9, 32))
    analysis = depcut.analyze(net, call)
    kept = {g.name: list(range(g.size - 1)) for g in analysis.groups if g.size < 32}
    plan = analysis.plan_keeping(kept)
    dense = zeroed(net, plan.tensor_indices())
    slim = plan.apply(dense)
    assert slim.first.attention.heads < 4
    assert not depcut.report(slim).generated
    assert_same(slim, dense, drawn(3, 7, 5), drawn(3, 4, 32))
