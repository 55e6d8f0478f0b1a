"""A smaller model that is what its class builds from other numbers: made and proved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from depcut.capture.random_state import preserved
from depcut.errors import VerificationError, listed
from depcut.plan.keep import Keep
from depcut.plan.stacks import Stack
from depcut.rebuild.numbering import leave_out, numbered_anew
from depcut.rebuild.recipe import recipe_of
from depcut.rebuild.twin import Twin, buffers, changes, settle, twin_of
from depcut.rewrite.build import Slim
from depcut.rewrite.tensors import narrowed_copy
from depcut.support.failures import first_line, reraise_fatal
from depcut.verify.module_results import Trial, run_plain

_FREELY = "pass rebuildable=False, which cuts freely; please report the model"


class Stock(Slim):
    """A smaller model in which nothing is patched or generated: verification refuses instead."""

    def replace(self, name: str, why: str) -> str:
        """Refuse to change the code of a module.

        Raises:
            VerificationError: Always.
        """
        raise VerificationError(why, where=name or "the whole model", remedy=_FREELY)

    def patch(self, stuck: Mapping[str, str]) -> dict[str, str]:
        """Refuse to change the code of modules.

        Raises:
            VerificationError: Always.
        """
        name, why = next(iter(stuck.items()), ("", "its code computes other values"))
        raise VerificationError(why, where=name or "the whole model", remedy=_FREELY)

    def guard(self) -> None:
        """Nothing: in branches that did not run, too, a class that is built anew is right."""


def rebuilt(
    model: nn.Module, keep: Keep, before: Twin, after: Twin, stacks: tuple[Stack, ...] = ()
) -> Stock:
    """The smaller model: kept slices of the tensors, attributes as the class has them.

    Layers that stay have the numbers that they have in the dense model, until `number_anew`.

    Args:
        model: The dense model; it is not changed.
        keep: What stays.
        before: The class built as the dense model is.
        after: The class built with the new numbers.
        stacks: Which layers stay; `after` has just these.

    Raises:
        VerificationError: The class has tensors of other shapes, or other values of buffers that
            are in no file.
    """
    slim = Stock(narrowed_copy(model, keep), keep, model)
    leave_out(slim.model, stacks)
    values = changes(before, after)
    settle(slim.model, values)
    check_tensors_of(slim.model, after)
    return slim


def check_tensors_of(slim: nn.Module, after: Twin) -> None:
    """Check that a class builds the tensors of a model, and the values of what no file holds.

    Args:
        slim: The model.
        after: The class built with its numbers.

    Raises:
        VerificationError: It does not.
    """
    mine = twin_of(slim)
    for name, shape in after.shapes.items():
        if mine.shapes.get(name) != shape:
            raise VerificationError(
                f"the class builds {list(shape)}, the smaller model has "
                f"{list(mine.shapes.get(name, ()))}",
                where=name,
                remedy=_FREELY,
            )
    other = other_buffer(slim, after)
    if other is not None:
        raise VerificationError(
            "the class builds a buffer of other values, which no file of weights holds",
            where=other,
            remedy=_FREELY,
        )


def other_buffer(model: nn.Module, built: Twin) -> str | None:
    """The first buffer that no file of weights holds and that a class builds with other values.

    Args:
        model: The model.
        built: Its class built with its numbers.
    """
    stored, theirs = model.state_dict(keep_vars=True).keys(), buffers(built.model)
    unlike = (
        name
        for name, value in buffers(model).items()
        if name not in stored and name in theirs and not _equal(value, theirs[name])
    )
    return next(unlike, None)


def prove(slim: nn.Module, keep: Keep) -> None:
    """Build the class from what the model itself says, load its weights, and compare outputs.

    Args:
        slim: The smaller model; it is only read.
        keep: What stays of the dense one.

    Raises:
        VerificationError: The class cannot be built, takes other weights or computes otherwise.
    """
    with numbered_anew(slim):
        _prove(slim, keep)


def _prove(slim: nn.Module, keep: Keep) -> None:
    recipe = recipe_of(slim)
    if recipe is None:
        raise VerificationError("its config went", where=type(slim).__name__, remedy=_FREELY)
    try:
        built = recipe.build({})
    except Exception as error:
        reraise_fatal(error)
        raise VerificationError(
            f"its class cannot be built from the new config: {first_line(error)}",
            where=type(slim).__name__,
            remedy=_FREELY,
        ) from error
    check_tensors_of(slim, twin_of(built))
    weights = slim.state_dict()
    if any(value.is_meta for value in weights.values()):
        return
    built.load_state_dict(weights, assign=True)
    own = dict(slim.named_buffers(remove_duplicate=False))
    for name, value in buffers(built).items():
        built.get_buffer(name).data = value.to(own[name].device, own[name].dtype)
    with preserved():
        results = []
        for model in (slim, built):
            torch.manual_seed(0)
            results.append(run_plain(model, keep, Trial()))
    mine, theirs = results
    paths = keep.coupling.program.results.paths
    absent = [
        p for p, m, t in zip(paths, mine, theirs, strict=False) if m is not None and t is None
    ]
    both = [(m, t) for m, t in zip(mine, theirs, strict=False) if m is None or t is not None]
    if len(mine) != len(theirs) or not both or not all(_equal_outputs(m, t) for m, t in both):
        raise VerificationError(
            "the class that is built from the new config computes other outputs",
            where=type(slim).__name__,
            remedy=_FREELY,
        )
    if absent:
        named = listed(list(dict.fromkeys(path.partition(".")[0] for path in absent)))
        warnings.warn(
            f"{type(slim).__name__} returns {named}, and when it is built from its config it will "
            "not: the config was changed after the model was built",
            stacklevel=2,
        )


def _equal_outputs(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return type(mine) is type(theirs)
    return mine.shape == theirs.shape and torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def _equal(mine: torch.Tensor, built: torch.Tensor) -> bool:
    if mine.is_meta or built.is_meta:
        return mine.shape == built.shape
    other: Any = built.to(mine.device, mine.dtype)
    return bool(torch.equal(mine, other))
