"""Public architectures without some of their branches, against their own graph with zeros there.

A handful run by default, a share of the others with `-m sweep`, all of them with `-m exhaustive`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from depth_nets import interpreted
from oracle import assert_close, assert_untouched, call, gradients, outputs, snapshot
from selection import sampled, swept
from torch import nn

import depcut
from depcut.errors import InputError
from depcut.plan.cost import count_params

FAST = ("tv/resnet18", "hf/llama")

# What must be found: branches, and blocks of them (a stage of blocks is one, too).
KNOWN = {
    "hf/bert": (6, 0),
    "hf/gpt2": (6, 3),
    "hf/llama": (6, 3),
    "hf/vit": (6, 3),
    "hf/t5": (10, 4),
    "tv/resnet18": (8, 0),
    "timm/convnextv2_atto": (24, 29),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "zoo_libraries"),
]


@pytest.mark.parametrize("name", sampled(KNOWN.keys(), FAST))
def test_branches_of_a_public_architecture(name: str) -> None:
    residuals = dropped(name)
    assert (len(residuals.branches), len(residuals.blocks)) == KNOWN[name]


@pytest.mark.parametrize("name", swept((name for name in zoo.ZOO if name not in KNOWN), 9))
def test_branches_of_every_public_architecture(name: str) -> None:
    residuals = dropped(name)
    assert len({b.name for b in residuals.branches}) == len(residuals.branches)


@pytest.mark.parametrize("name", FAST)
def test_half_of_a_public_architecture_with_branches_dropped(name: str) -> None:
    member, model = zoo.ZOO[name], zoo.build(name)
    analysis = depcut.analyze(model, member.inputs(2))
    plan = analysis.plan(0.5, align=1, allocation="global", depth=True)
    assert plan.macs / analysis.macs == pytest.approx(0.5, abs=0.02)
    assert plan.dropped
    slim = plan.apply(model)
    assert type(slim) is type(model)


def train_mode(slim: nn.Module) -> AbstractContextManager[Any]:
    """Where code that was replaced by its graph asks for the mode, train() is refused by name."""
    if any(getattr(module, "modal", False) for module in slim.modules()):
        return pytest.raises(InputError, match=r"called with train\(\)")
    return nullcontext()


def dropped(name: str) -> Any:
    """Drop a third of the branches, and all of them, and demand all that a user may rely on."""
    member, model = zoo.ZOO[name], zoo.build(name)
    before, rng = snapshot(model), np.random.default_rng(0)
    analysis = depcut.analyze(model, member.inputs(2))
    names = [b.name for b in analysis.branches]
    some = rng.choice(names, len(names) // 3 + 1, replace=False) if names else []
    for chosen in (list(some), names) if names else ():
        plan = analysis.plan_keeping({}, dropped=chosen)
        slim = plan.apply(model)
        held = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        zeros = interpreted(analysis.program, held, model, analysis.residuals.named(chosen))
        made = outputs(slim, member.inputs(2))
        assert_close(made, [t for t in zeros if isinstance(t, torch.Tensor)], 1e-4, chosen)
        left = list(slim.state_dict())
        assert left == [n for n in model.state_dict() if n in left]
        assert plan.keep().gone.tensors.isdisjoint(left)
        assert count_params(slim) == plan.params
        assert type(slim) is type(model)
        assert all(t.isfinite().all() for t in outputs(slim, member.inputs(3)))
        found = gradients(slim, member.inputs(2))
        assert all(g.isfinite().all() for g in found.values())
        with torch.no_grad(), train_mode(slim):
            call(slim.train(), member.inputs(2))
    assert_untouched(model, before)
    return analysis.residuals
