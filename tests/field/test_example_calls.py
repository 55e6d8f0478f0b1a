"""Several example calls: layers that only some of them run shrink together, and all stay right."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import normal, seeded
from oracle import (
    all_tensors,
    assert_close,
    assert_untouched,
    call,
    check_groups,
    check_tensors,
    families,
    outputs,
    random_keep,
    reads,
    snapshot,
    zero_all_but,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import depcut
from depcut.errors import BudgetError, CaptureError, InputError, PlanError, VerificationError
from depcut.verify.verify import masked_outputs


def check_calls(
    model: nn.Module,
    calls: list[Any],
    *,
    seed: int = 0,
    held: tuple[int, ...] = (),
    tolerance: float = 1e-5,
    preferred: bool = False,
) -> tuple[Any, nn.Module]:
    """Cut at random; every call must equal its dense counterpart with zeros where units are read.

    Args:
        model: The model to cut; it must come out of this untouched.
        calls: The example calls.
        seed: Of the random plan.
        held: Sizes of groups that the comparison by brute force leaves whole: zeros say nothing of
            what a norm or a softmax over them, or a product of two activations, computes.
        tolerance: Largest error of an output, relative to the largest output.
        preferred: Only widths that the model's own classes can express.

    Returns:
        The analysis and the smaller model.
    """
    before = snapshot(model)
    analysis = depcut.analyze(model, calls)
    check_groups(analysis, model)
    keep: dict[str, Any] = random_keep(analysis, np.random.default_rng(seed))
    if preferred:
        keep = dict(analysis.plan(0.4, of="channels", score="random", seed=seed).kept)
    plan = analysis.plan_keeping(keep)
    slim = plan.apply(model)
    check_tensors(slim, model, plan)
    for example, kept in zip(calls, plan.keep().calls, strict=True):
        assert_close(outputs(slim, example), masked_outputs(kept, model), tolerance, keep)
    whole = {
        group.name
        for family in families(analysis)
        if any(g.size in held or not reads(g) for g in family)
        for group in family
    }
    plan = analysis.plan_keeping({name: kept for name, kept in keep.items() if name not in whole})
    narrow, zeroed = plan.apply(model), deepcopy(model)
    indices, tensors = plan.tensor_indices(), all_tensors(zeroed)
    for tensor, dim in {(m.tensor, m.dim) for g in analysis.groups for m in reads(g)}:
        if indices[tensor][dim] is not None:
            zero_all_but(tensors[tensor], dim, indices[tensor][dim])
    for example in calls:
        assert_close(outputs(narrow, example), outputs(zeroed, example), tolerance, keep)
    trained = deepcopy(slim).train()
    assert all(t.isfinite().all() for example in calls for t in outputs(trained, example))
    assert_untouched(model, before)
    return analysis, slim


def widths(analysis: Any) -> dict[str, int]:
    return {group.name: group.size for group in analysis.groups}


# What only some calls run -------------------------------------------------------------------------


class Arms(nn.Module):
    """Layers of a dictionary, one of which a call chooses."""

    def __init__(self, names: str = "ab") -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(7, 8), nn.BatchNorm1d(8)
        self.arms = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(8, 10 + i), nn.ReLU(), nn.Linear(10 + i, 6))
                for i, name in enumerate(names)
            }
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, which: str = "a") -> Tensor:
        x = self.arms[which](F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(x))


def arms(names: str = "ab") -> tuple[Arms, list[Any]]:
    x = normal(2, 7)
    return seeded(lambda: Arms(names), 0), [x, *({"x": x, "which": n} for n in names[1:])]


@cache
def analysed() -> Any:
    """Of the two arms; shared, as nothing changes an analysis or its model."""
    return depcut.analyze(*arms())


def test_entries_of_a_module_dict_shrink_together() -> None:
    model, calls = arms()
    analysis, slim = check_calls(model, calls)
    assert widths(analysis) == {"stem": 8, "arms.a.0": 10, "arms.a.2": 6, "arms.b.0": 11}
    [shared] = [g for g in analysis.groups if g.name == "arms.a.2"]
    assert shared.layers == ("arms.a.2", "arms.b.2")
    assert type(slim) is Arms
    assert not depcut.report(slim).generated
    assert not analysis.program.unused


def test_three_calls() -> None:
    model, calls = arms("abc")
    analysis, slim = check_calls(model, calls, seed=1)
    assert len(analysis.program.examples) == 3
    assert all(call(slim, example).shape == (2, 5) for example in calls)
    text = str(analysis)
    assert "3 example calls" in text
    assert "no example call uses" not in text


class Exits(nn.Module):
    """Early exits: a call goes as deep as it says."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(7, 12), nn.Linear(12, 14), nn.Linear(14, 16)])
        self.exits = nn.ModuleList([nn.Linear(12, 4), nn.Linear(14, 4), nn.Linear(16, 4)])

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        for stage in self.stages[:depth]:
            x = stage(x).relu()
        return self.exits[depth - 1](x)


