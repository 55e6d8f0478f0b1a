"""Branches: what is found, and that a model without one computes what it did with zeros there."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from depth_nets import CASES, Leaking, Nested, NoStream, Shared, interpreted, rows, words
from nets import normal, seeded
from oracle import (
    assert_close,
    assert_untouched,
    call,
    gradients,
    outputs,
    random_keep,
    snapshot,
)
from selection import sampled
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import depcut
from depcut.allocate.influence import examples, influence
from depcut.branches.branch import bypass
from depcut.branches.find import residuals
from depcut.errors import BudgetError, InputError, PlanError
from depcut.plan.cost import count_macs, count_params


def zeroed(model: nn.Module, parameters: Any) -> nn.Module:
    """A copy in which these parameters are zero."""
    copy = deepcopy(model)
    held = dict(copy.named_parameters())
    with torch.no_grad():
        for name in parameters:
            held[name].zero_()
    return copy


def assert_agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert_close(actual, expected, tolerance, "without a branch")


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    """All non-empty subsets, of many names those of one, two and all."""
    sizes = range(1, len(names) + 1) if len(names) < 4 else (1, 2, len(names))
    return [s for n in sizes for s in itertools.combinations(names, n)]


CHOICES = {
    f"{name}-{'+'.join(chosen)}": (name, chosen)
    for name, c in CASES.items()
    for chosen in subsets(list(c.zeros))
}
# By default one branch of every net, and all of them.
ENDS = [f"{n}-{'+'.join(s)}" for n, c in CASES.items() for s in (list(c.zeros)[:1], c.zeros)]


@pytest.mark.parametrize("name", CASES)
def test_every_branch_is_found(name: str) -> None:
    found = CASES[name]
    analysis = depcut.analyze(found.build(), found.inputs(2))
    assert [b.name for b in analysis.branches] == list(found.zeros)
    assert analysis.residuals.refused == ()


@pytest.mark.parametrize("choice", sampled(CHOICES, ENDS))
def test_a_dropped_branch_is_a_branch_of_zeros(choice: tuple[str, tuple[str, ...]]) -> None:
    name, chosen = choice
    found = CASES[name]
    model = found.build()
    before = snapshot(model)
    analysis = depcut.analyze(model, found.inputs(2))
    plan = analysis.plan_keeping({}, dropped=chosen)
    slim = plan.apply(model)
    assert_untouched(model, before)
    zeros = zeroed(model, [p for n in chosen for p in found.zeros[n]])
    for batch in (1, 2, 5):
        given = found.inputs(batch)
        assert_agree(outputs(slim, given), outputs(zeros, given), 1e-5)
    check_tensors(slim, model, plan)
    check_training(slim, found.inputs(4))


def check_tensors(slim: nn.Module, model: nn.Module, plan: Any) -> None:
    """No tensor of a branch is left, every other one is there under its name, as predicted."""
    left = list(slim.state_dict())
    assert left == [n for n in model.state_dict() if n in left]
    parameters = {n for n, _ in slim.named_parameters()}
    assert {n for n, _ in model.named_parameters()} - parameters == idle_parameters(plan)
    assert sum(p.numel() for p in slim.parameters()) == plan.params


def idle_parameters(plan: Any) -> set[str]:
    """Parameters that get no gradient where the dropped summands are constant zeros."""
    model, program = plan.model, plan.coupling.program
    held = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    branches = residuals(plan.coupling).named(plan.dropped)
    loss = sum(t.sum() for t in interpreted(program, held, model, branches))
    found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
    return {n for n, g in zip(held, found, strict=True) if g is None}


def check_training(slim: nn.Module, inputs: Any) -> None:
    """A step changes every parameter, also where activations are changed in place."""
    slim = deepcopy(slim)
    found = gradients(slim, inputs)
    assert set(found) == {n for n, p in slim.named_parameters() if p.requires_grad}
    slim.train()
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    sum(t.square().mean() for t in tensors(call(slim, inputs))).backward()
    optimizer.step()
    slim.eval()
    assert all(t.isfinite().all() for t in outputs(slim, inputs))


def tensors(tree: Any) -> list[Tensor]:
    return list(tree_leaves(tree))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.sweep)])
def test_widths_and_branches_together(name: str, seed: int) -> None:
    """Narrowing the model with zeros is the judge; the narrowing itself has other tests."""
    found, rng = CASES[name], np.random.default_rng(seed)
    model = found.build()
    analysis = depcut.analyze(model, found.inputs(2))
    chosen = list(rng.choice(list(found.zeros), rng.integers(1, len(found.zeros) + 1), False))
    kept = random_keep(analysis, rng)
    slim = analysis.plan_keeping(kept, dropped=chosen).apply(model)
    zeros = zeroed(model, [p for n in chosen for p in found.zeros[n]])
    expected = depcut.analyze(zeros, found.inputs(2)).plan_keeping(kept).apply(zeros)
    for batch in (1, 3):
        given = found.inputs(batch)
        assert_agree(outputs(slim, given), outputs(expected, given), 1e-5)
    check_training(slim, found.inputs(4))


@pytest.mark.parametrize("name", sampled(CASES.keys(), [*CASES][::4]))
def test_costs_are_those_of_the_result(name: str) -> None:
    found = CASES[name]
    model = found.build()
    analysis = depcut.analyze(model, found.inputs(2))
    kept = random_keep(analysis, np.random.default_rng(3))
    assert found.zeros
    for branch in found.zeros:
        plan = analysis.plan_keeping(kept, dropped=[branch])
        slim = plan.apply(model)
        assert plan.macs == count_macs(slim, found.inputs(2)) < analysis.macs
        assert plan.params == count_params(slim) < analysis.params


# What is found ------------------------------------------------------------------------------------


def test_branches_are_measured() -> None:
    model = CASES["own_class"].build()
    branch = depcut.analyze(model, rows(2)).branches[0]
    assert branch.macs == 2 * 12 * 16
    assert branch.parameters == tuple(
        sorted(f"blocks.0.body.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
    )


def test_an_inner_branch_goes_with_the_outer_one() -> None:
    model = seeded(Nested, 0)
    analysis = depcut.analyze(model, rows(2))
    inner, outer = analysis.branches
    assert inner.nodes < outer.nodes
    expected = zeroed(model, ["up.weight", "up.bias"])
    for chosen in ([outer.name], [outer.name, inner.name]):
        slim = analysis.plan_keeping({}, dropped=chosen).apply(model)
        assert_agree(outputs(slim, rows(3)), outputs(expected, rows(3)), 1e-6)
        assert {n.partition(".")[0] for n in slim.state_dict()} == {"stem", "head"}


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_one_call_of_a_shared_layer(chosen: tuple[int, ...]) -> None:
    model = seeded(Shared, 0)
    analysis = depcut.analyze(model, rows(2))
    assert [b.name for b in analysis.branches] == ["layer", "layer#2", "layer#3"]
    assert all(not b.parameters for b in analysis.branches)
    names = [analysis.branches[i].name for i in chosen]
    slim = analysis.plan_keeping({}, dropped=names).apply(model)
    with torch.no_grad():
        x = model.stem(rows(3))
        for _ in range(3 - len(chosen)):
            x = x + model.layer(x)
        expected = model.head(x)
    assert_agree(outputs(slim, rows(3)), [expected], 1e-5)
    assert any(n.startswith("layer.") for n in slim.state_dict()) == (len(chosen) < 3)


def test_what_is_used_elsewhere_stays_with_the_reason() -> None:
    analysis = depcut.analyze(seeded(Leaking, 0), rows(2))
    assert analysis.branches == ()
    refused = analysis.residuals.refused
    assert [r.name for r in refused] == ["a", "b"]
    assert "used elsewhere" in refused[0].reason
    assert "on its way" in refused[1].reason
    assert all("depth_nets.py" in r.where for r in refused)


def test_branches_in_the_lines_of_the_whole_model() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(12, 12), nn.Linear(12, 4)
            self.weight, self.gain = nn.Parameter(torch.ones(12, 12)), nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + torch.nn.functional.linear(x, self.weight).relu()
            return self.head(x + x * self.gain)

    model = seeded(Root, 0)
    analysis = depcut.analyze(model, rows(2))
    assert [b.name for b in analysis.branches] == ["weight", "gain"]
    slim = analysis.plan_keeping({}, dropped=["weight", "gain"]).apply(model)
    assert {n.partition(".")[0] for n in slim.state_dict()} == {"stem", "head"}
    with torch.no_grad():
        assert_agree([slim(rows(3))], [model.head(model.stem(rows(3)))], 1e-6)


def test_siblings_and_broadcasts_are_no_branches() -> None:
    residuals = depcut.analyze(seeded(NoStream, 0), words(2)).residuals
    assert (residuals.branches, residuals.blocks, residuals.refused) == ((), (), ())


def test_blocks_do_nothing_without_their_branches() -> None:
    found = CASES["pre_norm"]
    model = found.build()
    analysis = depcut.analyze(model, words(2))
    blocks = {b.name: b.branches for b in analysis.residuals.blocks}
    assert blocks == {f"blocks.{i}": (f"blocks.{i}.attn", f"blocks.{i}.mlp") for i in range(2)}
    plan = analysis.plan_keeping({}, dropped=["blocks.0"])
    assert plan.dropped == blocks["blocks.0"]
    slim = plan.apply(model)
    assert type(slim) is type(model)
    assert list(slim.blocks[0].state_dict()) == []
    x = words(2)
    assert torch.equal(slim.blocks[0](x), x)
    # After a norm, something is left to do.
    assert depcut.analyze(CASES["post_norm"].build(), words(2)).residuals.blocks == ()


def test_what_is_left_of_a_block_is_its_own_code() -> None:
    model = CASES["pre_norm"].build()
    slim = depcut.analyze(model, words(2)).plan_keeping({}, ["blocks.0.attn"]).apply(model)
    block = slim.blocks[0]
    assert [n for n, _ in block.named_children()] == ["norm2", "mlp", "path"]
    assert type(slim.blocks[1]) is type(model.blocks[1])
    slim.train()
    torch.manual_seed(0)
    some = [bool(torch.equal(block(words(1)), words(1))) for _ in range(30)]
    assert 0 < sum(some) < 30, "stochastic depth of the other branch is lost"


def test_dropping_both_of_two_summands() -> None:
    analysis = depcut.analyze(CASES["branches_first"].build(), rows(2))
    a, b = analysis.branches
    assert a.add is b.add
    assert a.total is not a.add
    assert bypass([a]) == {a.add: b.operand}
    through = bypass([a, b])
    assert list(through) == [a.total]
    assert analysis.coupling.env[through[a.total]] is not None


# Plans --------------------------------------------------------------------------------------------


def test_a_plan_keeps_its_branches_in_a_file(tmp_path: Path) -> None:
    found = CASES["pre_norm"]
    model = found.build()
    analysis = depcut.analyze(model, words(2))
    kept = random_keep(analysis, np.random.default_rng(0))
    plan = analysis.plan_keeping(kept, dropped=["blocks.1.mlp", "blocks.0.attn"])
    assert plan.dropped == ("blocks.0.attn", "blocks.1.mlp")
    plan.save(tmp_path / "plan.json")
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert (loaded.dropped, loaded.digest) == (plan.dropped, plan.digest)
    assert plan.digest != analysis.plan_keeping(kept).digest
    again, first = loaded.apply(found.build()), plan.apply(model)
    assert again.state_dict().keys() == first.state_dict().keys()
    assert_agree(outputs(again, words(3)), outputs(first, words(3)), 1e-6)
    assert "without blocks.0.attn" in str(plan)
    assert not any(n.startswith("blocks.0.attn.") for n in plan.tensor_indices())


def test_files_from_before_there_were_branches(tmp_path: Path) -> None:
    model = CASES["own_class"].build()
    plan = depcut.analyze(model, rows(2)).plan(0.4, align=1)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["dropped"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    assert (loaded.dropped, loaded.digest) == ((), plan.digest)


def test_an_unknown_branch() -> None:
    analysis = depcut.analyze(CASES["own_class"].build(), rows(2))
    with pytest.raises(PlanError) as caught:
        analysis.plan_keeping({}, dropped=["blocks.0.bdy"])
    assert "no residual branch 'blocks.0.bdy'" in str(caught.value)
    assert "did you mean blocks.0.body" in str(caught.value)
    leaking = depcut.analyze(seeded(Leaking, 0), rows(2))
    with pytest.raises(PlanError, match="'a' cannot be dropped: what it adds is used elsewhere"):
        leaking.plan_keeping({}, dropped=["a"])


def test_optimizer_state_of_what_is_left() -> None:
    model = CASES["own_class"].build()
    optimizer = torch.optim.Adam(model.parameters())
    call(model, rows(4)).sum().backward()
    optimizer.step()
    plan = depcut.analyze(model, rows(2)).plan_keeping({}, dropped=["blocks.0.body"])
    slim = plan.apply(model, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in slim.parameters()}
    assert len(optimizer.state) == len(held)


@pytest.mark.sweep
def test_export_without_a_branch(tmp_path: Path) -> None:
    model = CASES["resnet"].build()
    given = CASES["resnet"].inputs(2)
    plan = depcut.analyze(model, given).plan_keeping({}, dropped=["layers.0", "layers.1"])
    report = depcut.export(plan.apply(model), tmp_path / "slim.onnx", given)
    assert (tmp_path / "slim.onnx").exists()
    assert report.max_rel_error < 1e-4


# Scores and allocation ----------------------------------------------------------------------------


@torch.no_grad()
def test_influence_is_the_angle_of_the_stream() -> None:
    model = CASES["pre_norm"].build()
    analysis = depcut.analyze(model, words(2))
    candidates = [*analysis.branches, *analysis.residuals.blocks]
    scores = influence(analysis.coupling, model, candidates, examples(analysis.coupling))
    x = model.stem(words(2))
    assert len(model.blocks)
    for i, block in enumerate(model.blocks):
        middle = x + block.gamma * block.attn(block.norm1(x))
        result = middle + block.mlp(block.norm2(middle))
        for name, before, after in (
            (f"blocks.{i}.attn", x, middle),
            (f"blocks.{i}.mlp", middle, result),
            (f"blocks.{i}", x, result),
        ):
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
            assert scores[name] == pytest.approx(1 - float(cosine), abs=1e-5), name
        x = result


@torch.no_grad()
def test_channels_of_an_image_are_dimension_1() -> None:
    model = CASES["resnet"].build()
    given = CASES["resnet"].inputs(2)
    analysis = depcut.analyze(model, given)
    scores = influence(analysis.coupling, model, analysis.branches, examples(analysis.coupling))
    block, x = model.layers[0], model.stem(given)
    out = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    cosine = torch.nn.functional.cosine_similarity(x, x + out, dim=1).mean()
    assert scores["layers.0"] == pytest.approx(1 - float(cosine), abs=1e-5)


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_budget_is_met_with_branches_dropped(of: str, allocation: str) -> None:
    model, given = deep()
    analysis = depcut.analyze(model, given)
    plan = analysis.plan(0.5, of=of, allocation=allocation, align=1, depth=True)
    assert plan.dropped, "of a model with idle branches, some must go"
    assert getattr(plan, of) / getattr(analysis, of) == pytest.approx(0.5, abs=0.02)
    slim = plan.apply(model)
    assert plan.settings["depth"] is True
    left = count_macs(slim, given) if of == "macs" else count_params(slim)
    assert left == getattr(plan, of)


def deep() -> tuple[nn.Module, Tensor]:
    """A transformer of which some branches hardly do anything."""
    torch.manual_seed(0)
    model = CASES["pre_norm"].build()
    quiet = ("blocks.0.mlp.2.weight", "blocks.0.mlp.2.bias", "blocks.1.gamma")
    with torch.no_grad():
        for name in quiet:
            model.get_parameter(name).mul_(1e-4)
    return model, words(4)


def test_idle_branches_go_first() -> None:
    model, given = deep()
    analysis = depcut.analyze(model, given)
    plan = analysis.plan(0.5, align=1, depth=True)
    assert set(plan.dropped) == {"blocks.0.mlp", "blocks.1.attn"}
    slim = depcut.shrink(model, 0.5, given, align=1, depth=True)
    narrow = depcut.shrink(model, 0.5, given, align=1)
    with torch.no_grad():
        dense = model(given)
        assert (slim(given) - dense).norm() < (narrow(given) - dense).norm()


def test_no_branch_goes_where_each_is_more_than_the_budget() -> None:
    model = CASES["parallel"].build()
    plan = depcut.analyze(model, rows(2)).plan(0.05, align=1, depth=True)
    assert plan.dropped == ()


def test_what_the_request_names_is_not_dropped() -> None:
    model, given = deep()
    analysis = depcut.analyze(model, given)
    for options in ({"ignore": "blocks.0.mlp.0"}, {"ratios": {"blocks.0.mlp.0": 0.5}}):
        plan = analysis.plan(0.4, align=1, depth=True, allocation="uniform", **options)
        assert "blocks.0.mlp" not in plan.dropped
        assert "blocks.1.attn" in plan.dropped


def test_a_model_without_branches_is_narrowed() -> None:
    model = seeded(NoStream, 0)
    analysis = depcut.analyze(model, words(2))
    with_depth, without = analysis.plan(0.3, align=1, depth=True), analysis.plan(0.3, align=1)
    assert with_depth.digest == without.digest


def test_groups_of_dropped_branches_are_left_alone() -> None:
    model, given = deep()
    analysis = depcut.analyze(model, given)
    plan = analysis.plan(0.5, align=1, depth=True)
    gone = plan.keep().gone.tensors
    dead = [g.name for g in analysis.groups if all(m.tensor in gone for m in g.members)]
    assert dead
    assert not set(dead) & set(plan.kept)


def test_an_analysis_names_its_branches() -> None:
    assert "residual branches (depth=True): a, b" in str(
        depcut.analyze(CASES["parallel"].build(), rows(2))
    )


def test_a_budget_out_of_reach() -> None:
    model = CASES["own_class"].build()
    with pytest.raises(BudgetError):
        depcut.shrink(model, 0.9999, rows(2), depth=True)


class Sized(nn.Module):
    """A residual block that is passed sizes of the image beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        hidden = self.first(x).relu()
        x = x + self.second(hidden.view(len(x), -1, height, width))
        return x + x.sigmoid() / height


class PassingSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(Sized() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, x.shape[2], x.shape[3])
        return x.mean((2, 3))


def test_a_block_without_its_branch_is_passed_the_sizes_that_it_was_captured_with() -> None:
    model, x = seeded(PassingSizes, 0), normal(2, 3, 5, 5)
    analysis = depcut.analyze(model, x)
    plan = analysis.plan_keeping({}, dropped=["blocks.1"])
    slim = plan.apply(model)
    assert list(depcut.report(slim).generated) == ["blocks.1"]
    assert slim(x).shape == (2, 4)
    with pytest.raises(InputError, match="the argument 5 and is called with 6"):
        slim(normal(2, 3, 6, 6))
