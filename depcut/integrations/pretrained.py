"""Models that are saved for a `from_pretrained`, which builds their class from their config.

Smaller models that the config cannot rebuild refuse to be saved so: the files would not load, or,
with the option that the libraries then propose, load with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from depcut.integrations.reload import reload_problem, stock_class
from depcut.integrations.transformers_calls import Transformers
from depcut.integrations.transformers_config import recipe
from depcut.plan.keep import Keep
from depcut.support.refusal import allow_saving, refuse_saving, refuses_saving

__all__ = ["convention", "finish", "recipe"]

convention = Transformers()  # of its example inputs, caches and outputs

# Where the base classes with these methods are defined; files of the last hold adapters alone.
_TRANSFORMERS = "transformers.modeling_utils"
_HOMES = frozenset(
    (
        _TRANSFORMERS,
        "huggingface_hub.hub_mixin",
        "diffusers.models.modeling_utils",
        "peft.peft_model",
    )
)

_REBUILDABLE = "shrunk with rebuildable=True, from_pretrained takes it"
_ATTACHED = "adapters are attached, and were cut with it"
_MERGED = "merge the adapters before the model is shrunk, or attach them to the smaller one"


def finish(slim: nn.Module, dense: nn.Module, keep: Keep) -> list[str]:  # noqa: ARG001
    """Have models that their config cannot rebuild refuse `save_pretrained` and `push_to_hub`.

    Args:
        slim: The smaller model, its configs included.
        dense: The model that it was made from.
        keep: What stays of it.

    Returns:
        Which models refuse, and why.
    """
    notes = []
    outer: str | None = None  # the last one that is in no other
    why: str | None = None
    for name, before in _models(dense):
        model = _submodule(slim, name)
        if model is None or _shapes(model) == _shapes(before):
            continue
        if outer is None or not name.startswith(outer):
            outer, why = f"{name}." if name else "", _problem(model, before)
            if why is not None:
                notes.append(f"{name or 'the model'} refuses save_pretrained: {why}")
        if why is None:
            allow_saving(model)
        else:
            refuse_saving(model, why, _MERGED if why == _ATTACHED else _REBUILDABLE)
    return notes


def comes_back(model: nn.Module) -> bool:
    """Whether `save_pretrained` of transformers leaves files that bring a smaller model back.

    Args:
        model: A model to which a plan was applied.
    """
    return _TRANSFORMERS in _homes(model) and not refuses_saving(model)


def _models(dense: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The models that have these methods, outer ones before those inside of them."""
    for name, module in dense.named_modules():
        if _homes(module) & _HOMES:
            yield name, module


def _homes(module: nn.Module) -> set[str]:
    return {base.__module__ for base in type(module).__mro__}


def _submodule(slim: nn.Module, name: str) -> nn.Module | None:
    try:
        return slim.get_submodule(name)
    except AttributeError:  # a branch that went as a whole
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _problem(model: nn.Module, before: nn.Module) -> str | None:
    """Why the library would not bring the model back, if it would not."""
    if stock_class(model) is not stock_class(before):
        return "it was generated from the graph"
    if any(home.startswith("peft.") for part in model.modules() for home in _homes(part)):
        return _ATTACHED
    made = recipe(model)
    if made is None:
        return "its config gives the sizes of the dense model"
    return reload_problem(model, made)
