"""All that a public call could change of its caller's, as data: the model inside, the process.

before = snapshot(model)
...
assert unchanged(before, snapshot(model)) == []
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import random
import signal
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Any]


def snapshot(*models: nn.Module) -> State:
    """What belongs to some models and to the process, by where it is.

    Args:
        models: Modules: all that hangs from them, by identity, and the bits of every tensor.
    """
    state = process()
    for number, model in enumerate(models):
        _walk(model, f"model {number}", state)
    return state


def unchanged(before: State, after: State) -> list[str]:
    """What differs between two snapshots: nothing."""
    return [
        f"{place}: was {before.get(place, 'absent')}, is {after.get(place, 'absent')}"[:300]
        for place in {**before, **after}
        if place not in before or place not in after or before[place] != after[place]
    ]


def _bits(tensor: Tensor) -> Any:
    """Class, layout and values of a tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    about = (type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)
    if not plain or tensor.is_meta:
        return about
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return (*about, tensor.stride(), tensor._version, hashlib.sha256(values).hexdigest())


def _walk(root: Any, place: str, state: State) -> None:
    """Note everything that an object leads to, each once."""
    seen: dict[int, Any] = {}
    pending: list[tuple[str, Any]] = [(place, root)]
    while pending:
        place, value = pending.pop()
        state[place] = (type(value), id(value))
        if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
            state[place] = (type(value), repr(value))
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            state[place] += (_bits(value),)
            pending.append((f"{place}.grad", value.grad if value.is_leaf else None))
        elif isinstance(value, dict):
            state[place] += (list(map(repr, value)),)
            pending += [(f"{place}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            state[place] += (len(value),)
            pending += [(f"{place}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, set | frozenset):
            state[place] += (sorted(map(repr, value)),)
        elif isinstance(value, np.ndarray):
            state[place] += (value.tobytes(),)
        elif isinstance(value, random.Random):
            state[place] += (value.getstate(),)
        elif isinstance(value, torch.Generator):
            state[place] += (value.get_state().tolist(),)
        elif isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            pending += [(f"{place} cell {i}", item) for i, item in enumerate(cells)]
            pending.append((f"{place} defaults", value.__defaults__))
        elif isinstance(value, types.MethodType):
            state[place] = (type(value), id(value.__func__))
            pending.append((f"{place} self", value.__self__))
        elif not isinstance(value, type | types.ModuleType):
            pending += [(f"{place}.{k}", v) for k, v in getattr(value, "__dict__", {}).items()]
            pending += [
                (f"{place}.{slot}", getattr(value, slot))
                for base in type(value).__mro__
                for slot in vars(base).get("__slots__", ())
                if isinstance(slot, str) and not slot.startswith("__") and hasattr(value, slot)
            ]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def process() -> State:
    """What belongs to the process: flags, random states, environment, warnings, threads.

    tqdm's daemon, which watches progress bars, is torch.onnx's, and stays once there was a bar.
    """
    backends = torch.backends
    state = {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(d) for d in ("cpu", "cuda")],
        "autocast's type": [torch.get_autocast_dtype(d) for d in ("cpu", "cuda")],
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "attention": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ),
        "fast path": backends.mha.get_fastpath_enabled(),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "modes": torch._C._len_torch_function_stack(),
        "printing": repr(torch._tensor_str.PRINT_OPTS),
        "torch's random state": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy's random state": repr(np.random.get_state()),  # noqa: NPY002
        "numpy's errors": np.geterr(),
        "modules": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__),
        "square root": math.sqrt,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "umask": _umask(),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace()),
        "recursion": sys.getrecursionlimit(),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "warnings": [repr(f) for f in warnings.filters],
        "showwarning": warnings.showwarning,
        "logging": (logging.root.level, logging.root.manager.disable, list(logging.root.handlers)),
        "filters": [(list(h.filters), h.level) for h in logging.root.handlers],
        "garbage": (gc.isenabled(), gc.get_threshold()),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": sorted({t.name for t in threading.enumerate()} - {"tqdm_monitor"}),
    }
    return {f"process: {key}": value for key, value in state.items()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
