"""Structural clones and deep copies: what is copied, what is shared, what is bound anew."""

from __future__ import annotations

import enum
import functools
import threading
import time
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from depcut.capture.clone import clone, cloned_arguments
from depcut.rewrite.copying import copied

BOTH = pytest.mark.parametrize(
    "copy", [clone, lambda model: copied(model, {})], ids=["clone", "copy"]
)


class Holder(nn.Module):
    """A layer, and whatever else hangs from it."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls = 0
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)

    def note(self, *_: Any) -> None:
        self.calls += 1


def norm_of_weight() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "parametrization": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
    "weight norm by a hook": norm_of_weight,
    "spectral norm by a hook": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4))),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))),
    "recurrent": lambda: nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True)),
    "traced": lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU())),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2
    ),
    "prune": lambda: nn.Sequential(
        nn.utils.prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5)
    ),
}


@BOTH
@pytest.mark.parametrize("name", NETS)
def test_a_copy_computes_the_same_and_shares_no_module(
    name: str, copy: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = NETS[name]().eval()
    x = torch.randn(2, 5, 6) if name == "transformer" else torch.randn(2, 3)
    wanted = model(x)
    made = copy(model).eval()
    got, wanted = (y[0] if isinstance(y, tuple) else y for y in (made(x), wanted))
    assert torch.equal(got, wanted)
    assert type(made) is type(model) or isinstance(model, fx.GraphModule)
    assert not {id(m) for m in made.modules()} & {id(m) for m in model.modules()}
    assert list(made.state_dict()) == list(model.state_dict())
    shared = [a is b for a, b in zip(made.parameters(), model.parameters(), strict=True)]
    assert set(shared) == {copy is clone}


def test_clones_share_tensors_or_have_buffers_or_flags_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    model.register_buffer("view", model[1].running_mean[1:])
    model[0].weight.grad = torch.ones(3, 3)
    plain, values = clone(model), clone(model, buffers=True)
    assert all(a is b for a, b in zip(plain.buffers(), model.buffers(), strict=True))
    assert values[0].weight is model[0].weight
    values[1].running_mean.add_(1.0)
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(values.view, torch.ones(2)), "views of one storage stay that"
    free = clone(model, requires_grad=True)
    model[0].weight.requires_grad_(False)
    assert free[0].weight.requires_grad
    assert free[0].weight.grad is None
    assert free[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert not any(p.requires_grad for p in clone(model, requires_grad=False).parameters())
    assert [m.training for m in clone(model, training=["1"]).modules()] == [False, False, True]
    assert all(m.training for m in clone(model, training=None).modules())
    assert all(m.training for m in model.modules())


@BOTH
def test_tied_modules_and_tensors_stay_tied(copy: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(3, 3)})
    model["c"].weight = layer.weight
    made = copy(model)
    assert made["a"] is made["b"]
    assert made["c"].weight is made["a"].weight


def test_parameters_with_stand_ins_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    made = clone(model, requires_grad=True)
    assert made[0].weight is made[1].weight is not model[0].weight


@BOTH
def test_hooks_run_on_the_copy(copy: Callable[[nn.Module], nn.Module]) -> None:
    model = Holder()
    model.layer.register_forward_hook(model.note)
    model.layer.register_forward_hook(functools.partial(Holder.note, model))
    model.layer.register_forward_hook(lambda *_: model.note())
    made = copy(model)
    made(torch.ones(1, 3))
    assert (model.calls, made.calls) == (0, 4)


def test_what_hooks_close_over_is_copied_for_clones_alone() -> None:
    seen: list[int] = []
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        seen.append(count)

    def again(depth: int = 2) -> int:
        return again(depth - 1) if depth else len(seen)

    model = Holder(again=again)
    model.layer.register_forward_hook(hook)
    made = clone(model)
    made(torch.ones(1, 3))
    made(torch.ones(1, 3))
    assert (count, seen, made.again(), model.again()) == (0, [], 2, 0)
    copied(model, {})(torch.ones(1, 3))
    assert (count, seen) == (1, [1])


@dataclass
class Record:
    values: list[int] = field(default_factory=list)
    owner: Any = None


class Slotted:
    __slots__ = ("__hidden", "items", "unset")

    def __init__(self) -> None:
        self.items, self.__hidden = [1], [2]

    def hidden(self) -> list[int]:
        return self.__hidden


class SlottedLayer(nn.Linear):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.extra = [1]


class Forgets:
    """Stores less than it needs to run."""

    def __init__(self) -> None:
        self.cache = {1: [2]}

    def __getstate__(self) -> dict[str, Any]:
        return {}


class OwnCopy:
    def __init__(self) -> None:
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = OwnCopy()
        made.copies = self.copies + 1
        return made


class Refuses:
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise NotImplementedError


class Finalized:
    def __del__(self) -> None: ...


class Point(NamedTuple):
    at: list[int]


class Kind(enum.Enum):
    A = [1]  # noqa: RUF012


class Missing: ...


MISSING = Missing()


class Tensors(dict):  # type: ignore[type-arg]
    """A mapping of one's own, with an attribute."""


