"""The smaller model: attributes, generated modules, tensors, and the optimizer's state."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, Block, attend, normal, seeded
from oracle import assert_untouched, outputs, random_keep, sliced, snapshot
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import depcut
from depcut.errors import InputError
from depcut.rewrite.build import rewrite
from depcut.rewrite.graph import GeneratedModule


def cut(model: nn.Module, inputs: Any, keep: dict[tuple[str, int], list[int]]) -> tuple[Any, Any]:
    """(slim, plan) that keeps these units of the groups that narrow a layer and have that size."""
    analysis = depcut.analyze(model, inputs)
    named = {}
    for (layer, size), units in keep.items():
        [group] = [g for g in analysis.groups if layer in g.layers and g.size == size]
        named[group.name] = units
    plan = analysis.plan_keeping(named)
    return plan.apply(model), plan


def cut_at_random(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, Any]:
    """(dense, slim, plan) of one of the structures."""
    net = NETS[name]
    model = net.build()
    analysis = depcut.analyze(model, net.inputs(2))
    plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(seed)))
    return model, plan.apply(model), plan


# Attributes --------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped, self.group = nn.Conv2d(12, 18, 1, groups=3), nn.GroupNorm(3, 18)
        self.up, self.norm = nn.ConvTranspose2d(18, 10, 2, 2), nn.LayerNorm(10)
        self.slope, self.linear = nn.PReLU(10), nn.Linear(10, 14)
        self.cell = nn.GRU(14, 7, batch_first=True)
        self.classifier = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.grouped(self.batch(self.conv(x))))
        x = self.slope(self.up(x)).flatten(2).transpose(1, 2)
        x = self.cell(self.linear(self.norm(x)))[0]
        return self.classifier(x)


def test_attributes_of_every_standard_layer_follow() -> None:
    model, inputs = seeded(Layers, 0), normal(2, 3, 4, 4)
    keep = {
        ("conv", 3): [0, 2],
        ("conv", 4): [0, 1, 3],
        ("grouped", 6): [1, 2, 4, 5],
        ("up", 10): [0, 3, 4, 8, 9],
        ("linear", 14): list(range(11)),
        ("cell", 7): [1, 3, 5, 6],
    }
    slim, _ = cut(model, inputs, keep)
    assert depcut.report(slim).generated == {}
    assert (slim.conv.in_channels, slim.conv.out_channels, slim.conv.groups) == (3, 6, 1)
    assert slim.batch.num_features == 6
    grouped = slim.grouped
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (6, 8, 2)
    assert (slim.group.num_channels, slim.group.num_groups) == (8, 2)
    assert (slim.up.in_channels, slim.up.out_channels) == (8, 5)
    assert slim.norm.normalized_shape == (5,)
    assert slim.slope.num_parameters == 5
    assert (slim.linear.in_features, slim.linear.out_features) == (5, 11)
    assert (slim.cell.input_size, slim.cell.hidden_size) == (11, 4)
    assert (slim.classifier.in_features, slim.classifier.out_features) == (4, 5)
    assert (model.grouped.groups, model.cell.hidden_size, model.norm.normalized_shape) == (
        3, 7, (10,),
    )  # fmt: skip
    assert "Conv2d(6, 8, kernel_size=(1, 1), stride=(1, 1), groups=2)" in repr(slim)


class Containers(nn.Module):
    """Sizes in a tuple, a list, a dict and an attribute that no size depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.parts = (-1, 4, 3), [4, 8]
        self.options = {"widths": [12, (2, 7)], "name": "net"}
        self.unrelated = 12
        self.first, self.left, self.right = nn.Linear(6, 12), nn.Linear(4, 9), nn.Linear(8, 7)
        self.second, self.classifier = nn.Linear(12, 12), nn.Linear(23, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.parts, -1)
        c = self.second(x.repeat(1, 2)).view(self.shape).flatten(1)
        y = self.right(b)
        y = y.view(-1, self.options["widths"][1][1])
        return self.classifier(torch.cat([self.left(a)[:, :4], y, c], -1))


