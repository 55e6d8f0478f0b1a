"""Capture: where literals come from, what is restored, which inputs are inferred, how often."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nets import NETS, normal
from oracle import assert_untouched, outputs, snapshot
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import depcut
from depcut.capture.capture import capture
from depcut.capture.inputs import infer_inputs, normalize
from depcut.capture.program import Program
from depcut.capture.provenance import Traced, TracedFloat, literals_of
from depcut.errors import CaptureError, InputError
from depcut.plan.attributes import by_path
from depcut.plan.keep import Keep
from depcut.reference.run import Reference

HEADS = ("attr", "attention", ("heads",))

# Ints that remember ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "compute"),
    [
        ("+", operator.add),
        ("-", operator.sub),
        ("*", operator.mul),
        ("//", operator.floordiv),
        ("%", operator.mod),
        ("/", operator.truediv),
        ("**", operator.pow),
    ],
)
def test_a_traced_int_survives_arithmetic_on_either_side(
    symbol: str, compute: Callable[[Any, Any], Any]
) -> None:
    a, b = Traced(7, HEADS), Traced(3, ("size", 0, 1))
    for left, right, expr in [
        (a, b, (symbol, HEADS, ("size", 0, 1))),
        (a, 2, (symbol, HEADS, 2)),
        (20, a, (symbol, 20, HEADS)),
        (a, 0.5, (symbol, HEADS, 0.5)),
        (TracedFloat(1.5, HEADS), a, (symbol, HEADS, HEADS)),
        (1.5, TracedFloat(0.5, HEADS), (symbol, 1.5, HEADS)),
    ]:
        made = compute(left, right)
        plain = [float(v) if isinstance(v, float) else int(v) for v in (left, right)]
        assert (made, made.expr) == (compute(*plain), expr)


def test_a_chain_of_operations_is_one_expression() -> None:
    made = (Traced(6, HEADS) * 4 + 1) // 5
    assert (made, made.expr) == (5, ("//", ("+", ("*", HEADS, 4), 1), 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: -t,
        int,
        float,
        copy.copy,
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),  # noqa: S301 - our own bytes
        lambda t: copy.deepcopy({"heads": [t]})["heads"][0],
    ],
)
def test_a_traced_int_turns_plain(make: Callable[[Traced], Any]) -> None:
    assert type(make(Traced(4, HEADS))) in (int, float)
    assert make(Traced(4, HEADS)) == make(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, float])
def test_copies_of_traced_floats_are_plain(make: Callable[[float], float]) -> None:
    assert type(make(TracedFloat(0.25, HEADS))) is float
    assert pickle.loads(pickle.dumps(TracedFloat(0.25, HEADS))) == 0.25  # noqa: S301 - ours


@pytest.mark.parametrize(
    "compute", [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]
)
def test_a_traced_int_gives_way_to_a_symbolic_one(compute: Callable[[Any, Any], Any]) -> None:
    symbol = ShapeEnv().create_unbacked_symint()
    assert type(compute(symbol, Traced(4, HEADS))) is torch.SymInt
    assert type(compute(Traced(4, HEADS), symbol)) is torch.SymInt


# Provenance --------------------------------------------------------------------------------------


class Views(nn.Module):
    """Every way in which a size may reach a view."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 3, 4
        self.same, self.equal = 4, 4
        self.pair, self.options = (2, 6), {"sizes": [4, 3]}
        self.inner = Inner()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        n = x.shape[0]
        return {
            "attributes": x.view(n, self.heads, self.dim),
            "product": self.inner(x),
            "path": x.view(n, self.pair[0], self.options["sizes"][1], 2),
            "typed": x.reshape(n, 3, 4),
            "mixed": x.reshape(n, 3, self.dim),
            "attribute_first": x.new_zeros(n, self.same, 4, 4),
            "attribute_last": x.new_zeros(n, 4, 4, self.same),
            "two_attributes": x.new_zeros(n, self.equal, 4, self.same),
            "size": x.view(n, self.heads, x.shape[1] // self.heads),
            "split": x.split(self.pair[1], 1)[0],
            "slice": x[:, : self.dim],
            "scale": x * (self.dim * x.shape[1]) ** -0.5,
            "root": x / math.sqrt(self.heads),
        }


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 1, self.heads * self.dim)