def test_plain_state_is_copied() -> None:
    tensors = Tensors(a=torch.ones(2))
    tensors.note = [1]  # type: ignore[attr-defined]
    held = {
        "record": Record([1]),
        "slotted": Slotted(),
        "forgets": Forgets(),
        "own": OwnCopy(),
        "tensors": tensors,
        "default": defaultdict(list, a=[1]),
        "ordered": OrderedDict(a=[1]),
        "counter": Counter("aab"),
        "queue": deque([[1]], maxlen=3),
        "point": Point([1]),
        "nested": ({"a": [[1], {2}, frozenset((3,))]},),
        "array": np.ones(2),
        "draws": np.random.default_rng(0),
        "generator": torch.Generator().manual_seed(3),
        "keys": {Kind.A: [1], (1, "a"): [2]},
        "append": [].append,
    }
    model = Holder(**held)
    made = clone(model)
    for name, value in held.items():
        assert getattr(made, name) is not value, name
        assert type(getattr(made, name)) is type(value), name
    made.record.values.append(2)
    made.slotted.items.append(2)
    made.slotted.hidden().append(3)
    made.default["b"].append(1)
    made.queue[0].append(2)
    made.nested[0]["a"][0].append(2)
    made.array[0] = 2
    made.tensors.note.append(2)
    made.generator.manual_seed(4)
    made.draws.random()
    assert (model.record, model.slotted.items) == (Record([1]), [1])
    assert (model.slotted.hidden(), list(model.default), model.queue) == ([2], ["a"], deque([[1]]))
    assert (model.nested[0]["a"][0], model.array[0], model.tensors.note) == ([1], 1.0, [1])
    assert model.generator.initial_seed() == 3
    assert model.draws.random() == np.random.default_rng(0).random()
    assert made.own.copies == 1
    assert made.forgets.cache == {1: [2]}, "a clone has what its code needs in a forward"
    assert made.forgets.cache[1] is not model.forgets.cache[1]
    assert made.tensors["a"] is model.tensors["a"]
    assert made.keys == model.keys
    assert made.queue.maxlen == 3


@BOTH
def test_what_cannot_be_copied_is_shared(
    copy: Callable[[nn.Module], nn.Module], tmp_path: Any
) -> None:
    with (tmp_path / "file").open("w") as file:
        held = {
            "lock": threading.Lock(),
            "file": file,
            "generated": (i for i in range(2)),
            "refuses": Refuses(),
            "library": np,
            "kind": Kind.A,
            "missing": MISSING,
            "finalized": Finalized(),
            "function": torch.relu,
            "size": torch.Size((1, 2)),
        }
        made = copy(Holder(inside=Record(owner=[held["lock"]]), **held))
    for name, value in held.items():
        if (name, copy) != ("missing", copied):
            assert getattr(made, name) is value, name
    assert made.inside.owner[0] is held["lock"]