def test_items_of_containers_follow_and_the_rest_stays() -> None:
    model = seeded(Containers, 0)
    containers = model.parts, model.options
    keep = {
        ("first", 4): [0, 2, 3],
        ("first", 8): [1, 2, 5, 6, 7],
        ("right", 7): [0, 6],
        ("second", 4): [1, 3],
        ("second", 3): [0, 2],
    }
    slim, _ = cut(model, normal(2, 6), keep)
    assert depcut.report(slim).generated == {}
    assert (slim.shape, slim.parts) == ((-1, 2, 2), [3, 5])
    assert slim.options == {"widths": [12, (2, 2)], "name": "net"}
    assert slim.unrelated == 12
    assert (model.shape, model.parts) == ((-1, 4, 3), [4, 8])
    assert model.options == {"widths": [12, (2, 7)], "name": "net"}
    assert model.parts is containers[0]
    assert model.options is containers[1]
    assert slim.parts is not model.parts


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.embed_dim = self.num_heads * self.head_dim
        self.q, self.k, self.v = (nn.Linear(10, self.embed_dim) for _ in range(3))
        self.out = nn.Linear(self.embed_dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, self.num_heads, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).transpose(1, 2).reshape(batch, length, self.embed_dim))


def test_heads_head_size_and_their_product_follow() -> None:
    model = seeded(lambda: Block(OwnAttention()), 0)
    analysis = depcut.analyze(model, normal(2, 5, 6))
    sizes = {3: [0, 2], 4: [1, 2, 3], 10: list(range(9))}
    plan = analysis.plan_keeping({g.name: sizes[g.size] for g in analysis.groups})
    slim = plan.apply(model)
    attention = slim.attention
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, 3, 6)
    assert depcut.report(slim).generated == {}
    assert type(attention) is OwnAttention


# Generated modules --------------------------------------------------------------------------------


def generated(plan: Any, slim: nn.Module) -> dict[str, GeneratedModule]:
    found = {n: m for n, m in slim.named_modules() if isinstance(m, GeneratedModule)}
    assert set(found) == set(depcut.report(slim).generated)
    return found


@pytest.mark.parametrize(
    ("name", "keep", "module", "reason"),
    [
        ("attention_typed_heads", {("attention.k", 3): [0, 2]}, "attention", "typed into the code"),
        ("attention_width_over_heads", {("embed", 10): [0, 3, 5]}, "attention", "computes"),
        ("attention_chunked", {("attention.qkv", 4): [0, 2]}, "attention", "implicit scale"),
        ("split_typed", {("stem.0", 4): [0, 2]}, "", "typed into the code"),
    ],
)
@pytest.mark.usefixtures("only_generated")
def test_what_a_class_cannot_express_is_generated_and_the_reason_recorded(
    name: str, keep: Any, module: str, reason: str
) -> None:
    net = NETS[name]
    model, inputs = net.build(), net.inputs(2)
    analysis = depcut.analyze(model, inputs)
    [((layer, size), units)] = keep.items()
    group = next(g for g in analysis.groups if layer in g.layers and g.size == size)
    family = [g for g in analysis.groups if g is group or g.tied == group.tied is not None]
    plan = analysis.plan_keeping({g.name: units for g in family})
    slim = plan.apply(model)
    found = generated(plan, slim)
    assert list(found) == [module]
    assert reason in depcut.report(slim).generated[module]
    original = model.get_submodule(module)
    assert found[module].replaces == f"{type(original).__module__}.{type(original).__qualname__}"
    assert found[module].replaces in repr(slim)


def test_a_plan_that_the_class_can_express_generates_nothing() -> None:
    net = NETS["attention_typed_heads"]
    model = net.build()
    slim, _ = cut(model, net.inputs(2), {("embed", 10): [0, 4, 5]})
    assert depcut.report(slim).generated == {}
    assert type(slim.attention) is type(model.attention)