@pytest.fixture(scope="module")
def views() -> Program:
    return capture(Views(), normal(2, 12))


def behind(program: Program, which: str) -> fx.Node:
    """The node that computes an output."""
    node = program.outputs[list(Views()(normal(2, 12))).index(which)]
    return node.args[0] if node.target is operator.getitem else node


def provenance(program: Program, which: str) -> dict[Any, Any]:
    """Provenance of the int arguments of the node behind an output, by path."""
    return by_path(behind(program, which))


def attr(*path: Any, module: str = "") -> tuple[Any, ...]:
    return ("attr", module, path)


def test_attributes_supply_literals_by_name(views: Program) -> None:
    assert provenance(views, "attributes") == {(1, 1): attr("heads"), (1, 2): attr("dim")}


def test_arithmetic_on_attributes_of_a_submodule(views: Program) -> None:
    expr = ("*", attr("heads", module="inner"), attr("dim", module="inner"))
    assert provenance(views, "product") == {(1, 1): None, (1, 2): expr}


def test_items_of_containers_supply_literals_by_path(views: Program) -> None:
    found = provenance(views, "path")
    assert found[1, 1] == attr("pair", 0)
    assert found[1, 2] == attr("options", "sizes", 1)
    assert found[1, 3] is None


def test_typed_in_numbers_have_no_provenance(views: Program) -> None:
    assert set(provenance(views, "typed").values()) <= {None}
    assert provenance(views, "mixed") == {(1, 1): None, (1, 2): attr("dim")}


def test_equal_values_are_told_apart_by_position(views: Program) -> None:
    first, last = provenance(views, "attribute_first"), provenance(views, "attribute_last")
    assert [first[1, i] for i in (1, 2, 3)] == [attr("same"), None, None]
    assert [last[1, i] for i in (1, 2, 3)] == [None, None, attr("same")]
    both = provenance(views, "two_attributes")
    assert [both[1, i] for i in (1, 2, 3)] == [attr("equal"), None, attr("same")]


def test_sizes_of_tensors_are_told_from_typed_in_numbers(views: Program) -> None:
    found = provenance(views, "size")
    assert found[1, 1] == attr("heads")
    operation, (kind, number, dim), divisor = found[1, 2]
    assert (operation, kind, dim, divisor) == ("//", "size", 1, attr("heads"))
    assert views.marks[number] is views.inputs[0]


def test_splits_and_slices_know_their_attribute(views: Program) -> None:
    assert attr("pair", 1) in provenance(views, "split").values()
    assert attr("dim") in provenance(views, "slice").values()


def test_floats_computed_from_sizes_keep_their_provenance(views: Program) -> None:
    (value, expr), (root, of_root) = (
        literals_of(behind(views, which))[-1] for which in ("scale", "root")
    )
    power, (times, dim, (kind, _, which)), exponent = expr
    assert (power, times, dim, kind, which, exponent) == ("**", "*", attr("dim"), "size", 1, -0.5)
    assert value == 48**-0.5
    assert (root, of_root) == (math.sqrt(3), ("**", attr("heads"), 0.5))


# The model afterwards ----------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    """All ints and floats in a value, in containers too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)


def assert_plain(model: nn.Module) -> None:
    for module in model.modules():
        for key, value in vars(module).items():
            assert all(type(n) in (int, float) for n in numbers(value)), key


class FailsLate(Views):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        raise RuntimeError("too late")


