"""One item of a user's data, taken apart: what the forward takes of it, the target, the rest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depcut.capture.dry_run import result_shapes
from depcut.capture.inputs import arguments
from depcut.support.torch_private import pytree

_Parameter = inspect.Parameter
# Parameters of a forward that hold what its outputs should be. transformers' Trainer knows them by
# these names, too.
_TARGETS = ("label", "target")
_POSITIONS = ("start_positions", "end_positions")
# Encoder-decoder models of transformers make the decoder's inputs of the labels by this method, as
# their collators do.
_DECODER, _SHIFTED = "decoder_input_ids", "prepare_decoder_input_ids_from_labels"


@dataclass(frozen=True, eq=False)
class Item:
    """One item of data.

    Attributes:
        inputs: What the model takes: a tensor, a tuple of positional or a dict of keyword
            arguments.
        target: What it should give: the second half of a pair, else the whole item.
        labels: Keyword arguments of the forward that are targets: its own loss is taken of them.
        unused: Keys that the forward does not take.
    """

    inputs: Any
    target: Any
    labels: Mapping[str, Any]
    unused: tuple[str, ...] = ()


class Items:
    """Takes the items of one model's data apart.

    What a dry run of the model decides is decided once for all items of one structure.

    Args:
        model: The model; it is only read.
        pairs: Whether there is a loss, which takes a target: an item of two is a pair then.
    """

    def __init__(self, model: nn.Module, pairs: bool) -> None:
        self.model, self.pairs = model, pairs
        self.signature = inspect.signature(model.forward)
        self.takes = self.signature.parameters
        self._positional = [p for p in self.takes.values() if p.kind is not _Parameter.KEYWORD_ONLY]
        self._known: dict[Any, bool] = {}

    def taken_apart(self, item: Any) -> Item:
        """What the model takes of an item, and what is left.

        Args:
            item: A tensor, a tuple or list of positional or a mapping of keyword arguments, or a
                pair of any of them and a target.
        """
        if isinstance(item, tuple | list):
            pair = self.pairs and len(item) == 2
            own = 1 if pair else self._own(item)
            if own < len(item):
                inner = self._inputs(item[0] if own == 1 else item[:own])
                next_one = [p for p in self._positional[own : own + 1] if _is_target(p)]
                labels = {**inner.labels, **{p.name: item[-1] for p in next_one}}
                return Item(inner.inputs, item[-1], labels, inner.unused)
        return self._inputs(item)

    def _inputs(self, item: Any) -> Item:
        """An item without a target beside it."""
        if isinstance(item, tuple | list):
            return Item(tuple(item), item, {})
        if not isinstance(item, Mapping):
            return Item(item, item, {})
        values = dict(item)
        if self._takes_whole(values):
            whole, unused = self._without_texts(values)
            return Item((whole,), item, {}, unused)
        return self._keywords(item, values)

    def _keywords(self, item: Any, values: dict[str, Any]) -> Item:
        named = {n: v for n, v in values.items() if n in self.takes}
        more = any(p.kind is _Parameter.VAR_KEYWORD for p in self.takes.values())
        others = {
            n: v
            for n, v in values.items()
            if more and n not in self.takes and isinstance(v, torch.Tensor)
        }
        labels = {n: v for n, v in named.items() if _is_target(self.takes[n])}
        given = {n: v for n, v in named.items() if n not in labels}
        given |= self._decoder_inputs(given, labels)
        if labels or others:
            # Some models start from their labels, some refuse what they do not name.
            tries = ({**given, **others}, given, named, {**named, **others})
            given = next(filter(self._runs, tries), named)
        labels = {n: v for n, v in labels.items() if n not in given}
        unused = [n for n in values if n not in given and n not in labels]
        return Item(given, item, labels, tuple(unused))

    def _own(self, item: Sequence[Any]) -> int:
        """How many of the parts of a tuple the model takes: all, or all but a target."""
        count = len(item)
        if count < 2:
            return count
        if not self._binds(item):
            return count - 1 if count == 2 or self._binds(item[:-1]) else count
        last = self._positional[min(count, len(self._positional)) - 1]
        if last.kind is _Parameter.VAR_POSITIONAL or last.default is _Parameter.empty:
            return count
        whole, rest = tuple(item), tuple(item[:-1])
        pair = _is_target(last) or (not self._runs(whole) and self._runs(rest))
        return count - 1 if pair else count

    def _binds(self, item: Sequence[Any]) -> bool:
        try:
            self.signature.bind(*item)
        except TypeError:
            return False
        return not (len(item) > 1 and isinstance(item[0], Mapping | tuple | list))

    def _takes_whole(self, values: Mapping[str, Any]) -> bool:
        """Whether the forward takes the item itself: one parameter, and none of the item's keys."""
        kinds = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
        needed = [
            p for p in self.takes.values() if p.kind in kinds and p.default is _Parameter.empty
        ]
        return len(needed) == 1 and not values.keys() & self.takes.keys()

    def _without_texts(self, values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """An item that is one argument, without what holds no tensor if the model runs without."""
        texts = tuple(n for n, value in values.items() if not holds_tensor(value))
        rest = {n: v for n, v in values.items() if n not in texts}
        return (rest, texts) if texts and self._runs((rest,)) else (values, ())

    def _decoder_inputs(
        self, given: Mapping[str, Any], labels: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the model itself would make of its labels for its decoder."""
        shifted = getattr(self.model, _SHIFTED, None)
        wanted = "labels" in labels and _DECODER in self.takes and _DECODER not in given
        return {_DECODER: shifted(labels=labels["labels"])} if wanted and shifted else {}

    def _runs(self, inputs: Any) -> bool:
        """Whether the model runs on inputs, by their shapes."""
        if not holds_tensor(inputs):
            return False
        leaves, spec = pytree.tree_flatten(inputs)
        key = (str(spec), *(v.ndim if isinstance(v, torch.Tensor) else None for v in leaves))
        if key not in self._known:
            self._known[key] = result_shapes(self.model, *arguments(inputs)) is not None
        return self._known[key]


def _is_target(parameter: inspect.Parameter) -> bool:
    """Whether a parameter may be left out, and is named as a target."""
    name = parameter.name.lower()
    named = any(word in name for word in _TARGETS) or name in _POSITIONS
    return named and parameter.default is not _Parameter.empty


def holds_tensor(tree: Any) -> bool:
    """Whether nested arguments hold a tensor."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree))