GENERATED = [
    "attention_typed_heads",
    "attention_chunked",
    "split_typed",
    "repeat",
]


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.usefixtures("only_generated")
def test_generated_modules_keep_keys_and_take_any_batch(name: str) -> None:
    model, slim, plan = cut_at_random(name)
    assert generated(plan, slim)
    assert list(slim.state_dict()) == list(model.state_dict())
    assert [n for n, _ in slim.named_parameters()] == [n for n, _ in model.named_parameters()]
    full = NETS[name].inputs(5)
    expected = outputs(slim, full)[0]
    for batch in (1, 3, 5):
        made = outputs(slim, full[:batch])[0]
        torch.testing.assert_close(made, expected[:batch], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.usefixtures("only_generated")
def test_generated_modules_are_copied_and_loaded(name: str) -> None:
    _, slim, _ = cut_at_random(name)
    inputs = NETS[name].inputs(3)
    expected = outputs(slim, inputs)[0]
    twin = copy.deepcopy(slim)
    assert torch.equal(outputs(twin, inputs)[0], expected)
    assert not {p.data_ptr() for p in slim.parameters()} & {p.data_ptr() for p in twin.parameters()}
    file = io.BytesIO()
    torch.save(slim.state_dict(), file)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(outputs(twin, inputs)[0], expected)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(outputs(twin, inputs)[0], expected)


@pytest.mark.usefixtures("only_generated")
def test_a_copy_uses_its_own_weights() -> None:
    _, slim, _ = cut_at_random("split_typed")
    inputs = NETS["split_typed"].inputs(2)
    expected = outputs(slim, inputs)[0]
    with torch.no_grad():
        for p in copy.deepcopy(slim).parameters():
            p.zero_()
    assert torch.equal(outputs(slim, inputs)[0], expected)


class Flexible(nn.Module):
    """Arguments with defaults, and a width that is typed in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0, mask: Any = None) -> Tensor:
        z = self.first(x).view(-1, 3, 4).sigmoid().flatten(1) * scale
        z = z if mask is None else z * mask
        return self.second(z) + y


def flexible(inputs: Any) -> tuple[nn.Module, nn.Module]:
    model = seeded(Flexible, 0)
    slim, _ = cut(model, inputs, {("first", 3): [0, 2]})
    assert list(depcut.report(slim).generated) == [""]
    return model, slim


@pytest.mark.usefixtures("only_generated")
def test_arguments_are_passed_by_position_or_by_name() -> None:
    x, y = normal(3, 6), normal(3, 5)
    _, slim = flexible((x, y))
    expected = slim(x, y)
    for made in (slim(x, y=y), slim(x=x, y=y), slim(y=y, x=x), slim(y=y, x=x, mask=None)):
        assert torch.equal(made, expected)
    _, by_name = flexible({"y": y, "x": x})
    for made in (by_name(x=x, y=y), by_name(x, y=y), by_name(x, y)):
        assert torch.equal(made, expected)


@pytest.mark.usefixtures("only_generated")
def test_arguments_that_were_not_captured_are_refused() -> None:
    x, y = normal(3, 6), normal(3, 5)
    _, slim = flexible((x, y))
    for call in (lambda: slim(x), lambda: slim(x, y, mask=x), lambda: slim(x, y, None, x)):
        with pytest.raises(InputError, match="Flexible takes the arguments it was captured with"):
            call()


@pytest.mark.usefixtures("only_generated")
def test_a_number_that_was_captured_is_not_replaced_in_silence() -> None:
    x, y = normal(3, 6), normal(3, 5)
    model, slim = flexible((x, y, 2.0))
    assert torch.equal(slim(x, y, 2.0), slim(x, y, scale=2.0))
    assert not torch.equal(model(x, y, 3.0), model(x, y, 2.0))
    with pytest.raises(InputError):
        slim(x, y, 3.0)


class Regularised(nn.Module):
    """Everything that differs between training and evaluation, around a typed-in width."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.first, self.norm, self.drop = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(rate)
        self.second = nn.Linear(12, 5)
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("variance", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.first(x)), self.rate, self.training)
        x = F.batch_norm(x, self.mean, self.variance, training=self.training)
        return self.second(self.drop(x.view(-1, 3, 4).flatten(1)))


def slim_regularised(model: nn.Module) -> Any:
    slim, _ = cut(model, normal(4, 6), {("first", 3): [0, 2]})
    assert list(depcut.report(slim).generated) == [""]
    return slim


@pytest.mark.usefixtures("only_generated")
def test_generated_modules_honour_train_and_eval() -> None:
    slim = slim_regularised(seeded(Regularised, 0))
    x = normal(4, 6)
    assert torch.equal(slim(x), slim(x))
    slim.train()
    assert slim.drop.training
    assert not torch.equal(slim(x), slim(x))
    slim.eval()
    assert torch.equal(slim(x), slim(x))