@pytest.mark.parametrize("kind", [Views, FailsLate])
def test_attributes_are_plain_and_the_same_objects_again(kind: type[nn.Module]) -> None:
    model = kind()
    options, pair = model.options, model.pair
    before = snapshot(model)
    try:
        capture(model, normal(2, 12))
    except CaptureError:
        assert kind is FailsLate
    else:
        assert kind is Views
    assert_untouched(model, before)
    assert_plain(model)
    assert model.options is options
    assert model.pair is pair
    assert type(Views()(normal(2, 12))["attributes"].shape[1]) is int


@pytest.mark.parametrize("kind", [Views, FailsLate])
def test_square_roots_are_traced_during_the_capture_only(kind: type[nn.Module]) -> None:
    before = math.sqrt
    try:
        capture(kind(), normal(2, 12))
    except CaptureError:
        assert kind is FailsLate
    assert math.sqrt is before


class KeepsNotes(nn.Module):
    """Its forward writes numbers into itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counts()
        self.classifier = nn.Linear(12, 5)
        self.steps = 7

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return self.classifier(self.inner(x))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.width, self.calls = nn.Linear(6, 12), 12, 7

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last_width = self.width * 2
        return self.linear(x).view(-1, self.width)


def test_numbers_that_forward_writes_into_the_model_are_plain_and_gone() -> None:
    model = KeepsNotes()
    before = snapshot(model)
    capture(model, normal(2, 6))
    assert_plain(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", [Views, FailsLate])
def test_modes_hooks_and_flags_are_restored(kind: type[nn.Module]) -> None:
    model = kind().train()
    model.inner.eval()
    model.inner.register_forward_hook(lambda *_: None)
    fast = torch.backends.mha.get_fastpath_enabled()
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            capture(model, normal(2, 12))
        except CaptureError:
            assert kind is FailsLate
        finally:
            assert torch.backends.mha.get_fastpath_enabled() is enabled
            torch.backends.mha.set_fastpath_enabled(fast)
    assert (model.training, model.inner.training) == (True, False)
    assert [len(m._forward_hooks) for m in model.modules()] == [0, 1]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == [0, 0]
    assert torch.is_grad_enabled()


# Inputs ------------------------------------------------------------------------------------------


def then_linear(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)), (2, 6)),
        (then_linear(nn.Linear(6, 4), features=64), (2, 16, 6)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3)), (2, 3, 224)),
        (then_linear(nn.Conv1d(2, 4, 1), features=4 * 64), (2, 2, 64)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3)), (2, 1, 224, 224)),
        (then_linear(nn.Conv2d(3, 4, 3), features=4 * 26 * 26), (2, 3, 28, 28)),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 5, 3)), (2, 2, 32, 32, 32)),
        (then_linear(nn.Conv3d(2, 4, 1), features=4 * 16**3), (2, 2, 16, 16, 16)),
        (nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 5)), (2, 16)),
        (then_linear(nn.Embedding(20, 4), features=4 * 32), (2, 32)),
    ],
)
def test_inputs_follow_from_the_first_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    made = infer_inputs(model)
    assert isinstance(made, Tensor)
    assert tuple(made.shape) == shape
    model(made)


def test_inferred_inputs_have_the_weights_type_and_the_vocabulary() -> None:
    assert infer_inputs(nn.Sequential(nn.Linear(6, 5)).double()).dtype == torch.float64
    assert infer_inputs(nn.Sequential(nn.Linear(6, 5)).bfloat16()).dtype == torch.bfloat16
    ids = infer_inputs(nn.Sequential(nn.Embedding(3, 5)))
    assert ids.dtype == torch.int64
    assert set(ids.flatten().tolist()) == {0, 1, 2}


def test_inference_leaves_modes_and_statistics_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = snapshot(model)
    infer_inputs(model)
    assert_untouched(model, before)
    assert (model.training, model[1].training) == (True, False)


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x * mask)


@pytest.mark.parametrize(
    ("model", "keywords"),
    [
        (TwoArguments(), ["(2, 6)", "(2, 16, 6)", "TwoArguments"]),
        (then_linear(nn.Conv2d(3, 4, 3), features=7), ["224", "512", "Sequential"]),
        (nn.Sequential(nn.LSTM(6, 5)), ["no Conv, Linear or Embedding"]),
    ],
)
def test_inputs_that_stay_open_are_asked_for(model: nn.Module, keywords: list[str]) -> None:
    with pytest.raises(InputError, match="pass a tensor, a tuple") as caught:
        infer_inputs(model)
    assert all(word in str(caught.value) for word in keywords)


class WithDummyInputs(nn.Module):
    """What transformers' models offer."""

    dummy_inputs = {"input_ids": torch.tensor([[7, 6, 0], [1, 200, 3]])}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 20})()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