def test_modules_copy_what_their_class_would_leave_out() -> None:
    class Stored(nn.Linear):
        def __getstate__(self) -> dict[str, Any]:
            return {}

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

    layer = SlottedLayer()
    made = clone(nn.Sequential(Stored(3, 3), layer))
    assert torch.equal(made[0](torch.ones(1, 3)), made[0](torch.ones(1, 3)))
    made[1].extra.append(2)
    assert layer.extra == [1]


@BOTH
def test_references_into_the_model_point_into_the_copy(
    copy: Callable[[nn.Module], nn.Module],
) -> None:
    model = Holder(record=Record())
    outside = nn.Linear(3, 3)
    model.record.owner = model
    model.parent = weakref.ref(model.layer)
    model.other = weakref.ref(outside)
    model.list = [model.layer, (model.layer,), {model.layer: 1}]
    model.cached = functools.lru_cache(model.forward)
    made = copy(model)
    assert made.record.owner is made
    assert made.parent() is made.layer
    assert made.other() is outside
    assert made.list[0] is made.list[1][0] is next(iter(made.list[2])) is made.layer
    made.cached(torch.ones(1, 3))
    assert (model.calls, made.calls, model.cached.cache_info().currsize) == (0, 1, 0)


def test_removing_a_hook_of_the_clone_leaves_the_model_alone() -> None:
    model = Holder()
    model.handle = model.layer.register_forward_hook(model.note)
    made = clone(model)
    made.handle.remove()
    assert len(made.layer._forward_hooks) == 0
    assert len(model.layer._forward_hooks) == 1


def test_depth_is_no_recursion_and_a_cycle_is_no_loop() -> None:
    chain: list[Any] = []
    for _ in range(5000):
        chain = [chain, Record(owner=chain)]
    loop: dict[str, Any] = {}
    loop["self"] = [loop]
    made = clone(Holder(chain=chain, loop=loop))
    assert made.loop["self"][0] is made.loop
    assert made.chain[1].owner is made.chain[0]


def test_results_of_a_forward_are_shared_by_clones_and_leaves_in_copies() -> None:
    model = Holder()
    model.latest = model(torch.ones(1, 3))
    model.history = [model.latest]
    assert clone(model).latest is model.latest
    assert not clone(model, buffers=True).latest.requires_grad
    made = copied(model, {})
    assert made.latest.is_leaf
    assert made.history[0] is made.latest


def test_meta_tensors_are_copied_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert clone(model, buffers=True)[1].running_mean.is_meta
    assert copied(model, {})[0].weight.is_meta


def test_a_lazy_layer_of_a_clone_alone_gets_its_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    made = clone(model)
    assert made(torch.ones(2, 3)).shape == (2, 4)
    assert type(made[0]) is nn.Linear
    assert type(model[0]) is nn.LazyLinear
    assert nn.parameter.is_lazy(model[0].weight)
    assert len(model[0]._forward_pre_hooks) == 1


def test_arguments_are_copied_alike() -> None:
    x, cache = torch.ones(2), Record([1])
    args, kwargs = cloned_arguments(((x,), {"cache": cache, "mask": [x]}))
    kwargs["cache"].values.append(2)
    assert args[0] is kwargs["mask"][0] is x
    assert cache.values == [1]


def test_a_clone_is_made_while_another_thread_fills_a_cache() -> None:
    model = Holder(cache={}, default=defaultdict(list))
    stop = threading.Event()

    def fill() -> None:
        while not stop.is_set():
            for i in range(500):
                model.cache[i] = [i]
                model.default[i].append(i)
            model.cache.clear()
            model.default.clear()

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        for _ in range(200):
            made = clone(model)
            assert made.cache is not model.cache
            assert made.default is not model.default
    finally:
        stop.set()
        thread.join()


def test_cloning_is_quick_whatever_hangs_from_the_model() -> None:
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(150)]
    model = nn.Sequential(*blocks)
    model.words = {str(i): i for i in range(200_000)}
    model.merges = [f"{i} {i}" for i in range(200_000)]
    clone(model)
    started = time.process_time()
    made = clone(model)
    assert time.process_time() - started < 0.5  # 0.03 s on an idle machine
    assert made.words == model.words
    assert made.words is not model.words
