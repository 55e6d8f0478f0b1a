"""What `from_pretrained` would make of a model: its class built from its config, and loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.flags import flags_as_before
from depcut.capture.process_state import quiet
from depcut.capture.random_state import preserved
from depcut.rewrite.patches import PATCHES
from depcut.support.closeness import gap
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]
_ROUNDINGS = 8  # the same kernels on the same tensors: on most devices the difference is zero


def reload_problem(model: nn.Module, root: nn.Module, name: str, call: Call) -> str | None:
    """Why `from_pretrained` would not bring a model back as it is, if it would not.

    The model's class, without patches, is built from the config on the meta device, whose shapes
    must be the model's; then the library loads the model's own tensors into it, and it must
    compute what the model computes.

    Args:
        model: A model of transformers, or of a library with its conventions.
        root: The whole that it is a part of, or itself; a clone of it runs.
        name: Of the model in the whole, "" for itself.
        call: What the whole is called with, (args, kwargs); the tensors may be written to.
    """
    kind = stock_class(model)
    try:
        with _undisturbed():
            problem = _other_shapes(model, kind)
            if problem or next(iter(model.state_dict().values())).is_meta:
                return problem
            made = _loaded(model, kind)
            return _other_buffers(model, made) or _other_results(root, name, call, made)
    except Exception as error:  # noqa: BLE001  (whatever a class or the library raises is the reason)
        reraise_fatal(error)
        return f"{kind.__name__} made from its config fails: {first_line(error)}"


def stock_class(model: nn.Module) -> Any:
    """The class of a model without what was patched in it.

    Args:
        model: Any model.
    """
    kind = type(model)
    while PATCHES in vars(kind):
        kind = kind.__bases__[0]
    return kind


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing is printed, no gradient taken, and the process is as before."""
    with preserved(), flags_as_before(), quiet(), torch.no_grad():
        yield


def _other_shapes(model: nn.Module, kind: Any) -> str | None:
    with torch.device("meta"):
        made = kind(copy.deepcopy(model.config)).state_dict()
    own = model.state_dict()
    missing = sorted({*made} - {*own})
    if missing:
        return f"its config builds {missing[0]}, which is gone{_more(missing)}"
    left = sorted({*own} - {*made})
    if left:
        return f"its config builds no {left[0]}{_more(left)}"
    wrong = [n for n, tensor in own.items() if tensor.shape != made[n].shape]
    if not wrong:
        return None
    is_now, was = (" x ".join(map(str, d[wrong[0]].shape)) for d in (own, made))
    return f"{wrong[0]} is {is_now}, its config builds {was}{_more(wrong)}"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _loaded(model: nn.Module, kind: Any) -> nn.Module:
    """The library's own loading, of tensors that are in memory: they are shared, not copied."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    device = next(iter(tensors.values())).device
    # Without a map, the library would copy tensors of another device to the CPU.
    mapped = device.type != "cpu" and find_spec("accelerate") is not None
    given = {"device_map": {"": device}} if mapped else {}
    config = copy.deepcopy(model.config)
    made = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=model.dtype, **given
    )
    made.to(device)
    # A file has one precision; what the model keeps in another is no matter of its config.
    made.load_state_dict(tensors, assign=True)
    return made  # type: ignore[no-any-return]


def _other_buffers(model: nn.Module, made: nn.Module) -> str | None:
    """A buffer that is in no file and has another value, such as the frequencies of positions."""
    computed = dict(made.named_buffers())
    for name, buffer in model.named_buffers():
        other = computed.get(name)
        if other is None:
            return f"its config builds no {name}"
        if other.shape != buffer.shape:
            return f"{name} is {tuple(buffer.shape)}, its config computes {tuple(other.shape)}"
        if _differ(buffer, other):
            return f"{name} has other values than its config computes"
    return None


def _other_results(root: nn.Module, name: str, call: Call, made: nn.Module) -> str | None:
    seen: list[Call] = []
    results: list[Any] = []
    runs = clone(root, buffers=True)
    part = runs.get_submodule(name)
    part.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(cloned_arguments((args, kwargs))), with_kwargs=True
    )
    part.register_forward_hook(lambda _, __, result: results.append(result))
    runs(*call[0], **call[1])
    if not results:  # no example reaches it: its shapes are all that is known
        return None
    args, kwargs = seen[0]
    pairs = zip(_tensors(results[0]), _tensors(made(*args, **kwargs)), strict=True)
    if any(one.shape != other.shape or _differ(one, other) for one, other in pairs):
        return "made from its config, it computes something else"
    return None


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _differ(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return not torch.equal(one, other)
    return gap(one, other.to(one)).relative > _ROUNDINGS * torch.finfo(one.dtype).eps
