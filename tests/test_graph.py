"""The graph toolkit: arguments, names, one run, ancestry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from depcut.capture.capture import capture
from depcut.capture.held import held_tensors
from depcut.capture.program import Program
from depcut.graph.ancestry import Weights, ancestors, is_shared, parameter_dimension, reached
from depcut.graph.arguments import (
    argument,
    bound,
    has_argument,
    path_of,
    replaced,
    schema,
    with_changes,
    written,
)
from depcut.graph.interpreter import Interpreter, last_uses
from depcut.graph.operators import base_name, is_aten, is_item, is_random, is_size, names_of

ATEN = torch.ops.aten


def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node whose string arguments are placeholders of these names."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(v) for v in value]
        return made.setdefault(value, graph.placeholder(value)) if isinstance(value, str) else value

    values = [placed(a) for a in args]
    return graph.call_function(target, tuple(values), {k: placed(v) for k, v in kwargs.items()})


# Arguments ----------------------------------------------------------------------------------------


def test_arguments_are_found_by_name_wherever_they_stand() -> None:
    layer = node(ATEN.layer_norm.default, "x", [4], "w", eps=1e-6)
    assert argument(layer, "normalized_shape") == [4]
    assert str(argument(layer, "weight")) == "w"
    assert argument(layer, "bias") is None
    assert argument(layer, "eps") == 1e-6
    assert argument(layer, "cudnn_enable") is True
    assert has_argument(layer, "bias")
    assert not has_argument(layer, "dim")
    with pytest.raises(KeyError):
        argument(layer, "dim")


def test_a_path_leads_to_an_argument_that_is_there() -> None:
    layer = node(ATEN.layer_norm.default, "x", [4], eps=1e-6)
    assert path_of(layer, "normalized_shape", 0) == (1, 0)
    assert path_of(layer, "eps") == ("eps",)
    assert path_of(layer, "weight") is None


def test_values_are_bound_to_names_with_defaults() -> None:
    found = bound(node(ATEN.addmm.default, "c", "a", "b", alpha=2), (1, 2, 3), {"alpha": 2})
    assert found == {"self": 1, "mat1": 2, "mat2": 3, "beta": 1, "alpha": 2}


def test_changes_go_where_the_arguments_are() -> None:
    args, kwargs = with_changes(node(ATEN.addmm.default, "c", "a", "b"), {"mat2": 7, "beta": 0})
    assert args[2] == 7
    assert kwargs == {"beta": 0}
    assert with_changes(node(ATEN.relu.default, "x"), {"no such": 1})[1] == {}


def test_an_item_of_nested_lists_is_replaced_in_a_copy() -> None:
    lists = [1, [2, 3]]
    assert replaced(lists, (1, 0), 9) == [1, [9, 3]]
    assert lists == [1, [2, 3]]
    assert replaced(lists, (), 9) == 9


def test_what_an_operator_writes_to_is_in_its_schema_lists_included() -> None:
    assert [str(n) for n in written(node(ATEN.add_.Tensor, "a", "b"))] == ["a"]
    assert [str(n) for n in written(node(ATEN._foreach_add_.Scalar, ["a", "b"], 1))] == ["a", "b"]
    assert written(node(ATEN.view.default, "a", [1])) == []
    assert schema(ATEN.view.default)["self"].aliased


# Names --------------------------------------------------------------------------------------------


def test_names_go_from_the_overload_to_what_works_alike() -> None:
    assert names_of(ATEN.add_.Tensor) == ("aten.add_.Tensor", "aten.add_", "aten.add")
    assert names_of(ATEN.linear.default) == ("aten.linear.default", "aten.linear")
    assert names_of(ATEN.__iand__.Tensor)[1:] == ("aten.__iand__",)
    assert names_of(len) == (str(len),)


def test_base_names_are_without_namespace_overload_and_mark() -> None:
    assert base_name(node(ATEN.add_.Tensor, "a", "b")) == "add"
    assert base_name(node(ATEN._softmax.default, "a", 1, False)) == "_softmax"
    assert base_name(node(max, "a", "b")) == ""
    assert is_aten(node(ATEN.add_.Tensor, "a", "b"), "mul", "add")
    assert not is_aten(node(max, "a", "b"), "")


def test_python_functions_and_sizes_are_told_apart() -> None:
    import operator

    assert is_item(node(operator.getitem, "a", 0))
    assert is_size(node(ATEN.sym_size.int, "a", 0))
    assert not is_size(node(operator.mul, "a", 2))


@pytest.mark.parametrize(
    ("target", "args", "drawn"),
    [
        (ATEN.dropout.default, ("x", 0.5, False), False),
        (ATEN.dropout.default, ("x", 0.5, True), True),
        (ATEN.dropout_.default, ("x", 0.0, True), False),
        (ATEN.rand.default, ([2],), True),
        (ATEN.normal_.default, ("x",), True),
        (ATEN.cauchy_.default, ("x",), True),
        (ATEN.scaled_dot_product_attention.default, ("q", "k", "v"), False),
        (ATEN.scaled_dot_product_attention.default, ("q", "k", "v", None, 0.1), True),
        (ATEN.rrelu.default, ("x",), False),
        # Names that hold the word for a draw, of operators that draw nothing.
        (ATEN.special_ndtri.default, ("x",), False),
        (ATEN.batch_norm.default, ("x", "w", "b", "m", "v", True, 0.1, 1e-5, False), False),
    ],
)
def test_what_draws_random_numbers_is_in_torchs_tags(target: Any, args: Any, drawn: bool) -> None:
    assert is_random(node(target, *args)) is drawn


# One run ------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Mixed(nn.Module):
    """An autocast region around one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
        return self.second(x.float())


