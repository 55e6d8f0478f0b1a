"""Every private name of accelerate that depcut uses, with why; all were read in accelerate 1.15.

| name | why |
|---|---|
| `AcceleratorState._reset_state` | the process is as it was before depcut made an Accelerator |
| `_original_forward`, `_is_accelerate_prepared` | left on a model, they spoil its next training |
| `Module._hf_hook`, `_old_forward`, `hf_device_map` | what `dispatch_model` leaves on a model |
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depcut.errors import InputError
from depcut.support.failures import first_line

OLD_FORWARD = "_old_forward"
# Methods that refuse to move a dispatched model, and where its parts are.
_OF_DISPATCH = ("to", "cuda", "npu", "mlu", "sdaa", "musa", "xpu", "neuron", "hf_device_map")

# Attributes that `Accelerator.prepare` leaves on a model, which would be taken for prepared again.
TRACES = ("forward", "_original_forward", "_is_accelerate_prepared")


def reset_state() -> None:
    """Forget the process-wide state that the first Accelerator sets up."""
    from accelerate import state

    kind: Any = state.AcceleratorState
    kind._reset_state()


def shares_out(loader: Any) -> bool:
    """Whether a loader is one of accelerate's, which gives each process batches of its own.

    Args:
        loader: A DataLoader.
    """
    return any(kind.__module__ == "accelerate.data_loader" for kind in type(loader).__mro__)


def hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """(module, hook) of the hooks that move a model's weights and inputs.

    Args:
        model: The model; it is only read.
    """
    for module in model.modules():
        found = [vars(module).get("_hf_hook")]
        while found:
            hook = found.pop()
            found += getattr(hook, "hooks", ())
            if hasattr(hook, "weights_map"):
                yield module, hook


def offloaded(model: nn.Module) -> dict[int, Callable[[], torch.Tensor]]:
    """How to read the tensors whose values are offloaded, by the id of what stands for them.

    Args:
        model: The model; it is only read.
    """
    out: dict[int, Callable[[], torch.Tensor]] = {}
    for module, hook in hooks(model):
        values: Any = hook.weights_map
        if values is None:
            continue
        deep = bool(hook.place_submodules)
        for name, tensor in (
            *module.named_parameters(recurse=deep, remove_duplicate=False),
            *module.named_buffers(recurse=deep, remove_duplicate=False),
        ):
            if tensor.is_meta:
                out.setdefault(id(tensor), functools.partial(_read, values, name))
    return out


def _read(values: Any, name: str) -> torch.Tensor:
    """An offloaded tensor; one in a file is mapped into memory, not read.

    Raises:
        InputError: It is not there any more.
    """
    loader, key = getattr(values, "dataset", values), f"{getattr(values, 'prefix', '')}{name}"
    entry = getattr(loader, "index", {}).get(key, {})
    in_own_file = "dtype" in entry and not entry.get("safetensors_file")
    try:
        if not in_own_file or key in loader.state_dict:
            found: torch.Tensor = values[name]
            return found.detach()
        dtype, shape = getattr(torch, entry["dtype"]), tuple(entry["shape"])
        size, path = math.prod(shape), str(Path(loader.save_folder) / f"{key}.dat")
        return torch.from_file(path, shared=False, size=size, dtype=dtype).reshape(shape)
    except (OSError, KeyError, RuntimeError) as error:
        raise InputError(
            f"an offloaded tensor cannot be read: {first_line(error)}",
            where=key,
            remedy="leave the folder that the model was offloaded to as it is",
        ) from error


def added(module: nn.Module) -> list[str]:
    """Names of the attributes that `dispatch_model` gave a module.

    Args:
        module: One module of a model; it is only read.
    """
    fields = vars(module)
    out = [name for name in ("_hf_hook",) if name in fields]
    if OLD_FORWARD in fields:
        out.append("forward")
        old = fields[OLD_FORWARD]
        own = isinstance(old, types.MethodType) and old.__func__ is type(module).forward
        out += [OLD_FORWARD] if own else []
    if "hf_device_map" in fields:
        out += [name for name in _OF_DISPATCH if name in fields]
    return out
