"""Weights as people have them: safetensors, one file or several, and what torch.save wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from depcut.errors import InputError, listed
from depcut.support import files
from depcut.support.failures import first_line
from depcut.support.weights import read_tensors

_INDEX = "weight_map"  # the entry of an index that says which file holds a tensor
# What training scripts call the weights in a checkpoint that holds more than them.
_NESTED = ("state_dict", "model", "model_state_dict")
_KINDS = "a safetensors file, its model.safetensors.index.json, or a .pth, .pt or .bin file"


def fill(model: nn.Module, path: Path) -> None:
    """Fill a model from a file of weights; every tensor must be there and fit.

    A name before all of the file's names that the model does not have (`module.` of data parallel
    training, `_orig_mod.` of torch.compile) is left out. Tensors that a model shares may be stored
    once.

    Args:
        model: The model to fill.
        path: A safetensors file, the index of several, or what torch.save wrote of tensors: a state
            dict, or a checkpoint with one in it.

    Raises:
        InputError: The file cannot be read, or belongs to another model.
    """
    own = model.state_dict(keep_vars=True)
    state = _without_prefix(_weights_in(_content(path), path), own)
    shared = {id(own[name]) for name in state if name in own}
    missing = [name for name in own if id(own[name]) not in shared]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        lacks = [f"it lacks {listed(missing, 3)}"] * bool(missing)
        has = [f"the model has no {listed(unknown, 3)}"] * bool(unknown)
        raise _refusal("; ".join(lacks + has), path)
    for name, value in state.items():
        there, here = getattr(value, "shape", None), getattr(own[name], "shape", None)
        if there != here:
            raise _refusal(f"{name} has shape {_sizes(there)}, in the model {_sizes(here)}", path)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _refusal(" ".join(str(error).split()), path) from error


def _content(path: Path) -> Any:
    """What a file holds, by its first bytes; nothing is unpickled but tensors and plain data."""
    try:
        if not path.is_file():
            raise OSError("no such file")
        if path.suffix == ".json":
            return _sharded(path)
        with path.open("rb") as file:
            start = file.read(9)
        if path.suffix == ".safetensors" or start[8:] == b"{":  # the length of a header, and it
            return read_tensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            "the weights cannot be loaded: more than tensors is in the file, and is not unpickled",
            where=str(path),
            remedy="write them anew: torch.save(model.state_dict(), path), or as safetensors",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, TypeError) as error:
        raise _refusal(first_line(error), path) from error


def _sharded(path: Path) -> dict[str, Any]:
    """The tensors of all files that an index names."""
    index = files.read_json(path)
    places = index.get(_INDEX) if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"it has no {_INDEX} from names to files")
    tensors: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        shard = path.parent / name
        if Path(name).name != name or shard.suffix == ".json":
            raise ValueError(f"{name!r} is no file of weights beside it")
        tensors |= _content(shard)
    absent = sorted(set(places) - set(tensors))
    if absent:
        raise ValueError(f"no file holds {listed(absent, 3)}")
    return tensors


def _weights_in(content: Any, path: Path) -> dict[str, Any]:
    """The tensors by name in what a file holds, which may be a checkpoint with more in it."""
    if _is_state(content):
        return dict(content)
    if isinstance(content, Mapping):
        nested = [name for name in _NESTED if _is_state(content.get(name))]
        nested = nested or [name for name, value in content.items() if _is_state(value)]
        if nested and (len(nested) == 1 or nested[0] in _NESTED):
            return dict(content[nested[0]])
        entries = listed([str(name) for name in content], 4)
        raise _refusal(f"it holds {entries}, none of which is a state dict by its name", path)
    raise _refusal(f"it holds a {type(content).__name__}, not tensors by name", path)


def _is_state(value: Any) -> bool:
    """Whether something is tensors by name; what modules store beside them is no reason against."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, Tensor) for tensor in value.values())
        and not any(isinstance(tensor, Mapping) and _is_state(tensor) for tensor in value.values())
    )


def _without_prefix(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the model's names, where all of them have a name before these."""
    while state:
        first = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(first) for name in state):
            break
        if any(name.startswith(first) for name in own):
            break
        state = {name.removeprefix(first): tensor for name, tensor in state.items()}
    return state


def _sizes(shape: Any) -> str:
    """A shape as text; what is no tensor has none."""
    return "none" if shape is None else str(list(shape))


def _refusal(what: str, path: Path) -> InputError:
    return InputError(
        f"the weights cannot be loaded: {what}",
        where=str(path),
        remedy=f"pass {_KINDS} that was saved from this very model",
    )
