"""What timm's functions expect of its models beside their forward.

`num_features` is the width that `forward_features` returns and `head_hidden_size` that of
`forward_head(..., pre_logits=True)`; `feature_info` lists the widths that certain modules return;
`reset_classifier` makes a classifier as wide as attributes say. No forward reads any of these, so
they keep their dense values in a smaller model until they are brought up to date here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from depcut.axes import resolve
from depcut.capture.clone import clone
from depcut.capture.dry_run import StandIns, dry_result, result_shapes
from depcut.capture.program import ModuleCall
from depcut.capture.provenance import Traced, trace_attributes
from depcut.capture.random_state import preserved
from depcut.plan.attributes import Attribute, invert
from depcut.plan.keep import Keep
from depcut.rewrite.module import set_attributes
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

Shapes = list[torch.Size]
_CLASSES = 10
# Attributes that repeat another one's width where both are equal in the dense model.
_REPEATED = {"embed_dim": "num_features", "hidden_size": "num_features"}


def finish(slim: nn.Module, dense: nn.Module, keep: Keep) -> list[str]:
    """Bring the attributes that timm's functions read up to date, see `depcut.rewrite.finish`.

    Args:
        slim: The smaller model.
        dense: The model that it was made from.
        keep: What stays of it.

    Returns:
        Which functions do not work on the smaller model though they do on the dense one.
    """
    notes: list[str] = []
    present = dict(slim.named_modules(remove_duplicate=False))
    for name, model in dense.named_modules():
        if _is_model(model) and name in present:
            made = _Model(name, present[name], model, keep)
            notes += made.finish()
    return notes


def _is_model(module: nn.Module) -> bool:
    """Whether a module is one of timm's models or one of its wrappers around them."""
    ours = any(kind.__module__.partition(".")[0] == "timm" for kind in type(module).__mro__)
    return ours and (hasattr(module, "feature_info") or hasattr(module, "reset_classifier"))


