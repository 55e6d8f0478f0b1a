"""Every private name of torch that depcut uses, with why and the version in which it was read.

All were read in torch 2.13; `tests/test_private_apis.py` fails with the name of
one that goes or changes. No other module spells a private name of a library; that is tested, too.

| name | why |
|---|---|
| `torch.utils._pytree` | the specs of nested arguments in what torch.export returns are of it |
| `torch._subclasses.fake_tensor.FakeTensorMode`, `FakeTensor` | shapes of a forward alone |
| `torch.utils._python_dispatch.TorchDispatchMode` | sees the operators that a forward executes |
| `torch.utils._python_dispatch.is_traceable_wrapper_subclass` | tensors that hold other ones |
| `torch.amp.autocast_mode._enter_autocast`, `_exit_autocast` | what a graph holds for autocast |
| `torch.fx.experimental.proxy_tensor`, its `_ModuleStackTracer` | nodes of a capture |
| `OpOverload._schema` | argument names, defaults and effects of an operator |
| `torch._ops.OpOverload` | an operator of ATen, other than one that runs functions of the user |
| `aten._native_batch_norm_legit_no_training` | what a batch norm in evaluation mode comes to |
| `SymInt.node.expr` | the expression of a symbolic size |
| `nn.Module._modules`, `_parameters`, `_buffers` | members go without `__setattr__` of the user |
| `nn.Module._forward_pre_hooks`, `BasePruningMethod._tensor_name` | masks of `nn.utils.prune` |
| `nn.Module._non_persistent_buffers_set`, the names of its hooks | they are stored with a module |
| `nn.modules.conv._ConvNd`, `nn.modules.batchnorm._NormBase` | what all of these layers share |
| `nn.MultiheadAttention._reset_parameters` | its initialisation has no public name |
| `functional._canonical_mask`, `_mha_shape_check` | attention's masks and refusals, slim as stock |
| `Tensor._make_subclass` | a parameter of the user's own class |
| `Tensor._version` | how often a tensor was written to |
| `torch.export._trace`, `torch.fx._symbolic_trace` | what torch.export changes for all threads |
| `_extract_tensor_metadata`, `_replace_unbacked_bindings` | work that no capture keeps |
| `FakeTensorMode._dispatch_impl`, `torch._C.DisableTorchFunction` | shapes computed unseen |
| `torch._decomp.decompositions.one_layer_lstm`, `one_layer_rnn` | steps that are all alike |
| `torch.fx._lazy_graph_module` | graphs that are never run are never compiled |
| `torch.fx.proxy._STACK_TRACE_ANCHORS` | frames that stay in the stacks of nodes |
| `torch.compiler._is_compiling_flag`, `_is_exporting_flag` | they are to be on in one thread |
| `_packed_params` | quantized layers have it |
| `torch._dynamo.config` | to make torch.compile raise where it would fall back |
| `torch._dynamo.eval_frame.OptimizedModule._orig_mod` | the model that torch.compile wraps |
| `nn.Module._compiled_call_impl` | the compiled call of one module, which is no copy's |
| `torch.distributed._composable.contract`, `STATE_KEY`, `REGISTRY_KEY` | no plain copy has them |
| `LRScheduler._update_lr`, `_is_initial`, `_step_count` | to set the rates of a restored schedule |
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.fx.experimental import proxy_tensor
from torch.nn.functional import _canonical_mask as canonical_mask
from torch.nn.functional import (  # type: ignore[attr-defined]
    _mha_shape_check as check_attention_shapes,
)
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.utils import prune
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as _is_wrapper

__all__ = [
    "COMPILED_CALL",
    "COMPILER_FLAGS",
    "EVALUATED_BATCH_NORM",
    "RESET_METHODS",
    "ConvNd",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "buffers_of",
    "canonical_mask",
    "check_attention_shapes",
    "children_of",
    "compile_settings",
    "compiled_module",
    "composable_records",
    "enter_autocast",
    "exit_autocast",
    "hook_tables",
    "hooks_of",
    "inner_tensors",
    "is_packed",
    "is_wrapper",
    "lazy_graph_modules",
    "make_subclass",
    "non_persistent_of",
    "parameters_of",
    "proxy_tensor",
    "pruned_names",
    "pytree",
    "registries",
    "replaced_by_export",
    "replaced_to_be_lean",
    "schema_of",
    "set_epoch",
    "size_expression",
    "stack_anchors",
    "version_of",
    "without_torch_functions",
]

# The operator that a batch norm in evaluation mode comes to.
EVALUATED_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default

# Attribute of a module that `Module.compile()` was called on.
COMPILED_CALL = "_compiled_call_impl"

# What draws the weights of a layer anew; the second is nn.MultiheadAttention's.
RESET_METHODS = ("reset_parameters", "_reset_parameters")


def is_packed(module: nn.Module) -> bool:
    """Whether a quantized layer keeps its weights in a format of its own.

    Args:
        module: The layer.
    """
    return hasattr(module, "_packed_params")


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor is made of; none of a plain one.

    Args:
        tensor: The tensor.
    """
    wrapper: Any = tensor
    return (
        [getattr(wrapper, n) for n in wrapper.__tensor_flatten__()[0]] if is_wrapper(tensor) else []
    )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others: distributed, quantized, jagged ones.

    Args:
        tensor: The tensor.
    """
    return bool(_is_wrapper(tensor))


def version_of(tensor: Tensor) -> int:
    """How often a tensor, or what shares its memory, was written to in place.

    Args:
        tensor: The tensor.
    """
    return tensor._version


def replaced_by_export() -> dict[str, tuple[Any, str]]:
    """Functions of torch by which torch.export reaches into the whole process: (owner, name)."""
    from torch.export import _trace
    from torch.fx import _symbolic_trace

    tracer = proxy_tensor._ModuleStackTracer
    return {
        "call": (tracer, "call_module"),
        "attribute": (tracer, "getattr"),
        "autowrap": (_symbolic_trace, "_autowrap_check"),
        "backends": (_trace, "_ignore_backend_decomps"),
        "compiling": (_trace, "_compiling_state_context"),
    }


def replaced_to_be_lean() -> dict[str, tuple[Any, str]]:
    """Functions of torch that do what a capture keeps nothing of: (owner, name)."""
    from torch._decomp import decompositions
    from torch.export import _trace
    from torch.fx import proxy

    return {
        "lstm": (decompositions, "one_layer_lstm"),
        "rnn": (decompositions, "one_layer_rnn"),
        "description": (proxy_tensor, "_extract_tensor_metadata"),
        "bindings": (_trace, "_replace_unbacked_bindings"),
        "stacks": (proxy, "CapturedTraceback"),
        "dispatch": (proxy_tensor.ProxyTorchDispatchMode, "__torch_dispatch__"),
        "shapes": (FakeTensorMode, "dispatch"),
        "computation": (FakeTensorMode, "_dispatch_impl"),
    }


def lazy_graph_modules() -> AbstractContextManager[None]:
    """For as long as a context lasts, graphs are compiled when they are first run."""
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    lazy: AbstractContextManager[None] = _use_lazy_graph_module(True)
    return lazy


def without_torch_functions() -> AbstractContextManager[None]:
    """For as long as a context lasts, no torch-function mode sees a call, in this thread."""
    off: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return off


def stack_anchors() -> set[tuple[str, str]]:
    """(file, name) of functions whose frames torch.fx keeps in the stacks of nodes."""
    from torch.fx import proxy

    return proxy._STACK_TRACE_ANCHORS


# Of torch.compiler: whether a compilation, or an export, is under way.
COMPILER_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")


def schema_of(target: object) -> torch.FunctionSchema | None:
    """Arguments and effects of an operator; None for other functions.

    Args:
        target: What a graph node calls.
    """
    return getattr(target, "_schema", None)


def size_expression(size: int | torch.SymInt) -> Any:
    """The sympy expression of a size.

    Args:
        size: A number, or a symbolic one of a captured graph.
    """
    if isinstance(size, torch.SymInt):
        return size.node.expr
    import sympy

    return sympy.Integer(size)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds, by name, to be changed.

    Args:
        module: The module.
    """
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself holds, by name, to be changed.

    Args:
        module: The module.
    """
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module itself holds, by name, to be changed.

    Args:
        module: The module.
    """
    return module._buffers


