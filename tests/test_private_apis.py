"""Private names of other libraries stand in one module each, and each still does what it did."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from layers import MODULES, PACKAGE, nodes
from torch import nn
from torch.nn.utils import prune

import depcut
from depcut.support import accelerate_private, onnx_private, torch_private

HOMES = {f"support/{name}_private.py" for name in ("torch", "accelerate", "fsdp", "onnx")}

# What each of them does ---------------------------------------------------------------------------


def test_pytree() -> None:
    pytree = torch_private.pytree
    tree = {"a": [1, (2, None)], "b": 3}
    leaves, spec = pytree.tree_flatten(tree)
    assert leaves == pytree.tree_leaves(tree) == [1, 2, None, 3]
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert pytree.tree_map(lambda leaf: leaf and -leaf, tree) == {"a": [-1, (-2, None)], "b": -3}
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert isinstance(program.call_spec.in_spec, pytree.TreeSpec)


def test_fake_tensors_compute_shapes_only() -> None:
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x = fake.from_tensor(torch.zeros(2, 3))
        assert (x @ torch.ones(3, 5)).shape == (2, 5)
        assert type(x) is not torch.Tensor


def test_a_dispatch_mode_sees_what_is_executed_with_its_numbers() -> None:
    class Seen(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            calls.append((str(func), [a for a in args if type(a) in (int, float)]))
            return func(*args, **(kwargs or {}))

    calls: list[Any] = []
    with Seen():
        torch.zeros(2) / 1.5
    assert ("aten.div.Tensor", [1.5]) in calls


def test_autocast_is_entered_and_left() -> None:
    token = torch_private.enter_autocast("cpu", torch.bfloat16, True, None)
    try:
        assert torch.is_autocast_enabled("cpu")
    finally:
        torch_private.exit_autocast(token)
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_in_a_graph_calls_these_very_functions() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x

    analysis = depcut.analyze(nn.Sequential(nn.Linear(3, 3), Net()), torch.zeros(3, 3))
    targets = [node.target for node in analysis.coupling.program.graph.graph.nodes]
    assert torch_private.enter_autocast in targets
    assert torch_private.exit_autocast in targets


def test_proxies_of_a_capture() -> None:
    seen: list[Any] = []

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mode = torch_private.proxy_tensor.get_proxy_mode()
            assert mode is not None
            y = x + 1
            seen.append(torch_private.proxy_tensor.get_proxy_slot(y, mode.tracer, None))
            return y

    torch.export.export(Net(), (torch.zeros(2),), strict=False)
    assert isinstance(seen[-1].proxy.node, torch.fx.Node)
    assert torch_private.proxy_tensor.get_proxy_mode() is None


def test_schemas_of_operators() -> None:
    schema = torch_private.schema_of(torch.ops.aten.linear.default)
    assert schema is not None
    assert schema.name == "aten::linear"
    assert not schema.is_mutable
    arguments = [(a.name, a.has_default_value(), a.default_value) for a in schema.arguments]
    assert arguments == [
        ("input", False, None), ("weight", False, None), ("bias", True, None)
    ]  # fmt: skip
    assert torch_private.schema_of(torch.ops.aten.add_.Tensor).is_mutable
    assert torch_private.schema_of(torch.ops.aten.add_.Tensor) is not None
    assert torch_private.schema_of(len) is None


def test_expressions_of_sizes() -> None:
    dims = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        nn.Linear(3, 3), (torch.zeros(4, 3),), dynamic_shapes=(dims,), strict=False
    )
    (size, width) = (
        next(n for n in program.graph.nodes if n.op == "output").args[0][0].meta["val"].shape
    )
    double = torch_private.size_expression(size * 2)
    assert double / torch_private.size_expression(size) == 2
    assert torch_private.size_expression(width) == 3
    assert torch_private.size_expression(width).is_Integer


@pytest.mark.parametrize("what", ["call", "attribute", "autowrap", "backends", "compiling"])
def test_what_export_replaces(what: str) -> None:
    owner, name = torch_private.replaced_by_export()[what]
    assert callable(getattr(owner, name, None)), f"torch has no {owner.__name__}.{name} any more"


@pytest.mark.parametrize(
    "what", ["description", "bindings", "stacks", "dispatch", "shapes", "computation"]
)
def test_what_a_capture_leaves_out(what: str) -> None:
    owner, name = torch_private.replaced_to_be_lean()[what]
    assert callable(getattr(owner, name, None)), f"torch has no {owner.__name__}.{name} any more"


def test_graphs_are_compiled_when_they_are_run() -> None:
    with torch_private.lazy_graph_modules():
        graph = torch.export.export(nn.ReLU(), (torch.zeros(2),)).graph_module
    assert graph(torch.tensor([-1.0, 1.0]))[0].tolist() == [0, 1]


def test_no_mode_sees_calls_of_torch_where_that_is_off() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list[Any] = []
    with Seen():
        torch.zeros(2)
        with torch_private.without_torch_functions():
            torch.ones(2)
    assert torch.zeros in calls
    assert torch.ones not in calls


def test_frames_that_torch_keeps_whatever_their_name() -> None:
    def annotated() -> None:
        return None

    place = (annotated.__code__.co_filename, annotated.__code__.co_name)
    assert place not in torch_private.stack_anchors()
    torch.fx.traceback.annotate_fn({"of": "a test"})(annotated)
    assert place in torch_private.stack_anchors()


@pytest.mark.parametrize("name", torch_private.COMPILER_FLAGS)
def test_flags_of_the_compiler(name: str) -> None:
    assert getattr(torch.compiler, name) is False, f"torch.compiler has no {name} any more"


def test_quantized_layers_are_told_by_their_packed_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        layer = torch.ao.nn.quantized.Linear(2, 2)
    assert torch_private.is_packed(layer)
    assert not torch_private.is_packed(nn.Linear(2, 2))


def test_the_dictionaries_of_a_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    torch_private.children_of(net)["0"] = nn.Identity()
    assert isinstance(net[0], nn.Identity)
    del torch_private.parameters_of(net[1])["bias"]
    assert [name for name, _ in net.named_parameters()] == ["1.weight"]
    torch_private.buffers_of(net[1])["running_mean"] = torch.ones(2)
    assert net[1].running_mean.tolist() == [1, 1]


def test_what_a_module_keeps_beside_its_attributes() -> None:
    net = nn.Linear(2, 2)
    net.own, net.training = 1, False
    assert set(vars(net)) - torch_private.registries() == {
        "own", "training", "in_features", "out_features"
    }  # fmt: skip
    net.register_buffer("a", torch.ones(1), persistent=False)
    net.register_buffer("b", torch.ones(1))
    assert torch_private.non_persistent_of(net) == {"a"}
    assert torch_private.hooks_of(net) == {}
    net.register_forward_hook(print)
    net.register_full_backward_pre_hook(len)
    assert list(torch_private.hooks_of(net).values()) == [[len], [print]]


def test_tensors_that_hold_others() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert torch_private.is_wrapper(nested)
    assert len(torch_private.inner_tensors(nested)) > 1
    assert not torch_private.is_wrapper(nn.Parameter(torch.ones(2)))
    assert torch_private.inner_tensors(nn.Parameter(torch.ones(2))) == []


def test_names_that_are_pruned() -> None:
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    layer.register_forward_pre_hook(lambda *_: None)
    assert list(torch_private.pruned_names(layer)) == ["weight"]


def test_common_classes_of_layers() -> None:
    for kind in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d):
        assert issubclass(kind, torch_private.ConvNd)
    for kind in (nn.BatchNorm2d, nn.InstanceNorm1d, nn.SyncBatchNorm):
        assert issubclass(kind, torch_private.NormBase)
    assert not issubclass(nn.LayerNorm, torch_private.NormBase)


def test_the_methods_that_draw_weights() -> None:
    for layer in (nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.Conv2d(4, 4, 1)):
        methods = [getattr(layer, n) for n in torch_private.RESET_METHODS if hasattr(layer, n)]
        before = copy.deepcopy(layer.state_dict())
        methods[0]()
        assert any(not torch.equal(t, before[n]) for n, t in layer.state_dict().items())


def test_masks_and_refusals_of_attention() -> None:
    mask = torch.tensor([[True, False]])
    made = torch_private.canonical_mask(mask, "mask", None, "", torch.float64, False)
    assert made is not None
    assert (made.dtype, made.tolist()) == (torch.float64, [[-torch.inf, 0.0]])
    with pytest.raises(AssertionError, match="only bool and floating types of mask"):
        torch_private.canonical_mask(mask.int(), "mask", None, "", torch.float32)
    x = torch.zeros(2, 3, 4)
    assert torch_private.check_attention_shapes(x, x, x, None, None, 2) is True
    assert torch_private.check_attention_shapes(x[0], x[0], x[0], None, None, 2) is False
    with pytest.raises(AssertionError, match="expected `key` and `value` to be 3-D"):
        torch_private.check_attention_shapes(x, x[0], x[0], None, None, 2)


def test_writes_to_a_tensor_are_counted() -> None:
    tensor = torch.zeros(4)
    seen, before = tensor.detach(), torch_private.version_of(tensor)
    seen.data = torch.empty(0)
    assert torch_private.version_of(seen) == before
    tensor[1:].add_(1)
    assert torch_private.version_of(seen) == torch_private.version_of(tensor) == before + 1


def test_parameters_of_a_class_of_their_own() -> None:
    class Own(nn.Parameter):
        pass

    data = torch.zeros(2)
    made = torch_private.make_subclass(Own, data, True)
    assert type(made) is Own
    assert made.requires_grad
    assert made.data_ptr() == data.data_ptr()


def test_settings_of_torch_compile() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit, config.suppress_errors
    settings = {
        "recompile_limit": 77, "accumulated_recompile_limit": 77, "suppress_errors": not before[1],
        "fail_on_recompile_limit_hit": True, "disable": False,
    }  # fmt: skip
    with torch_private.compile_settings(**settings):
        assert {name: getattr(config, name) for name in settings} == settings
    assert (config.recompile_limit, config.suppress_errors) == before


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_schedule_set_to_an_epoch(epoch: int) -> None:
    def made() -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    (plain, counted), (optimizer, schedule) = made(), made()
    torch_private.set_epoch(schedule, epoch)
    for _ in range(epoch):
        plain.step()
        counted.step()
    for _ in range(2):
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert schedule.last_epoch == counted.last_epoch
        for each, its in ((plain, counted), (optimizer, schedule)):
            each.step()
            its.step()


def test_the_state_and_the_traces_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate import state

    existed = state.is_initialized()
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        net = nn.Linear(2, 2)
        before = set(vars(net))
        prepared = accelerator.prepare_model(net, device_placement=False)
        assert prepared is net
        assert set(vars(net)) - before <= set(accelerate_private.TRACES)
        assert "_is_accelerate_prepared" in vars(net)
    finally:
        if not existed:
            accelerate_private.reset_state()
    assert state.is_initialized() == existed


@pytest.mark.parametrize("what", ["translations", "signature", "composites"])
def test_what_a_conversion_looks_up_once(what: str) -> None:
    owner, name = onnx_private.replaced_to_translate()[what]
    assert name in vars(owner), f"{owner.__name__} has no {name} any more"


def test_translations_are_those_that_torch_lists_and_takes_note_of() -> None:
    from torch.onnx._internal.exporter import _registration

    place = onnx_private.replaced_to_translate()["translations"]
    assert {meta.function for meta in getattr(*place)()} <= {*onnx_private.translations()}
    known = _registration.ONNXRegistry.from_torchlib().functions.values()
    read = [d for several in known for d in several if not d.skip_signature_inference]
    assert all(hasattr(d.onnx_function, onnx_private.SIGNATURE) for d in read)


# Where they are spelled ---------------------------------------------------------------------------


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: Iterable[Iterable[ast.AST]]) -> set[str]:
    """Private names that the package itself gives to attributes and methods."""
    named: set[str] = set()
    for tree in trees:
        for node in tree:
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        named.add(item.name)
                    elif isinstance(item, ast.AnnAssign):
                        named.add(ast.unparse(item.target))
                    elif isinstance(item, ast.Assign):
                        named |= {ast.unparse(target) for target in item.targets}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                named.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
                named |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return named


def foreign_names(tree: Iterable[ast.AST], own: set[str]) -> set[str]:
    """Private names of other libraries in a file: attributes, imports, names in getattr."""
    found: set[str] = set()
    for node in tree:
        if isinstance(node, ast.Attribute) and private(node.attr):
            mine = node.attr in own and ast.unparse(node.value).partition(".")[0] != "torch"
            found |= set() if mine else {node.attr}
        elif isinstance(node, ast.Import):
            found |= {part for a in node.names for part in a.name.split(".") if private(part)}
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("depcut"):
            names = [*str(node.module).split("."), *(a.name for a in node.names)]
            found |= {name for name in names if private(name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            found |= {name} if private(name) and name not in own else set()
    return found


def test_private_names_stand_in_one_module_a_library() -> None:
    trees = {path.relative_to(PACKAGE).as_posix(): nodes(path) for path in MODULES.values()}
    own = own_names([tree for file, tree in trees.items() if file not in HOMES])
    spelled = {
        (file, name)
        for file, tree in trees.items()
        if file not in HOMES
        for name in foreign_names(tree, own)
    }
    assert sorted(spelled) == []


def test_the_search_for_private_names_finds_them() -> None:
    text = """
import torch._dynamo
from torch._subclasses import fake_tensor
from torch.utils import _pytree
x = node.target._schema
y = getattr(module, "_buffers", None) or hasattr(module, "_modules")
z = self._mine + other._mine + torch._mine
"""
    assert foreign_names(ast.walk(ast.parse(text)), {"_mine"}) == {
        "_dynamo", "_subclasses", "_pytree", "_schema", "_buffers", "_modules", "_mine"
    }  # fmt: skip
    assert foreign_names(ast.walk(ast.parse("z = self._mine")), {"_mine"}) == set()
