"""Public architectures: half of the MACs gone, and everything still works.

A handful run by default, a share of the others with `-m sweep`, all of them with `-m exhaustive`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import zoo
from oracle import assert_untouched, call, gradients, outputs, snapshot
from selection import swept
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.flop_counter import FlopCounterMode

import depcut

# Outputs that are no results of their own, and what is said of one that is narrower.
AUXILIARY = {"hf/whisper": {"encoder_last_hidden_state"}, "hf/t5": {"encoder_last_hidden_state"}}
NARROWER = re.compile("the output '(.+?)' does not count, and is narrower")

FAST = ("tv/resnet18", "timm/convnextv2_atto", "hf/llama")  # one of each library

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "zoo_libraries"),
]


@pytest.mark.parametrize("name", FAST)
def test_half_of_a_public_architecture(name: str) -> None:
    assert_halved(name)


@pytest.mark.parametrize("name", swept((name for name in zoo.ZOO if name not in FAST), 18))
def test_half_of_every_public_architecture(name: str) -> None:
    assert_halved(name)


def assert_halved(name: str) -> None:
    """Shrink by half of the MACs and demand all that a user may rely on."""
    member, model = zoo.ZOO[name], zoo.build(name)
    before = snapshot(model)
    slim = depcut.shrink(model, 0.5, member.inputs(2), align=1, rebuildable=False)
    assert_untouched(model, before)
    assert not depcut.report(slim).generated
    assert type(slim) is type(model)
    assert list(slim.state_dict()) == list(model.state_dict())
    assert macs(slim, member.inputs(2)) / macs(model, member.inputs(2)) == pytest.approx(
        0.5, abs=0.02
    )
    narrower = set(NARROWER.findall(" ".join(depcut.report(slim).notes)))
    assert narrower == AUXILIARY.get(name, set()), "an output is narrower, or is said to be"
    for batch in (2, 3):
        dense, narrow = shapes(model, member.inputs(batch)), shapes(slim, member.inputs(batch))
        assert {key for key, shape in dense.items() if narrow[key] != shape} == narrower
        assert all(t.isfinite().all() for t in outputs(slim, member.inputs(batch)))
    learns(slim, model, member.inputs(2))


def shapes(model: nn.Module, inputs: zoo.Inputs) -> dict[str, torch.Size]:
    """Sizes of all output tensors, by name where the output has one."""
    with torch.no_grad():
        leaves, _ = tree_flatten_with_path(call(model, inputs))
    return {
        keystr(path).strip("[]'."): leaf.shape for path, leaf in leaves if isinstance(leaf, Tensor)
    }


def learns(slim: nn.Module, model: nn.Module, inputs: zoo.Inputs) -> None:
    """The same parameters get finite gradients, and train mode runs."""
    found = gradients(slim, inputs)
    assert set(found) == set(gradients(model, inputs))
    assert all(gradient.isfinite().all() for gradient in found.values())
    slim.train()
    with torch.no_grad():
        call(slim, inputs)


@contextmanager
def without_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def macs(model: nn.Module, inputs: zoo.Inputs) -> float:
    """Multiply-accumulates as torch counts them: matrix products, convolutions and attention."""
    counter = FlopCounterMode(display=False)
    # The counter's hooks stumble over views of what requires gradients.
    model = copy.deepcopy(model).requires_grad_(False)
    # The counter does not see what torch does in one piece for nn.MultiheadAttention.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), without_fast_path():
        call(model, inputs)
    return counter.get_total_flops() / 2
