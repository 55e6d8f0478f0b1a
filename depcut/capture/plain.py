"""A plain module in place of one whose tensors are spread: over processes, devices, or on disk.

What `fully_shard` shards and what accelerate offloads is put together tensor by tensor, in files
that are mapped into memory: what is not being read need not be in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from depcut.capture.clone import clone
from depcut.capture.held import held_tensors
from depcut.capture.refusals import check_module
from depcut.errors import InputError
from depcut.support import accelerate_private, sharded
from depcut.support.mapped import MappedTensors
from depcut.support.processes import ALONE, Processes, processes, together
from depcut.support.torch_private import buffers_of, hook_tables, parameters_of
from depcut.support.unwrap import unwrapped

ModelT = TypeVar("ModelT", bound=nn.Module)

# Plain modules made here: the module that each stands for, and what spreads its tensors.
_ORIGINS: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], str]] = (
    weakref.WeakKeyDictionary()
)


def spread_by(model: nn.Module) -> str:
    """What spreads the tensors of a model, "" where they are its own.

    Args:
        model: The model; it is only read.
    """
    if any(sharded.is_sharded(p) for p in model.parameters()):
        return "fully_shard" if sharded.fsdp_modules(model) else "DTensor"
    if sharded.fsdp_modules(model):
        return "fully_shard"
    offloaded = any(hook.weights_map is not None for _, hook in accelerate_private.hooks(model))
    return "accelerate's device_map" if offloaded or hasattr(model, "hf_device_map") else ""


def spread_over_processes(model: nn.Module) -> bool:
    """Whether each of several processes holds a part of a model.

    Args:
        model: What a user passed as a model; it is only read.
    """
    return spread_by(unwrapped(model)) in ("fully_shard", "DTensor")


def check_whole(model: object, name: str = "model") -> nn.Module:
    """As `check_module`, for calls that run the module: one in parts is refused, too.

    Args:
        model: What the user passed.
        name: As what.

    Raises:
        InputError: It is no module, or each of several processes holds a part of it.
    """
    module = check_module(model, name)
    if spread_over_processes(module):
        refuse_spread(module)
    sharded.refuse_fsdp1(module)
    return module


def refuse_spread(model: nn.Module) -> None:
    """Refuse a model whose tensors are not its own, where nothing puts them together.

    Args:
        model: The model.

    Raises:
        InputError: Its tensors are spread, or wrapped by FullyShardedDataParallel.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        return  # to be refused by what takes it
    sharded.refuse_fsdp1(model)
    what = spread_by(model)
    if what:
        raise InputError(
            f"the tensors of the model are spread by {what}",
            where=type(model).__name__,
            remedy="depcut.analyze, depcut.shrink, Plan.apply and depcut.save put them together "
            "one by one; train it in a loop of your own, or pass a plain model here",
        )


def plain(model: ModelT) -> ModelT:
    """The model without its wrappers; where its tensors are spread, a plain one that stands for it.

    Of a sharded model, every process makes the same call.

    Args:
        model: What a user passed as a model; it is only read.

    Raises:
        InputError: It is wrapped by FullyShardedDataParallel, the older one.
        DepcutError: There is no room for the files.
    """
    model = unwrapped(model)
    given: object = model
    if not isinstance(given, nn.Module):
        return model  # to be refused by what takes it
    sharded.refuse_fsdp1(model)
    what = spread_by(model)
    if not what:
        return model
    in_parts = what != "accelerate's device_map"
    everyone = processes() if in_parts else ALONE
    with together(in_parts):
        shapes = {n: list(t.shape) for n, t in held_tensors(model).items()}
        everyone.require_same("models", shapes)
        stand_ins = _tensors(model, everyone)
    out = _without_hooks(model, stand_ins)
    _ORIGINS[out] = weakref.ref(model), what
    return out


def origin_of(model: nn.Module) -> nn.Module:
    """The module that a plain one stands for; any other as it is.

    Args:
        model: A module.
    """
    known = _ORIGINS.get(model) if isinstance(model, nn.Module) else None
    return (known and known[0]()) or model