def non_persistent_of(module: nn.Module) -> set[str]:
    """Names of the buffers of a module that its state does not hold, to be changed.

    Args:
        module: The module.
    """
    return module._non_persistent_buffers_set


def registries() -> frozenset[str]:
    """Attributes in which every module keeps tensors, children and hooks."""
    return frozenset(vars(nn.Module())) - {"training"}


def composable_records() -> tuple[str, ...]:
    """Attributes in which `fully_shard`, `replicate` and `checkpoint` note what they did."""
    contract = sys.modules.get("torch.distributed._composable.contract")
    names = (getattr(contract, name, None) for name in ("STATE_KEY", "REGISTRY_KEY"))
    return tuple(name for name in names if name is not None)


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """What a module keeps by the numbers of hooks, those on its state among them, to be changed.

    Args:
        module: The module.
    """
    others = ("_parameters", "_buffers", "_modules")
    held = [vars(module).get(name) for name in sorted(registries()) if name not in others]
    return [table for table in held if isinstance(table, dict)]


def hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    """The functions that a module calls with its forward or backward, by the registry they are in.

    Args:
        module: The module.
    """
    held = {name: vars(module).get(name) for name in sorted(registries()) if "ward_" in name}
    called = {
        name: [hook for hook in hooks.values() if callable(hook)]
        for name, hooks in held.items()
        if isinstance(hooks, dict)
    }
    return {name: hooks for name, hooks in called.items() if hooks}


def pruned_names(module: nn.Module) -> Iterator[str]:
    """Names of the parameters that `torch.nn.utils.prune` masks before each forward.

    Args:
        module: The module.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name


def make_subclass(kind: type[nn.Parameter], data: Tensor, requires_grad: bool) -> Tensor:
    """A parameter of a class of its own around some data.

    Args:
        kind: The class.
        data: Its values, which it shares.
        requires_grad: Whether it is trained.
    """
    parameter: Tensor = torch.Tensor._make_subclass(kind, data, requires_grad)
    return parameter


def compile_settings(**changes: Any) -> AbstractContextManager[None]:
    """Settings of torch.compile for as long as a context lasts.

    Args:
        changes: By name, of torch._dynamo.config.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(**changes)
    return settings


def compiled_module(value: object) -> nn.Module | None:
    """The module that torch.compile wraps; None for what is no such wrapper.

    Args:
        value: Anything.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # absent where nothing was compiled
    if dynamo is None or not isinstance(value, dynamo.OptimizedModule):
        return None
    module: nn.Module = value._orig_mod
    return module


def set_epoch(schedule: LRScheduler, epoch: int) -> None:
    """Set a schedule to an epoch, and the rates of its optimizer to what they are there.

    Args:
        schedule: The schedule.
        epoch: Number of its steps that have been taken.
    """
    schedule.last_epoch = epoch - 1
    schedule._step_count = epoch
    schedule._is_initial = True
    try:
        schedule._update_lr()
    finally:
        schedule._is_initial = False
    schedule._step_count = schedule.last_epoch + 1