def test_dummy_inputs_come_first_and_stay_within_the_vocabulary() -> None:
    args, kwargs = normalize(WithDummyInputs(), None)
    assert args == ()
    assert kwargs["input_ids"].tolist() == [[7, 6, 0], [1, 0, 3]]


def test_the_dummy_inputs_of_a_transformers_model() -> None:
    pytest.importorskip("transformers")
    from zoo import libraries

    library = libraries()["transformers"]
    config = library.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = library.BertModel(config).eval()
    slim = depcut.shrink(model, 0.3, align=1)
    assert type(slim) is type(model)
    made = depcut.analyze(model).program.kwargs
    assert made.keys() >= model.dummy_inputs.keys()
    assert made["use_cache"] is False
    assert torch.equal(made["attention_mask"], torch.ones_like(made["input_ids"]))


@pytest.mark.parametrize(
    "inputs", [normal(1, 6), (normal(1, 6),), [normal(1, 6)], {"input": normal(1, 6)}]
)
def test_a_batch_of_one_is_doubled(inputs: Any) -> None:
    program = capture(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)), inputs)
    [example] = [*program.args, *program.kwargs.values()]
    assert torch.equal(example, normal(1, 6).repeat(2, 1))
    assert (program.dynamic, program.batch) == (True, 2)


def test_what_is_no_batch_is_not_doubled() -> None:
    model = nn.Linear(6, 5)
    flag = torch.ones(1)
    (x, same, number), _ = normalize(model, (normal(3, 6), flag, 4))
    assert (x.shape, same.shape, number) == ((3, 6), (1,), 4)


# The graph ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autocast_off", "autocast_on", "no_grad_region"])
def test_wrapped_regions_are_inlined_and_compute_the_same(name: str) -> None:
    net = NETS[name]
    model, inputs = net.build(), net.inputs(3)
    analysis = depcut.analyze(model, inputs)
    targets = {str(n.target) for n in analysis.program.graph.graph.nodes}
    assert not any("wrap_with" in t for t in targets)
    assert {"aten.gelu.default", "aten.linear.default"} <= targets
    made, _ = Reference(Keep(analysis.coupling, {}), model).run([inputs])
    torch.testing.assert_close(made, outputs(model, inputs), rtol=0, atol=0)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoArguments()
        self.twice = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.inner(x, mask=x.sigmoid())))


def test_module_calls_are_recorded_in_order_with_their_nodes() -> None:
    program = capture(Calls(), normal(2, 6))
    names = [call.module for call in program.calls]
    assert names == ["inner.linear", "inner", "twice", "twice"]
    linear, inner, first, second = program.calls
    assert len(inner.leaves) == 2
    assert inner.leaves[0] is program.inputs[0]
    assert isinstance(inner.leaves[1], fx.Node)
    assert "sigmoid" in str(inner.leaves[1].target)
    assert linear.out_leaves == inner.out_leaves == first.leaves
    assert first.out_leaves == second.leaves
    assert second.out_leaves == tuple(program.outputs)