def test_early_exits() -> None:
    model, x = seeded(Exits, 0), normal(2, 7)
    analysis, _ = check_calls(model, [x, (x, 1), {"x": x, "depth": 2}])
    first = next(g for g in analysis.groups if g.name == "stages.0")
    assert {m.tensor for m in first.members if m.role == "consumer"} == {
        "stages.1.weight",
        "exits.0.weight",
    }


class Modes(nn.Module):
    """Encoding and decoding through shared layers, in other orders."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 9), nn.Linear(9, 6)
        self.shared, self.code, self.back = nn.Linear(9, 9), nn.Linear(9, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor, mode: str = "encode") -> Tensor:
        if mode == "encode":
            return self.code(self.shared(self.into(x).relu()).relu())
        return self.out(self.shared(self.back(x).relu()).sigmoid())


def test_modes_with_shared_layers() -> None:
    model = seeded(Modes, 0)
    analysis, _ = check_calls(model, [normal(2, 6), (normal(3, 4), "decode")])
    read = next(g for g in analysis.groups if "into" in g.layers)
    made = next(g for g in analysis.groups if "shared" in g.layers)
    assert set(read.layers) == {"into", "back"}
    assert {m.tensor for m in made.members if m.role == "consumer"} == {"code.weight", "out.weight"}


class Order(nn.Module):
    """A flag turns the order of a concatenation around."""

    def __init__(self, left: int = 6, right: int = 6) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, left), nn.Linear(5, right)
        self.head = nn.Linear(left + right, 4)

    def forward(self, x: Tensor, *, swap: bool = False) -> Tensor:
        parts = [self.left(x).relu(), self.right(x).relu()]
        return self.head(torch.cat(parts[::-1] if swap else parts, -1))


@pytest.mark.parametrize(("left", "right", "size"), [(6, 6, 6), (4, 8, 4)])
def test_the_order_of_a_concatenation_couples_both_ways(left: int, right: int, size: int) -> None:
    model, x = seeded(lambda: Order(left, right), 0), normal(2, 5)
    alone = depcut.analyze(model, x)
    assert widths(alone) == {"left": left, "right": right}
    analysis, _ = check_calls(model, [x, {"x": x, "swap": True}])
    assert [g.size for g in analysis.groups] == [size]
    assert analysis.groups[0].layers == ("left", "right")


class Hidden(nn.Module):
    """One call returns what is hidden in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, *, features: bool = False) -> Tensor:
        x = self.a(x).relu()
        return x if features else self.c(self.b(x).relu())


@pytest.mark.parametrize("first", [0, 1])
def test_what_one_call_freezes_is_frozen(first: int) -> None:
    model, x = seeded(Hidden, 0), normal(2, 5)
    calls = [x, {"x": x, "features": True}]
    assert widths(depcut.analyze(model, x)) == {"a": 8, "b": 9}
    calls = calls[first:] + calls[:first]
    analysis, _ = check_calls(model, calls)
    assert widths(analysis) == {"b": 9}
    [reason] = [f for f in analysis.frozen if (f.tensor, f.dim) == ("a.weight", 0)]
    assert reason.reason == "model output"
    assert "self.a(x).relu()" in reason.where


# Lengths, sizes, masks ----------------------------------------------------------------------------


