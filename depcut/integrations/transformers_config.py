"""transformers: a class is built from its config, `type(model)(config)`, and so loaded again."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from depcut.rebuild.empty import empty_on_meta
from depcut.rebuild.recipe import NONE, Cuts, Number, Path, Recipe, Values

# Read by many classes where a config has it, though few configs have it by themselves.
_OPTIONAL = ("head_dim",)
_LONGEST = 16  # items of a list of numbers, such as one a stage


class _Config:
    """The recipe of a model with a config.

    Args:
        model: The model; it is only read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._class: Any = type(model)
        self._config: Any = model.config
        self.fields: dict[Path, Number | None] = dict(_numbers(self._config, ()))
        self.lists: dict[Path, tuple[Any, ...]] = dict(_lists(self._config, ()))

    def build(self, values: Values, cuts: Cuts = NONE) -> nn.Module:
        """The class, built from the config as it would be read from a file."""
        config = copy.deepcopy(self._config)
        for path, value in values.items():
            _put(config, path, value)
        for path, kept in cuts.items():
            entries = _at(config, path)
            whole = isinstance(entries, list | tuple)
            _put(config, path, type(entries)(entries[i] for i in kept) if whole else len(kept))
        with warnings.catch_warnings(), empty_on_meta():
            warnings.simplefilter("ignore")
            read = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
            read._attn_implementation = config._attn_implementation  # no file says it
            built: nn.Module = self._class(read)
            return built


def recipe(model: nn.Module) -> Recipe | None:
    """The recipe of a transformers model; None of any other.

    Args:
        model: Any model.
    """
    library = sys.modules.get("transformers")  # a model of a library is there after its import
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    return _Config(model)


def _numbers(config: Any, at: Path) -> Iterator[tuple[Path, Number | None]]:
    """Numbers of a config and of those in it, by path, and what may be given beside them."""
    kind = sys.modules["transformers"].PreTrainedConfig
    optional = (name for name in _OPTIONAL if name not in config.attribute_map)
    known = {**dict.fromkeys(optional), **vars(config)}
    for name, value in known.items():
        if name.startswith("_"):
            continue
        if isinstance(value, kind):
            yield from _numbers(value, (*at, name))
        elif value is None or _is_number(value):
            yield (*at, name), value
        elif _is_list(value):
            yield from (((*at, name, i), item) for i, item in enumerate(value))


def _lists(config: Any, at: Path) -> Iterator[tuple[Path, tuple[Any, ...]]]:
    """Lists of a config and of those in it, by path."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, sys.modules["transformers"].PreTrainedConfig):
            yield from _lists(value, (*at, name))
        elif isinstance(value, list | tuple):
            yield (*at, name), tuple(value)


def _is_list(value: Any) -> bool:
    short = isinstance(value, list | tuple) and 0 < len(value) <= _LONGEST
    return short and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _at(config: Any, path: Path) -> Any:
    """What a config has at a path."""
    for step in path:
        config = config[step] if isinstance(step, int) else vars(config)[step]
    return config


def _put(config: Any, path: Path, value: Any) -> None:
    """Set a value of a config at a path; the config's own checks follow when it is read."""
    *outer, last = path
    holder = config
    for step in outer:
        held = vars(holder)[step]
        if isinstance(last, int) and step is outer[-1]:
            items = [*held[:last], value, *held[last + 1 :]]
            vars(holder)[step] = type(held)(items)
            return
        holder = held
    vars(holder)[last] = value