@pytest.mark.usefixtures("only_generated")
def test_generated_modules_update_statistics_in_training_only() -> None:
    slim = slim_regularised(seeded(lambda: Regularised(0.0), 0))
    x = normal(4, 6)

    def statistics() -> list[Tensor]:
        return [slim.mean.clone(), slim.norm.running_mean.clone()]

    before = statistics()
    slim(x)
    assert all(map(torch.equal, before, statistics()))
    slim.train()(x)
    assert not any(map(torch.equal, before, statistics()))
    assert slim.mean.shape == (8,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("only_generated")
def test_the_mode_of_the_capture_is_kept(training: bool) -> None:
    model = seeded(Regularised, 0).train(training)
    model.drop.train(not training)
    slim = slim_regularised(model)
    assert (slim.training, slim.norm.training, slim.drop.training) == (
        training, training, not training,
    )  # fmt: skip


class TypedDropout(nn.Module):
    """Fused attention of two heads, typed into the code, that drops in training."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.p = nn.Linear(10, 30), 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:-1], 3, 2, 5).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p).mean(1)


class WithWeights(nn.Module):
    """`nn.MultiheadAttention` that returns its weights, before the fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(10, 2, dropout=0.1, batch_first=True)
        self.second, self.out = TypedDropout(), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(x + self.first(x, x, x)[0]))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.usefixtures("only_generated")
def test_generated_attention_drops_in_training_only(before: bool) -> None:
    make = WithWeights if before else TypedDropout
    model = seeded(make, 0)
    name = "second" if before else ""
    slim, _ = cut(model, normal(2, 5, 10), {(f"{name}.qkv".lstrip("."), 2): [1]})
    assert list(depcut.report(slim).generated) == [name]
    if before:
        slim.first.dropout = 0.0
    x = normal(2, 5, 10)
    assert torch.equal(slim(x), slim(x))
    assert not torch.equal(slim.train()(x), slim(x))
    assert torch.equal(slim.eval()(x), slim(x))


@pytest.mark.usefixtures("only_generated")
def test_hooks_stay_and_children_are_called() -> None:
    net = NETS["attention_typed_heads"]
    model, calls = net.build(), []
    for name in ("attention", "attention.q", "attention.out"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, _args, _out, n=name: calls.append((n, m)))
        module.register_forward_pre_hook(lambda m, _args, n=name: calls.append((f"{n} pre", m)))
    analysis = depcut.analyze(model, net.inputs(2))
    plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(0)))
    slim = plan.apply(model)
    calls.clear()
    slim(net.inputs(2))
    assert [name for name, _ in calls] == [
        "attention pre", "attention.q pre", "attention.q", "attention.out pre", "attention.out",
        "attention",
    ]  # fmt: skip
    assert all(module in set(slim.modules()) for _, module in calls)
    slim.attention.q = nn.Linear(*reversed(slim.attention.q.weight.shape))
    changed = outputs(slim, net.inputs(2))[0]
    assert not torch.equal(changed, outputs(plan.apply(model), net.inputs(2))[0])


@pytest.mark.usefixtures("only_generated")
def test_generated_code_can_be_read() -> None:
    net = NETS["attention_typed_heads"]
    slim, _ = cut(net.build(), net.inputs(2), {("attention.k", 3): [0, 2]})
    code = slim.attention.code
    assert code.strip().startswith("def forward(self, in_0")
    assert all(f"self.{name}(" in code for name in ("q", "k", "v", "out"))
    assert "-1, 2, 4]" in code
    assert "-1, 8]" in code
    compile(code.strip(), "code", "exec")