class Sizes(nn.Module):
    """Any image size; attributes supply widths, sizes the lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 2, 6
        self.patch, self.qkv = nn.Conv2d(3, 12, 2, 2), nn.Linear(12, 36)
        self.proj, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        x = x.transpose(1, 2).reshape(b, n, self.heads * self.dim)
        return self.head(self.proj(x).relu().mean(1))


def test_image_sizes() -> None:
    model = seeded(Sizes, 0)
    calls = [normal(2, 3, 8, 8), normal(3, 3, 4, 12)]
    analysis, slim = check_calls(model, calls, held=(2, 6))
    assert widths(analysis) == widths(depcut.analyze(model, calls[0]))
    assert not depcut.report(slim).generated
    assert slim(normal(2, 3, 6, 6)).shape == (2, 4)


class Masked(nn.Module):
    """Attention with and without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.parts())
        scores = q @ k.transpose(-1, -2) * 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -1e4)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def parts(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


def test_a_mask_and_none() -> None:
    model, x = seeded(Masked, 0), normal(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    check_calls(model, [{"x": x, "mask": mask}, (normal(2, 7, 8), None)], held=(3, 4))


class Length(nn.Module):
    """An attribute that is a width in one call and a length in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 6
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, *, crop: bool = False) -> Tensor:
        x = x[:, : self.n] if crop else x
        x = self.a(x).relu()
        return self.b(x if crop else x.reshape(x.shape[0], -1, self.n))


def test_an_attribute_that_two_calls_need_at_two_values_is_no_silent_error() -> None:
    model = seeded(Length, 0)
    calls = [normal(2, 9, 5), {"x": normal(2, 9, 5), "crop": True}]
    with refused_or_right("the whole model would have to be generated"):
        check_calls(model, calls)


class refused_or_right:  # noqa: N801 - used as a statement
    """Accepts a refusal by name; without one, what is inside has compared the values."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if isinstance(error, VerificationError):
            assert self.text in str(error)
            return True
        return False


class Typed(nn.Module):
    """A width that is typed into the code of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        x = self.a(x).relu()
        x = x.reshape(*x.shape[:-1], 3, 4)
        return self.b((x + x.flip(-1) if twice else x).flatten(-2))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = Typed(), nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Tanh()})

    def forward(self, x: Tensor, which: str = "a", *, twice: bool = False) -> Tensor:
        return self.after[which](self.inner(x, twice=twice))


class Scaled(nn.Module):
    """A width that the code uses as a number, where no tracing sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, *, scaled: bool = True) -> Tensor:
        x = self.a(x).relu()
        return self.b(x / float(str(self.a.out_features)) if scaled else x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Typed(), Scaled()

    def forward(self, x: Tensor, which: str = "a", *, scaled: bool = True) -> Tensor:
        return self.b(x, scaled=scaled) if which == "b" else self.a(x)


def test_code_that_only_a_later_call_runs_is_verified_too() -> None:
    model, x = seeded(Branches, 0), normal(2, 5)
    check_calls(model, [x, (x, "b")])
    with refused_or_right("b would have to be generated from its graph"):
        check_calls(model, [x, {"x": x, "which": "b", "scaled": False}, (x, "b")])


def test_code_with_a_typed_width_that_two_calls_run_alike() -> None:
    model, x = seeded(Holder, 0), normal(2, 5)
    check_calls(model, [x, (x, "b")])


def test_code_with_a_typed_width_that_two_calls_run_differently() -> None:
    model, x = seeded(Holder, 0), normal(2, 5)
    for calls in ([x, {"x": x, "twice": True}], [normal(2, 4, 5), normal(2, 6, 5)]):
        with refused_or_right("inner would have to be generated from its graph"):
            check_calls(model, calls)


class Normed(nn.Module):
    """Weight norm in a layer that all calls run and in one that only the second runs; constants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 9), nn.Linear(7, 3)
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(8, 9))
        self.c = nn.utils.parametrizations.weight_norm(nn.Linear(9, 7))

    def forward(self, x: Tensor, which: str = "a") -> Tensor:
        x = self.stem(x).relu()
        x = self.a(x) * torch.tensor([2.0]) if which == "a" else self.b(x) * torch.tensor([[3.0]])
        return self.head(self.c(x.relu()).relu())


def test_weight_norm_is_rescaled_once_whichever_call_runs_it() -> None:
    model, x = seeded(Normed, 0), normal(2, 5)
    # Zeros in a normed weight change its norm: only the captured graphs tell what is right.
    _, slim = check_calls(model, [x, (x, "b")], held=(7, 8, 9))
    assert not depcut.report(slim).generated


# Budgets, plans, other entries --------------------------------------------------------------------


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_budgets(of: str, allocation: str) -> None:
    analysis = analysed()
    plan = analysis.plan(0.5, of=of, allocation=allocation, align=1)
    removed = 1 - plan.keep().counts / np.array([g.size for g in analysis.groups])
    assert abs(getattr(plan, of) / getattr(analysis, of) / 0.5 - 1) <= 0.005
    assert removed[-1] > 0.1  # the arm that costs the first call nothing shrinks along


@pytest.mark.parametrize("score", ["taylor", "hessian", "grasp", "obs", "wanda"])
def test_units_that_the_data_does_not_reach_are_ranked_by_their_norms(score: str) -> None:
    analysis, data = analysed(), [(normal(4, 7), torch.tensor([0, 1, 2, 3]))]
    options: dict[str, Any] = {"of": "channels", "align": 1, "allocation": "uniform"}
    plain = analysis.plan(0.4, score="l2", **options).kept["arms.b.0"]
    plan = analysis.plan(
        0.4, data=data, loss=F.cross_entropy, score=score, progress=False, **options
    )
    assert plan.kept["arms.b.0"].tolist() == plain.tolist()


def test_data_goes_to_the_first_call() -> None:
    model, calls = arms()
    data = [normal(4, 7)]
    slim = depcut.shrink(model, 0.5, calls, data=data, align=1, progress=False)
    assert slim.arms["b"][0].out_features < 11
    left = depcut.report(slim).compensation.left
    assert "only other example calls" in left["arms.b.2"]
    calls[0] = {"x": calls[0], "which": "a"}
    with pytest.raises(InputError, match="an argument is 'b', the model was captured with 'a'"):
        depcut.shrink(model, 0.5, calls, data=[{"x": data[0], "which": "b"}], progress=False)


def test_items_of_data_that_are_lists_are_no_example_calls() -> None:
    model, x = seeded(Masked, 0), normal(4, 5, 8)
    items = [[x, torch.ones(4, 5, dtype=torch.bool)]]
    slim = depcut.shrink(model, 0.4, data=items, align=1, progress=False)
    assert slim(*items[0]).shape == (4, 5, 8)


def test_a_plan_keeps_its_calls_on_disk(tmp_path: Path) -> None:
    model, calls = analysed().model, analysed().inputs
    plan = analysed().plan(0.4, align=1)
    expected = plan.apply(model)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["inputs"]["kwargs"] == {}
    assert [c["kwargs"]["which"] for c in data["inputs"]["others"]] == ["b"]
    loaded = depcut.Plan.load(tmp_path / "plan.json")
    for slim in (loaded.apply(model), loaded.bind(model, calls).apply(model)):
        for example in calls:
            assert torch.equal(call(slim, example), call(expected, example))
    with pytest.raises(PlanError, match="another architecture"):
        loaded.apply(model, calls[0])
    del data["inputs"]["others"][0]["args"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="no plan can be read"):
        depcut.Plan.load(tmp_path / "plan.json")


def test_only_what_is_dead_in_every_call_is_compacted() -> None:
    model, calls = arms()
    with torch.no_grad():
        for tensor in (model.stem.weight[0], model.stem.bias[:1], model.norm.bias[:1]):
            tensor.zero_()  # its mean is subtracted: a constant that each arm reads
        model.norm.running_mean[0] = -1.0
        model.arms["a"][0].weight[2] = 0.0
        model.arms["b"][0].weight[3:5] = 0.0
        model.arms["a"][2].weight[1], model.arms["a"][2].bias[1] = 0.0, 0.7
        model.arms["b"][2].weight[1], model.arms["b"][2].bias[1] = 0.0, 0.4
    dead = depcut.compaction(model, calls)
    # Channel 1 of the arms is a constant in either call, but not the same one.
    assert dead.removed == {"stem": 1, "arms.a.0": 1, "arms.b.0": 2}
    slim = depcut.compact(model, calls)
    for example in calls:
        torch.testing.assert_close(call(slim, example), call(model, example))
    alone = depcut.compaction(model, calls[0])
    assert alone.removed["arms.a.2"] == 1


def test_gradual_masks_take_several_calls() -> None:
    model, calls = arms()
    gradual = depcut.training.Gradual(model, 0.4, calls, 0, 1, 1, align=1)
    assert not gradual.excluded


@pytest.mark.sweep
def test_turns_take_several_calls() -> None:
    model, calls = arms()
    run = depcut.training.iterate(model, 0.4, calls, steps=2, align=1, progress=False)
    assert run.model.arms["b"][0].out_features < 11
    for example in calls:
        assert call(run.model, example).shape == (2, 5)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda _: [], "inputs is an empty list"),
        (lambda _: [1, 2], "item 0 is of type int"),
        (lambda x: [x, 0.5], "item 1 is of type float"),
        (lambda x: [x, None], "item 1 is of type NoneType"),
        (lambda x: [x, [x]], "item 1 is of type list"),
        (lambda x: [x, ()], r"inputs\[1\]: inputs holds no tensor"),
        (lambda x: [x, {"y": x}], r"inputs\[1\]: the model does not take these inputs"),
    ],
)
def test_what_is_no_list_of_example_calls_is_refused_by_name(bad: Any, message: str) -> None:
    model, calls = arms()
    with pytest.raises(InputError, match=message):
        depcut.analyze(model, bad(calls[0]))


def test_a_call_that_the_model_does_not_run_is_named() -> None:
    model, calls = arms()
    with pytest.raises(CaptureError, match=r"inputs\[1\].*KeyError: 'c'"):
        depcut.analyze(model, [calls[0], {**calls[1], "which": "c"}])


def test_what_takes_one_call_refuses_several(tmp_path: Path) -> None:
    model, calls = arms()
    with pytest.raises(InputError, match="a list of 2 example calls, and one is wanted"):
        depcut.export(model, tmp_path / "model.onnx", calls)
    with pytest.raises(InputError, match="branches are dropped from the graph of one example call"):
        analysed().plan(0.5, depth=True)
    with pytest.raises(BudgetError):
        depcut.analyze(nn.Linear(3, 2), [normal(2, 3), (normal(2, 4, 3),)]).plan(0.5)


def test_a_list_of_one_is_one_call() -> None:
    model, calls = arms()
    analysis, alone = depcut.analyze(model, calls[:1]), depcut.analyze(model, calls[0])
    assert widths(analysis) == widths(alone) == {"stem": 8, "arms.a.0": 10, "arms.a.2": 6}
    assert analysis.macs == alone.macs == analysed().macs
    assert analysis.program.others == ()
    assert "no example call uses: arms.b.{0,2}.bias" in str(alone)
    assert alone.program.unused == {n for n in dict(model.named_parameters()) if ".b." in n}


# Random nets --------------------------------------------------------------------------------------


class Paths(nn.Module):
    """A pool of layers, and calls that run some of them: upper case runs a layer the other way."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        kinds = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(16, 8), nn.Linear(8, 16)]
        self.kinds = [int(k) for k in rng.integers(0, 4, 5)]
        self.pool = nn.ModuleList([deepcopy(kinds[k]) for k in self.kinds])
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, path: str = "") -> Tensor:
        x = self.stem(x).relu()
        for letter in path:
            number = "abcde".index(letter.lower())
            x = self.step(self.kinds[number], self.pool[number], x, letter.isupper())
        return self.head(x)

    def step(self, kind: int, layer: nn.Module, x: Tensor, other: bool) -> Tensor:
        if kind == 2:
            pair = [x, x.tanh()]
            return layer(torch.cat(pair[::-1] if other else pair, -1)).relu()
        if kind == 3:
            a, b = layer(x).chunk(2, -1)
            return b * a.sigmoid() if other else a * b.sigmoid()
        return layer(x) if other else x + layer(x).relu()


class Tokens(nn.Module):
    """A pool of blocks of a transformer, and calls that run some of them, at any length."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        kinds = [nn.LayerNorm(8), Attention(), nn.Linear(8, 8), nn.Linear(8, 20)]
        self.kinds = [int(k) for k in rng.integers(0, 4, 5)]
        self.pool = nn.ModuleList([deepcopy(kinds[k]) for k in self.kinds])
        self.stem, self.head, self.down = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(20, 8)

    def forward(self, x: Tensor, path: str, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x).relu()
        for letter in path:
            number = "abcde".index(letter)
            layer = self.pool[number]
            if self.kinds[number] == 1:
                x = x + layer(x, mask)
            elif self.kinds[number] == 3:
                x = x + self.down(F.gelu(layer(x)))
            else:
                x = layer(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, 6
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-1, -2) / 3
        if mask is not None:
            scores = scores.masked_fill(mask, -1e4)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(20))
def test_random_transformers_with_several_lengths_and_masks(seed: int) -> None:
    rng = np.random.default_rng(2000 + seed)
    model = seeded(lambda: Tokens(seed), seed)
    calls: list[Any] = []
    for number in range(int(rng.integers(2, 4))):
        path, length = "".join(rng.choice(list("abcde"), int(rng.integers(1, 6)))), 4 + 3 * number
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        calls.append((normal(2, length, 6), path, *([mask] if rng.integers(2) else [])))
    check_calls(model, calls, seed=seed, held=(2, 6, 8), tolerance=1e-4, preferred=True)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(40))
def test_random_nets_with_several_calls(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    model = seeded(lambda: Paths(seed), seed)
    calls: list[Any] = []
    for number in range(int(rng.integers(2, 5))):
        path = "".join(rng.choice(list("abcdeABCDE"), int(rng.integers(1, 6))))
        calls.append((normal(2 + number, 6), path))
    check_calls(model, calls, seed=seed, tolerance=1e-4)