@dataclass(frozen=True, eq=False)
class _Model:
    """One model of timm's, dense and smaller.

    Attributes:
        name: Its qualified name; empty where it is the whole model.
        slim: The smaller one.
        dense: The dense one.
        keep: What stays.
        features: What `forward_features` of either returns, in a tuple; without values.
    """

    name: str
    slim: nn.Module
    dense: nn.Module
    keep: Keep
    features: dict[nn.Module, tuple[Any]] = field(default_factory=dict)

    def finish(self) -> list[str]:
        """Set the attributes; what does not work then, in words."""
        self._set_feature_info()
        if not hasattr(self.dense, "reset_classifier"):
            return []
        if not hasattr(self.slim, "reset_classifier"):
            return [f"timm: {self._shown} was generated, so that it has no reset_classifier"]
        if self._inputs is None:
            return [f"timm: no example call runs {self._shown}: num_features is not brought up"]
        self._set_widths()
        with preserved():
            self._set_read_by_reset()
            return self._reset_fails()

    @property
    def _shown(self) -> str:
        return f"layer {self.name!r}" if self.name else "the model"

    # Shapes ---------------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the model gets in the first example call that runs it."""
        if not self.name:
            return self.keep.coupling.program.args, self.keep.coupling.program.kwargs
        for program in self.keep.coupling.program.examples:
            for call in program.calls:
                if call.module == self.name:
                    leaves = [
                        torch.zeros(program.sizes[v], dtype=v.meta["val"].dtype)
                        if isinstance(v, fx.Node)
                        else v
                        for v in call.leaves
                    ]
                    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
                    return args, kwargs
        return None

    @cached_property
    def _stand_ins(self) -> StandIns:
        """Of the tensors of both models."""
        return StandIns()

    def _run(self, model: nn.Module, *first: Any) -> Shapes | None:
        """Shapes of what a module returns that gets the model's inputs, behind others."""
        args, kwargs = self._inputs or ((), {})
        return result_shapes(model, (*first, *args), kwargs, self._stand_ins)

    def _shapes(self, model: nn.Module) -> Shapes | None:
        """Shapes of a model's features and of what its classifier reads."""
        args, kwargs = self._inputs or ((), {})
        for head in (True, False):
            found = dry_result(_Features(model, head=head), args, kwargs, self._stand_ins)
            if found is not None:
                ((features, *widths),) = found
                self.features[model] = pytree.tree_map(_empty, features)
                return [width.shape for width in widths]
        return None

    def _set_widths(self) -> None:
        """`num_features` and `head_hidden_size`, by what a run without values returns."""
        dense, slim = self._shapes(self.dense), self._shapes(self.slim)
        if dense is None or slim is None:
            return
        for attribute, old, new in zip(("num_features", "head_hidden_size"), dense, slim):  # noqa: B905
            width = vars(self.dense).get(attribute)
            if type(width) is int:
                self._set(self.slim, (attribute,), _renewed(width, old, new))

    def _set(self, module: nn.Module, path: tuple[Any, ...], width: int) -> None:
        """Set a width, and those that repeat it where nothing else has changed them."""
        name = next(n for n, m in self.slim.named_modules() if m is module)
        dense = vars(self.dense.get_submodule(name))
        set_attributes(module, {("", path): width}, set())
        for other, same in _REPEATED.items():
            held = vars(module).get(other)
            if (same,) == path and dense.get(same) == dense.get(other) == held:
                set_attributes(module, {("", (other,)): width}, set())

    # Classifier -----------------------------------------------------------------------------------

    def _set_read_by_reset(self) -> None:
        """Attributes that `reset_classifier` makes the classifier by, and what it compares."""
        for name, module in self.slim.named_modules():
            width = vars(module).get("in_features")
            if type(width) is int and hasattr(module, "reset"):
                found = self._renewed_by_call(name, width, inputs=True)
                set_attributes(module, {("", ("in_features",)): found or width}, set())
        layers = dict(self.slim.named_modules())
        for name, module in _made_by_reset(self.dense):
            for attribute in ("in_features", "in_channels"):
                needed = vars(module).get(attribute)
                layer = layers.get(name)
                if isinstance(needed, Traced) and layer is not None and hasattr(layer, attribute):
                    self._supply(needed, getattr(layer, attribute))

    def _supply(self, needed: Traced, width: int) -> None:
        """Set the attribute that a number was computed from so that it becomes a width."""

        def unknown(_: Attribute) -> None:
            return None

        found = invert(needed.expr, width, self.keep, unknown)
        if found is not None:
            (name, path), value = found
            self._set(self.slim.get_submodule(name), path, value)

    def _reset_fails(self) -> list[str]:
        """Whether a new classifier works on the smaller model where it does on the dense one."""
        made = []
        for model in (self.slim, self.dense):
            seen = clone(model)
            try:
                seen.reset_classifier(_CLASSES)  # type: ignore[operator]
                features = self.features.get(model)
                shapes = self._run(_OnFeatures(seen), features) if features else self._run(seen)
            except Exception as error:  # noqa: BLE001  it is told as a note
                reraise_fatal(error)
                shapes, why = None, first_line(error)
            else:
                why = f"the outputs are {shapes}" if shapes else "its forward fails then"
            made.append((shapes, why))
        (slim, why), (dense, _) = made
        if dense is None or slim == dense:
            return []
        return [f"timm: reset_classifier does not work on {self._shown}: {why}"]

    # Features -------------------------------------------------------------------------------------

    def _set_feature_info(self) -> None:
        """The widths that modules return, in place of the dense ones."""
        given = getattr(self.dense, "feature_info", None)
        entries = getattr(given, "info", given)
        if not isinstance(entries, Sequence) or not all(isinstance(e, dict) for e in entries):
            return
        renewed = [self._entry(dict(entry), number) for number, entry in enumerate(entries)]
        if isinstance(given, list | tuple):
            vars(self.slim)["feature_info"] = type(given)(renewed)
        else:
            info: Any = copy.copy(given)
            info.info = renewed
            vars(self.slim)["feature_info"] = info

    def _entry(self, entry: dict[str, Any], number: int) -> dict[str, Any]:
        width, module = entry.get("num_chs"), entry.get("module")
        if type(width) is int and isinstance(module, str):
            inputs = entry.get("hook_type") == "forward_pre"
            found = self._renewed_by_call(module, width, inputs=inputs)
            entry["num_chs"] = found or self._renewed_by_map(number, width) or width
        return entry

    def _renewed_by_map(self, number: int, width: int) -> int | None:
        """The new width of a feature map, for an entry that names no module with a forward."""
        if self._maps is None or number >= min(map(len, self._maps)):
            return None
        dense, slim = (maps[number] for maps in self._maps)
        return _renewed(width, dense, slim) if width in dense and len(dense) == len(slim) else None

    @cached_property
    def _maps(self) -> tuple[Shapes, Shapes] | None:
        """Shapes of the dense and the smaller model's feature maps, where it returns any."""
        if not hasattr(self.dense, "forward_intermediates") or self._inputs is None:
            return None
        dense, slim = (self._run(_Maps(m)) for m in (self.dense, self.slim))
        return None if dense is None or slim is None else (dense, slim)

    def _renewed_by_call(self, module: str, width: int, *, inputs: bool) -> int | None:
        """The new size of what a module gets or returns; None where no example call runs it."""
        for call in self._calls_of(module):
            for leaf in call.leaves if inputs else call.out_leaves:
                dims = self.keep.coupling.env.get(leaf) if isinstance(leaf, fx.Node) else None
                if isinstance(dims, tuple) and dims and not isinstance(dims[0], tuple | list):
                    dense = [resolve(term).size for term in dims]
                    if width in dense:
                        return _renewed(width, dense, [self.keep.count(term) for term in dims])
        return None

    def _calls_of(self, module: str) -> Iterator[ModuleCall]:
        """Calls of a module by its name in `feature_info`: wrappers flatten and prefix names."""
        names = {_flat(self.name, inner, module) for inner in ("", "model", "body")}
        for program in self.keep.coupling.program.examples:
            yield from (call for call in program.calls if _flat(call.module) in names)


