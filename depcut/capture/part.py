"""A part of a model in the place of the whole: all names stay, and its forward is the part's alone.

Where the whole cannot be captured (control flow on values, objects among the inputs), a part of it
can: with the inputs that it gets in one run of the whole. What it returns is an output, which is
never narrowed, so the rest of the whole does not change.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.eager import refuse_failing_call, user_line
from depcut.capture.flags import flags_as_before
from depcut.capture.inputs import Call, Inputs, arguments, example_calls
from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.capture.refusals import check_inputs, check_model, signature_of
from depcut.errors import InputError, listed
from depcut.support.checks import check_kind
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import buffers_of, children_of, parameters_of, pytree

_SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class Part(nn.Module):
    """The modules of a model under their names, and the forward of one of them.

    Args:
        whole: The model; its registries are shared.
        name: Qualified name of the module that runs.
        calls: What the whole gets in each example call.

    Raises:
        InputError: There is no such module, or its parameters are also those of another.
    """

    def __init__(self, whole: nn.Module, name: str, calls: tuple[Call, ...] = ()) -> None:
        super().__init__()
        fields = vars(self)
        # Not by setattr: as a child, the whole would be in every name.
        fields.update({key: vars(whole)[key] for key in _SHARED})
        fields.update(whole=whole, part=name, calls=calls, training=whole.training)
        inner = _checked(whole, name)
        fields["forward"] = types.MethodType(_forward(signature_of(inner)), self)

    def is_of(self, whole: nn.Module) -> bool:
        """Whether it shows a part of this very model."""
        return children_of(self) is children_of(whole)

    def assembled(self) -> nn.Module:
        """The whole that a copy belongs to, with the modules and tensors of the copy."""
        whole: nn.Module = vars(self)["whole"]
        vars(whole).update({key: vars(self)[key] for key in _SHARED})
        return whole


def _forward(signature: inspect.Signature) -> Any:
    """A forward that takes what the part's does."""

    def forward(self: Part, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(vars(self)["part"])(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    given = list(signature.parameters.values())
    if "self" not in signature.parameters:
        vars(forward)["__signature__"] = signature.replace(parameters=[own, *given])
    return forward


def _checked(whole: nn.Module, name: str) -> nn.Module:
    """The part; refused where it is none, or shares its tensors with what is outside of it."""
    check_kind(
        name, str, "part", "pass the name of one module; of several, shrink one after another"
    )
    modules: dict[str, nn.Module] = dict(whole.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        found = [n for n, m in whole.named_children() if any(True for _ in m.parameters())]
        raise InputError(
            f"the model has no part {name!r}",
            where="part=",
            remedy=f"name one of its modules, such as {listed(found) or 'those it is made of'}",
        )
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for place, module in modules.items():
        held = inside if place == name or place.startswith(f"{name}.") else outside
        for tensors in (parameters_of(module), buffers_of(module)):
            held.update({id(t): f"{place}.{k}" for k, t in tensors.items() if t is not None})
    shared = [f"{inside[i]} ({outside[i]})" for i in inside if i in outside]
    if shared:
        raise InputError(
            f"tensors of {name!r} are also those of other modules: {listed(shared, 3)}",
            where="part=",
            remedy="name a part that holds both",
        )
    return modules[name]


def part_of(model: nn.Module) -> str:
    """The name of the part that stands for the whole; empty for any other model.

    Args:
        model: What is captured.
    """
    return str(vars(model)["part"]) if isinstance(model, Part) else ""


def whole_of(model: nn.Module) -> nn.Module:
    """The model that a part stands for; any other model as it is.

    Args:
        model: What is captured.
    """
    whole: nn.Module = vars(model)["whole"] if isinstance(model, Part) else model
    return whole


def shown_name(model: nn.Module) -> str:
    """A model's class, and the part of it that is captured.

    Args:
        model: What is captured.
    """
    return ".".join(filter(None, (type(whole_of(model)).__name__, part_of(model))))


def shown_part(whole: nn.Module, name: str) -> nn.Module:
    """A part in the place of a whole that is not run; the whole itself where there is no name.

    Args:
        whole: A model.
        name: Of the part, or empty.
    """
    return Part(whole, name) if name else whole


def inside(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of some names that are of the part; all of them where the model is whole.

    Args:
        model: What is captured.
        names: Of tensors.
    """
    part = part_of(model)
    return frozenset(name for name in names if not part or name.startswith(f"{part}."))


def as_part(whole: nn.Module, name: str, inputs: Inputs) -> tuple[Part, Inputs]:
    """A part in the place of the whole, and what it gets in one run of the whole on each call.

    Args:
        whole: The model; it is only read.
        name: Of the part.
        inputs: Example inputs of the whole, as of `depcut.analyze`.

    Raises:
        InputError: There is no such part, or no example call runs it.
        CallError: The model itself raises on the inputs before it comes to the part.
    """
    check_model(whole)
    Part(whole, name)
    calls = tuple(example_calls(whole, inputs, widen=False))
    found: list[Inputs] = []
    for call in calls:
        check_inputs(whole, *call)
        found += [given for given in part_calls(whole, name, call) if not _known(given, found)]
    return Part(whole, name, calls), found if len(found) > 1 else found[0]


def part_calls(whole: nn.Module, name: str, call: Call) -> list[Any]:
    """What a part gets in one run of the whole, one item for each time that it is called.

    A clone runs, in evaluation mode. What the whole does after it has called the part may fail.

    Args:
        whole: The model; it is only read.
        name: Of the part.
        call: The (args, kwargs) of the whole.

    Raises:
        InputError: The call does not run the part.
        CallError: The model itself raises before that.
    """
    seen = clone(whole, buffers=True)
    inner = seen.get_submodule(name)
    signature, found, problem = signature_of(inner), list[Any](), ""

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = pytree.tree_map(_copied, (args, kwargs))
        if args and kwargs:  # inputs= are the ones or the others
            kwargs = dict(signature.bind(*args, **kwargs).arguments)
        found.append(kwargs or args)

    inner.register_forward_pre_hook(note, with_kwargs=True)
    args, kwargs = cloned_arguments(call)
    try:
        with preserved(), flags_as_before(), quiet(), torch.no_grad():
            seen(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  told where the part did not run
        reraise_fatal(error)
        problem = f": {first_line(error)} at {user_line(error, whole)}"
    if not found:
        refuse_failing_call(whole, ("", *call))
        raise InputError(
            f"the example call does not run {name!r}{problem}",
            where="part=",
            remedy="name a module that the model calls as such, not one of which it calls only "
            "parts, or pass other inputs=",
        )
    return found


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _known(given: Any, found: list[Any]) -> bool:
    """Whether a call of the same structure and shapes is among others."""
    sizes = sizes_of_call(arguments(given))
    return any(sizes_of_call(arguments(other)) == sizes for other in found)


def sizes_of_call(call: Call) -> Any:
    """Structure, sizes without the batch, and data types of a call: equal where a graph is.

    Args:
        call: The (args, kwargs).
    """
    leaves, spec = pytree.tree_flatten(call)
    return spec, [(v.shape[1:], v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves]