class Plain(Interpreter):
    """The model as it is."""

    def __init__(self, program: Program, model: nn.Module, fails: str = "") -> None:
        super().__init__(program)
        self.held, self.fails = held_tensors(model), fails
        self.most = 0

    def tensor(self, _node: fx.Node, name: str) -> Tensor:
        return self.held[name].detach()

    def call(self, node: fx.Node) -> Any:
        if self.fails and base_name(node) == self.fails:
            raise ZeroDivisionError
        return super().call(node)

    def made(self, node: fx.Node) -> None:
        activations = [n for n in self.values if n.op == "call_function"]
        self.most = max(self.most, len(activations))


def test_a_run_computes_the_model_and_keeps_no_more_than_is_read_later() -> None:
    model, x = Chain(12).eval(), torch.randn(3, 4)
    run = Plain(capture(model, x), model)
    torch.testing.assert_close(run.run([x])[0], model(x))
    assert run.most == 2
    assert run.values == {}


def test_every_value_is_freed_once() -> None:
    program = capture(Mixed(), torch.randn(3, 4))
    freed = [n for nodes in last_uses(program).values() for n in nodes]
    assert sorted(freed) == sorted(program.graph.graph.nodes)


def test_a_pause_shows_arguments_and_takes_changes() -> None:
    model, x = Chain(2).eval(), torch.randn(3, 4)
    program = capture(model, x)
    relus = [n for n in program.graph.graph.nodes if base_name(n) == "relu"]
    steps = Plain(program, model).steps([x], stops={relus[1]})
    paused = next(steps)
    torch.testing.assert_close(paused.args[0], model.layers[1](torch.relu(model.layers[0](x))))
    paused.args[0].fill_(2)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert bool((end.value.value[0] == 2).all())


def test_autocast_ends_with_the_pause_the_error_and_the_run_given_up() -> None:
    model, x = Mixed().eval(), torch.randn(3, 4)
    program = capture(model, x)
    (inside, _) = (n for n in program.graph.graph.nodes if base_name(n) == "linear")
    steps = Plain(program, model).steps([x], stops={inside})
    next(steps)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(StopIteration) as end:
        next(steps)
    torch.testing.assert_close(end.value.value[0], model(x))
    given_up = Plain(program, model).steps([x], stops={inside})
    next(given_up)
    given_up.close()
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError):
        Plain(program, model, fails="linear").run([x])
    assert not torch.is_autocast_enabled("cpu")


# Ancestry -----------------------------------------------------------------------------------------


class Turned(nn.Module):
    """A weight that is read as it is, turned and cast, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))
        self.v, self.g = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        made = self.g * self.v / 2
        return nn.functional.linear(x @ self.w.t().double().float().T, made)


@pytest.fixture(scope="module")
def turned() -> Program:
    return capture(Turned().eval(), torch.randn(3, 4))


def test_what_the_inputs_reach_and_what_leads_there(turned: Program) -> None:
    nodes = list(turned.graph.graph.nodes)
    found = reached(turned, turned.inputs)
    assert {base_name(n) for n in found} - {""} == {"matmul", "linear"}
    assert reached(turned, turned.inputs, lambda n: base_name(n) != "matmul") == {
        n for n in nodes if n in turned.inputs
    }
    (linear,) = (n for n in nodes if base_name(n) == "linear")
    before = ancestors(linear)
    assert before[0] is linear
    assert {base_name(n) for n in before if n.op != "placeholder"} == {
        *("linear", "matmul", "to", "t", "numpy_T", "mul", "div")
    }
    assert {n for n in nodes if n.op == "placeholder"} <= set(before)
    assert ancestors(linear, lambda n: n.op != "placeholder")[-1].op == "call_function"


def test_parameters_behind_a_computed_weight(turned: Program) -> None:
    weights = Weights(turned)
    nodes = {base_name(n): n for n in turned.graph.graph.nodes}
    assert weights.behind(nodes["div"]) == ("g", "v")
    assert weights.behind(nodes["linear"]) == ()


def test_a_parameter_is_seen_through_casts_and_turns(turned: Program) -> None:
    (matmul,) = (n for n in turned.graph.graph.nodes if base_name(n) == "matmul")
    (div,) = (n for n in turned.graph.graph.nodes if base_name(n) == "div")
    assert parameter_dimension(matmul.args[1], 0, turned) == ("w", 0)
    assert parameter_dimension(div, 0, turned) is None


def test_a_tensor_with_two_names_is_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    program = capture(model, torch.randn(3, 4))
    assert is_shared("0.weight", program)
    assert is_shared("2.weight", program)
    assert not is_shared("3.weight", program)
    assert not is_shared("0.bias", program)