@pytest.mark.parametrize("name", ["attention_typed_heads", "attention_chunked"])
@pytest.mark.usefixtures("only_generated")
def test_a_model_with_a_generated_module_is_exported(name: str, tmp_path: Path) -> None:
    _, slim, plan = cut_at_random(name)
    assert generated(plan, slim)
    inputs = NETS[name].inputs(3)
    exported = torch.export.export(
        slim, (inputs,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}, strict=False
    )
    for batch in (2, 4):
        made = exported.module()(NETS[name].inputs(batch))
        torch.testing.assert_close(made, slim(NETS[name].inputs(batch)), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        depcut.export(slim, tmp_path / "slim.onnx", inputs)
    assert (tmp_path / "slim.onnx").stat().st_size > 1000


@pytest.mark.usefixtures("only_generated")
def test_a_model_generated_as_a_whole_is_exported(tmp_path: Path) -> None:
    _, slim, plan = cut_at_random("split_typed")
    assert list(generated(plan, slim)) == [""]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        depcut.export(slim, tmp_path / "slim.onnx", NETS["split_typed"].inputs(3))
    assert (tmp_path / "slim.onnx").exists()


@pytest.mark.usefixtures("only_generated")
def test_a_generated_module_can_be_shrunk_again() -> None:
    net = NETS["attention_typed_heads"]
    slim, _ = cut(net.build(), net.inputs(2), {("attention.k", 3): [0, 2]})
    again, _ = cut(slim, net.inputs(2), {("attention.k", 2): [1]})
    assert again.attention.out.in_features == 4
    assert "-1, 1, 4]" in again.attention.code


# Tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied_embedding", "causal_decoder", "module_under_two_names"])
def test_tied_parameters_stay_tied(name: str) -> None:
    model, slim, _ = cut_at_random(name)
    for kind in (dict, copy.copy):
        dense = kind(dict(model.named_parameters(remove_duplicate=False)))
        narrow = dict(slim.named_parameters(remove_duplicate=False))
        for a in dense:
            for b in dense:
                assert (dense[a] is dense[b]) == (narrow[a] is narrow[b])
    assert len(list(slim.parameters())) < len(narrow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_data_types_are_kept(dtype: torch.dtype) -> None:
    model = NETS["residual"].build().to(dtype)
    slim, _ = cut(model, normal(2, 3, 8, 8).to(dtype), {("stem.0", 8): [0, 1, 2, 5]})
    for name, tensor in slim.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
    assert slim.stem[0].weight.dtype == dtype


def test_gradient_flags_and_leaves_are_kept() -> None:
    model = NETS["residual"].build()
    model.conv1[0].weight.requires_grad_(False)
    model.stem[1].bias.requires_grad_(False)
    model(normal(2, 3, 8, 8)).sum().backward()
    slim, _ = cut(model, normal(2, 3, 8, 8), {("stem.0", 8): [0, 1], ("conv1.0", 12): [3, 4]})
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in slim.named_parameters()} == flags
    assert set(flags.values()) == {True, False}
    assert all(p.is_leaf for p in slim.parameters())
    for p in slim.parameters():
        assert p.grad is None or p.grad.shape == p.shape


def test_channels_last_is_kept() -> None:
    model = NETS["residual"].build().to(memory_format=torch.channels_last)
    slim, _ = cut(model, normal(2, 3, 8, 8), {("stem.0", 8): [0, 1, 4], ("conv1.0", 12): [3, 4, 5]})
    for name in ("stem.0", "conv1.0", "conv2.0"):
        weight = slim.get_submodule(name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm_hook"])
def test_the_kept_part_of_a_normalised_weight_is_what_it_was(name: str) -> None:
    net = NETS[name]
    model = net.build()
    slim, plan = cut(model, net.inputs(2), {("0", 8): [0, 2, 3, 7]})
    slim(net.inputs(2))
    torch.testing.assert_close(slim[0].weight, model[0].weight[[0, 2, 3, 7]])
    torch.testing.assert_close(slim[2].weight, model[2].weight[:, [0, 2, 3, 7]])
    magnitude = next(n for n, _ in model.named_parameters() if n.endswith(("original0", "_g")))
    assert plan.tensor_indices()[magnitude][0].tolist() == [0, 2, 3, 7]


def test_attributes_of_parameters_are_kept() -> None:
    model = NETS["residual"].build()
    model.stem[0].weight.decay, model.stem[0].weight.names_of = 0.1, ["a"]
    model.head.classifier.bias.decay = 0.2
    slim, _ = cut(model, normal(2, 3, 8, 8), {("stem.0", 8): [0, 1]})
    assert (slim.stem[0].weight.decay, slim.stem[0].weight.names_of) == (0.1, ["a"])
    assert slim.stem[0].weight.names_of is not model.stem[0].weight.names_of
    assert slim.head.classifier.bias.decay == 0.2


class Special(nn.Parameter):
    """What quantisation and sharding libraries make of parameters."""


def test_the_class_of_a_parameter_is_kept() -> None:
    model = NETS["residual"].build()
    model.stem[0].weight = Special(model.stem[0].weight.detach())
    model.head.classifier.bias = Special(model.head.classifier.bias.detach())
    slim, _ = cut(model, normal(2, 3, 8, 8), {("stem.0", 8): [0, 1]})
    assert type(slim.head.classifier.bias) is Special
    assert type(slim.stem[0].weight) is Special


def test_attributes_of_the_model_are_copied() -> None:
    model = NETS["residual"].build()
    model.notes = {"labels": ["cat", "dog"]}
    slim, _ = cut(model, normal(2, 3, 8, 8), {("stem.0", 8): [0, 1]})
    assert slim.notes == model.notes
    assert slim.notes is not model.notes


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
        for made in tree_leaves(out):
            if is_tensor(made) and made.untyped_storage().data_ptr() not in aliases:
                self.elements = max(self.elements, made.numel())
        return out


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def test_no_dense_tensor_is_copied_on_the_way() -> None:
    model = nn.Sequential(nn.Linear(32, 200), nn.ReLU(), nn.Linear(200, 300), nn.Linear(300, 5))
    model[0].weight.grad = torch.zeros(200, 32)
    analysis = depcut.analyze(model.eval(), normal(2, 32))
    plan = analysis.plan(0.75, of="channels", align=1, ignore=[])
    with Largest() as largest:
        slim = rewrite(model, plan.keep()).model
    dense = max(p.numel() for p in model.parameters())
    assert dense == 300 * 200
    assert max(p.numel() for p in slim.parameters()) == 75 * 50
    assert largest.elements <= 75 * 200


def test_slim_tensors_own_exactly_their_memory() -> None:
    model, slim, _ = cut_at_random("vision_transformer")
    theirs = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert slim.state_dict().keys() == model.state_dict().keys()
    for name, tensor in slim.state_dict().items():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size(), name
        assert storage.data_ptr() not in theirs, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_stays_there() -> None:
    for name in ("residual", "attention_typed_heads", "window_attention", "lstm"):
        net = NETS[name]
        model = net.build().cuda()
        optimizer = trained(model, net.inputs(2).cuda(), torch.optim.AdamW)
        slim = depcut.shrink(model, 0.3, net.inputs(2), align=1, optimizer=optimizer)
        assert {t.device.type for t in slim.state_dict().values()} == {"cuda"}
        states = [t for s in optimizer.state.values() for t in s.values() if is_tensor(t)]
        assert all(t.is_cuda for t in states if t.dim())
        slim(net.inputs(3).cuda()).sum().backward()
        optimizer.step()
        on_cpu = depcut.shrink(net.build(), 0.3, net.inputs(2), align=1)
        assert [p.shape for p in on_cpu.parameters()] == [p.shape for p in slim.parameters()]


# Optimizers --------------------------------------------------------------------------------------


Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


def trained(model: nn.Module, inputs: Tensor, make: Make) -> torch.optim.Optimizer:
    """An optimizer after two steps."""
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def held(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["residual", "tied_embedding", "attention_typed_heads"])
def test_state_is_sliced_like_its_parameter_and_trains_on(kind: str, name: str) -> None:
    net = NETS[name]
    model, inputs = net.build(), net.inputs(2)
    optimizer = trained(model, inputs, OPTIMIZERS[kind])
    dense = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    before = snapshot(model)
    analysis = depcut.analyze(model, inputs)
    plan = analysis.plan_keeping(random_keep(analysis, np.random.default_rng(2)))
    slim = plan.apply(model, optimizer=optimizer)
    indices = plan.tensor_indices()
    assert [id(p) for p in held(optimizer)] == [id(p) for p in slim.parameters()]
    for tensor_name, parameter in slim.named_parameters():
        state = optimizer.state[parameter]
        assert set(state) == set(dense[tensor_name])
        for key, value in dense[tensor_name].items():
            if isinstance(value, Tensor) and value.dim():
                assert torch.equal(state[key], sliced(value, indices[tensor_name]))
                assert state[key].data_ptr() != value.data_ptr()
            else:
                assert state[key] == value
    weights = [p.detach().clone() for p in slim.parameters()]
    optimizer.zero_grad()
    slim(inputs).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in slim.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(weights, slim.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert_untouched(model, before)


def test_parameter_groups_keep_their_order_and_options() -> None:
    model = NETS["residual"].build()
    foreign = nn.Parameter(torch.ones(3))
    options = [
        {"params": [model.head.classifier.weight, foreign], "lr": 0.5},
        {"params": list(model.stem.parameters()), "weight_decay": 0.25},
    ]
    optimizer = torch.optim.SGD(options, 0.1, momentum=0.9)
    foreign.grad = torch.ones(3)
    optimizer.step()
    kept = optimizer.state[foreign]["momentum_buffer"]
    analysis = depcut.analyze(model, normal(2, 3, 8, 8))
    plan = analysis.plan_keeping({g.name: [0, 1] for g in analysis.groups})
    slim = plan.apply(model, optimizer=optimizer)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], second["weight_decay"]) == (0.5, 0.1, 0.25)
    assert first["params"][0] is slim.head.classifier.weight
    assert first["params"][1] is foreign
    assert optimizer.state[foreign]["momentum_buffer"] is kept
    assert all(a is b for a, b in zip(second["params"], slim.stem.parameters(), strict=True))


def test_an_optimizer_that_never_stepped() -> None:
    model = NETS["residual"].build()
    optimizer = torch.optim.Adam(model.parameters())
    slim = depcut.shrink(model, 0.4, normal(2, 3, 8, 8), align=1, optimizer=optimizer)
    assert not optimizer.state
    assert [id(p) for p in held(optimizer)] == [id(p) for p in slim.parameters()]


class Factored(torch.optim.SGD):
    """Keeps one number a row, as Adafactor does."""

    def step(self, closure: Any = None) -> Any:
        for p in held(self):
            self.state[p]["row"] = torch.ones(p.shape[:1] + (1,) * (p.dim() - 1) + (1,))
        return super().step(closure)


@pytest.mark.parametrize("make", [lambda p: Factored(p, 0.1), torch.optim.Adafactor])
def test_state_of_another_shape_is_refused_and_nothing_changes(make: Make) -> None:
    model, inputs = NETS["residual"].build(), normal(2, 3, 8, 8)
    optimizer = trained(model, inputs, make)
    before = snapshot(model)
    parameters = [id(p) for p in held(optimizer)]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError) as caught:
        depcut.shrink(model, 0.4, inputs, align=1, optimizer=optimizer)
    assert "weight" in str(caught.value)
    assert "optimizer=" in str(caught.value.remedy)
    assert_untouched(model, before)
    assert [id(p) for p in held(optimizer)] == parameters
    assert str(optimizer.state_dict()) == str(state)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = NETS["residual"].build()
    optimizer = torch.optim.Adam(NETS["residual"].build().parameters())
    before = [id(p) for p in held(optimizer)]
    with pytest.raises(InputError, match="holds no parameter of the model"):
        depcut.shrink(model, 0.4, normal(2, 3, 8, 8), align=1, optimizer=optimizer)
    assert [id(p) for p in held(optimizer)] == before


def test_what_is_no_optimizer_is_refused() -> None:
    model = NETS["residual"].build()
    with pytest.raises(InputError):
        depcut.shrink(model, 0.4, normal(2, 3, 8, 8), align=1, optimizer="adam")  # type: ignore


class Cached(nn.Module):
    """Keeps what it computes from a parameter in a dict, as some attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale * 2
        return self.last(self.first(x) * self.cache["scale"])


def test_a_cache_of_an_earlier_forward_neither_hides_a_parameter_nor_is_copied() -> None:
    model, x = Cached(), torch.randn(2, 6)
    model(x)
    before = dict(model.cache)
    slim = depcut.shrink(model, 0.5, x, align=1)
    assert len(slim.scale) == slim.first.out_features < 8
    assert slim(x).shape == (2, 5)
    assert model.cache.keys() == before.keys()
    assert model.cache["scale"] is before["scale"]