def spread_note(model: nn.Module) -> tuple[str, ...]:
    """Whether a result is spread as the model was, or plain, for the report.

    Args:
        model: The dense model, as it was rewritten.
    """
    known = _ORIGINS.get(model) if isinstance(model, nn.Module) else None
    if known is None:
        return ()
    if known[1] == "fully_shard":
        return ("the model was sharded by fully_shard, and so is the result, module by module",)
    return (f"the model was spread by {known[1]}; the result is a plain module on the CPU",)


@contextmanager
def _files(everyone: Processes) -> Iterator[MappedTensors]:
    """Files to fill, without names when the block has ended."""
    files = MappedTensors(everyone)
    try:
        yield files
    except BaseException:
        files.remove()
        raise
    files.close()


def _tensors(model: nn.Module, everyone: Processes) -> dict[int, torch.Tensor]:
    """A plain tensor on the CPU for every tensor of a model that is not one, by its id."""
    out: dict[int, torch.Tensor] = {}
    known: dict[object, torch.Tensor] = {}  # by address: tensors that share memory stay one
    elsewhere = accelerate_private.offloaded(model)
    shards = sharded.shards_of(model)
    managed = {id(p) for m in sharded.fsdp_modules(model) for p in m.parameters()}
    key: object
    with _files(everyone) as files:
        for tensor in _distinct(model):
            if id(tensor) in elsewhere:
                value = elsewhere[id(tensor)]()
                key = (value.data_ptr(), value.shape, value.stride())
                if value.device.type == "cpu" and key in known:
                    out[id(tensor)] = known[key]
                    continue
                if value.device.type != "cpu":
                    value = files.put(value)
            elif sharded.is_sharded(held := shards.get(id(tensor), tensor)):
                key, value = id(tensor), files.put(sharded.whole(held))
            elif id(tensor) in managed or tensor.device.type not in ("cpu", "meta"):
                key, value = id(tensor), files.put(tensor.detach())
            else:
                continue
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            out[id(tensor)] = known[key] = value
    return out


def _distinct(model: nn.Module) -> list[torch.Tensor]:
    found = {id(t): t for t in held_tensors(model).values()}
    return list(found.values())


class _Nothing:
    """Stands for what a plain module goes without."""

    def __call__(self, *_: object, **__: object) -> None:
        """What a hook does that is not there."""


_NOTHING = _Nothing()


def _without_hooks(model: ModelT, stand_ins: dict[int, torch.Tensor]) -> ModelT:
    """A clone with other tensors, without what gathers or moves those of the model."""
    memo: dict[int, Any] = dict(stand_ins)
    left: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for table in hook_tables(module):
            memo.update((id(h), _NOTHING) for h in table.values() if sharded.is_own_hook(h))
        fields = vars(module)
        left[path] = [*accelerate_private.added(module), *sharded.records(module)]
        memo.update((id(fields[name]), _NOTHING) for name in left[path])
    out = clone(model, training=None, memo=memo)
    for path, module in out.named_modules():
        tables = hook_tables(module)
        gone = [number for table in tables for number, h in table.items() if h is _NOTHING]
        for table in tables:
            for number in gone:
                table.pop(number, None)
        fields = vars(module)
        for name in left[path]:
            del fields[name]
        old = fields.pop(accelerate_private.OLD_FORWARD, None)
        if old is not None:
            fields["forward"] = old
        sharded.make_plain(module)
        _take_values(module, stand_ins)
    return out


def _take_values(module: nn.Module, stand_ins: dict[int, torch.Tensor]) -> None:
    """Make sure that no tensor of a clone is one that something stands for."""
    tables: tuple[dict[str, Any], ...] = (parameters_of(module), buffers_of(module))
    for held in tables:
        for name, tensor in held.items():
            if tensor is not None and id(tensor) in stand_ins:
                held[name] = stand_ins[id(tensor)]