class _Features(nn.Module):
    """Returns a model's features, and their sizes, and those of what its classifier reads."""

    def __init__(self, model: nn.Module, *, head: bool) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The features in a tuple, and a tensor with the sizes of each."""
        features = self.model.forward_features(*args, **kwargs)  # type: ignore[operator]
        if not self.head:
            return (features,), _sized(features)
        read = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return (features,), _sized(features), _sized(read)


class _OnFeatures(nn.Module):
    """Runs a model on features that are known."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: tuple[Any], *args: Any, **kwargs: Any) -> Any:
        """What the model returns where its `forward_features` returns the features."""
        vars(self.model)["forward_features"] = lambda *_args, **_kwargs: features[0]
        return self.model(*args, **kwargs)


def _empty(leaf: Any) -> Any:
    """A tensor of the same kind that belongs to no run."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


class _Maps(nn.Module):
    """Returns a model's feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One tensor a map."""
        return self.model.forward_intermediates(*args, intermediates_only=True, **kwargs)  # type: ignore[operator]


def _sized(tree: Any) -> torch.Tensor:
    """The tensor; of several, one with the width of each and their sum for sizes."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    widths = [tensor.shape[-1] for tensor in tensors]
    return tensors[0].new_empty([*widths, sum(widths)])


def _flat(*names: str) -> str:
    return "_".join(name.replace(".", "_") for name in names if name)


def _renewed(width: int, dense: Sequence[int], slim: Sequence[int]) -> int:
    """What became of a width, by the sizes of a tensor that has it; lengths do not change."""
    found = [new for old, new in zip(dense, slim, strict=True) if old == width]
    return next((new for new in found if new != width), width)


def _made_by_reset(dense: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that `reset_classifier` makes, their sizes traced to attributes of the model."""
    seen = clone(dense)
    trace_attributes(seen)
    before = {id(module) for module in seen.modules()}
    try:
        seen.reset_classifier(_CLASSES)  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001  whether it works is seen afterwards
        reraise_fatal(error)
        return []
    return [(name, m) for name, m in seen.named_modules() if id(m) not in before]