# How often ---------------------------------------------------------------------------------------


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry a call of torch.export.export."""
    made: list[str] = []
    export = torch.export.export

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made.append(type(module).__name__)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return made


@pytest.mark.parametrize("name", ["residual", "vision_transformer"])
def test_a_model_is_exported_once(exports: list[str], name: str) -> None:
    net = NETS[name]
    depcut.shrink(net.build(), 0.3, net.inputs(2), align=1)
    assert len(exports) == 1


def test_a_model_whose_code_is_patched_is_exported_twice(exports: list[str]) -> None:
    """Once more to see which numbers its code gets wrong at the new sizes."""
    net = NETS["attention_typed_heads"]
    slim = depcut.shrink(net.build(), 0.3, net.inputs(2), align=1)
    assert set(depcut.report(slim).patched) == {"attention"}
    assert len(exports) == 2


def test_a_model_with_parts_for_training_is_exported_twice(exports: list[str]) -> None:
    net = NETS["training_only_head"]
    depcut.shrink(net.build(), 0.3, net.inputs(2), align=1)
    assert len(exports) == 2


def test_a_plan_for_another_instance_exports_it_once(exports: list[str]) -> None:
    net = NETS["mlp"]
    plan = depcut.analyze(net.build(), net.inputs(2)).plan(0.3, align=1)
    plan.apply(net.build())
    assert len(exports) == 2


def test_parts_that_run_only_in_training_narrow_along() -> None:
    net = NETS["training_only_head"]
    model, inputs = net.build(), net.inputs(4)
    analysis = depcut.analyze(model, inputs)
    stem = next(g for g in analysis.groups if g.size == 8)
    slim = analysis.plan_keeping({stem.name: [1, 4, 6]}).apply(model)
    kept = model.auxiliary.classifier.weight[:, [1, 4, 6]]
    assert torch.equal(slim.auxiliary.classifier.weight, kept)
    main, auxiliary = slim.train()(inputs)
    assert (main.shape, auxiliary.shape) == ((4, 5), (4, 5))
    (main.sum() + auxiliary.sum()).backward()
    assert slim.auxiliary.classifier.weight.grad.shape == (5, 3)


def test_parts_that_run_only_in_training_do_not_count_as_macs() -> None:
    net = NETS["training_only_head"]
    model = net.build()
    dense = depcut.analyze(model, net.inputs(2)).macs
    model.auxiliary = nn.Identity()
    assert dense == depcut.analyze(model, net.inputs(2)).macs


def test_inference_of_inputs_reports_no_failed_attempts(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 6), nn.Linear(6, 3)
    )
    assert depcut.analyze(model).program.args[0].shape == (2, 1, 28, 28)
    assert capfd.readouterr() == ("", "")


class Hooking(nn.Module):
    """Installs a hook on a child at its first forward and remembers that, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "installed"):
            self.first.register_forward_hook(lambda module, args, result: result * 2)
            self.installed = True
        return self.last(self.first(x))


def test_hooks_that_forward_installs_are_gone_with_the_flag_that_remembers_them() -> None:
    model, x = Hooking(), torch.randn(2, 6)
    depcut.analyze(model, x)
    assert not model.first._forward_hooks
    assert not hasattr(model, "installed")
    expected = model(x)
    depcut.analyze(model, x)
    assert torch.equal(model(x), expected)
    assert len(model.first._forward_hooks) == 1


def test_a_cache_that_the_forward_fills_is_left_as_it_was() -> None:
    class Cached(nn.Module):
        """Remembers a computed bias by device, as LeViT does."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
            self.table = nn.Parameter(torch.rand(8))
            self.cache: dict[str, torch.Tensor] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            key = str(x.device)
            if key not in self.cache:
                self.cache[key] = self.table * 2
            return self.down(self.up(x) + self.cache[key])

    model, x = Cached().eval(), torch.rand(2, 4)
    capture(model, x)
    assert model.cache == {}
    with torch.no_grad():
        expected = model(x)
        kept = model.cache["cpu"]
        capture(model, x)
        assert model.cache["cpu"] is kept
        assert torch.equal(model(x), expected)
