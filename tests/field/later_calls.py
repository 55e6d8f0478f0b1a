"""Later calls of a slim model and of its dense one: what came of each.

Half of the units of some groups contribute nothing, so that the model without them means the same
in every call, whatever its mode, precision or inputs.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from later_nets import Choose, NetSource, loaded, written
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import depcut
from depcut.dead_units import Compaction, compaction
from depcut.errors import DepcutError
from depcut.rewrite.generated import GeneratedModule

BATCH, LENGTH, IMAGE = 2, 6, (4, 6)


@dataclass(frozen=True)
class Given:
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, *where: Any) -> Given:
        """The arguments on another device; floating-point ones in another dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if isinstance(where[0], torch.dtype) and not value.is_floating_point():
                return value
            return value.to(*where)

        return Given(tuple(map(moved, self.args)), {k: moved(v) for k, v in self.kwargs.items()})

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Pair:
    """A net with dead units, and the one without them."""

    source: NetSource
    dense: nn.Module
    slim: nn.Module
    compaction: Compaction
    example: Given

    @property
    def generated(self) -> list[str]:
        """Modules of the slim net that are generated code."""
        return [n for n, m in self.slim.named_modules() if isinstance(m, GeneratedModule)]


# Nets with dead units -----------------------------------------------------------------------------


def values(
    source: NetSource, batch: int, length: int, image: tuple[int, int] = IMAGE, seed: int = 0
) -> Tensor:
    """An input of a net."""
    generator = torch.Generator().manual_seed(seed + 100)
    if source.kind == "ids":
        return torch.randint(0, 11, (batch, length), generator=generator)
    shape = (batch, 3, *image) if source.kind == "images" else (batch, length, 5)
    return torch.randn(shape, generator=generator)


def padding(batch: int, length: int) -> Tensor:
    """Whether each position of each example is padding: more and more of them from the end."""
    return torch.arange(length)[None] >= length - torch.arange(batch)[:, None] % max(length, 1)


def deadened(net: nn.Module, given: Given, pick: Choose) -> None:
    """Set all parameters of half of the units of some groups to zero."""
    analysis = depcut.analyze(net, given.args)
    kept: dict[str, Any] = {}
    for group in analysis.groups:
        if pick([True, True, True, False]):
            every = np.arange(group.size)
            some = pick([every[: -(-group.size // 2)], every[group.size // 2 :], every[::2]])
            try:
                analysis.plan_keeping({**kept, group.name: some})
            except DepcutError:
                continue
            kept[group.name] = some
    indices = analysis.plan_keeping(kept).tensor_indices()
    with torch.no_grad():
        for name, parameter in net.named_parameters(remove_duplicate=False):
            stays = torch.zeros_like(parameter)
            stays[mesh(parameter, indices[name])] = 1
            parameter.mul_(stays)


def mesh(tensor: Tensor, indices: Any) -> Any:
    """Index arrays that broadcast to what stays of a tensor."""
    out: list[Tensor] = []
    for dim, kept in enumerate(indices):
        array = np.arange(tensor.shape[dim]) if kept is None else np.asarray(kept)
        if array.ndim < tensor.ndim:
            array = array.reshape([-1 if i == dim else 1 for i in range(tensor.ndim)])
        out.append(torch.as_tensor(array))
    return tuple(out)


def pair(pick: Choose, folder: Path) -> Pair:
    """A drawn net, half of the units of some groups dead, and the same without them."""
    source = written(pick)
    torch.manual_seed(0)
    net = loaded(source, folder).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
            elif "norm" not in name:
                parameter.uniform_(-0.3, 0.3)
    example = Given((values(source, BATCH, LENGTH),))
    if source.masked and pick([False, False, True]):
        example = Given((*example.args, padding(BATCH, LENGTH)))
    example(net)
    deadened(net, example, pick)
    found = compaction(net, example.args)
    return Pair(source, net, found.apply(), found, example)


# Calls --------------------------------------------------------------------------------------------


def inputs(pair: Pair, name: str, seed: int) -> Given | None:
    """The arguments of a later call by name; None where the net has no such call."""
    source, images = pair.source, pair.source.kind == "images"
    batch = int(name[-1]) if name.startswith("batch") else BATCH
    length = {"shorter": 4, "longer": 9, "long": 16, "single": 1}.get(name, LENGTH)
    image = {"shorter": (2, 4), "longer": (6, 8), "long": (8, 8), "single": (2, 2)}.get(name, IMAGE)
    x = values(source, batch, length, image, seed)
    tokens = image[0] * image[1] // 4 if images else length
    mask = None
    if len(pair.example.args) > 1 and name != "unmasked":
        mask = padding(batch, tokens)
    if name in ("padding", "additive", "causal", "unmasked", "keyword") and not source.masked:
        return None
    if name == "unmasked" and len(pair.example.args) < 2:
        return None
    if name == "padding":
        mask = padding(batch, tokens)
    elif name == "causal":
        mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    elif name == "additive":
        generator = torch.Generator().manual_seed(seed)
        mask = torch.randn(tokens, tokens, generator=generator)
    if name == "unbatched":
        x = x[0]
        mask = None
    if name == "gain":
        if "gain=" not in source.text:
            return None
        return Given((x,), {"gain": 2.0, **({} if mask is None else {"mask": mask})})
    if name == "keyword":
        return Given((), {"x": x, "mask": mask})
    if name == "strided":
        x = x.flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
    return Given((x,) if mask is None else (x, mask))


INPUTS = (
    "same", "shorter", "longer", "long", "single", "batch1", "batch3", "batch5", "batch0",
    "padding", "causal", "additive", "unmasked", "unbatched", "keyword", "gain", "strided",
)  # fmt: skip


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in ("p", "dropout", "dropout_p"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def _train(model: nn.Module, given: Given) -> Any:
    return given(_without_dropout(copy.deepcopy(model)).train())


def _drawn(model: nn.Module, given: Given) -> Any:
    torch.manual_seed(3)
    out = given(copy.deepcopy(model).train())
    return out, torch.get_rng_state()


def _in_dtype(dtype: torch.dtype) -> Callable[[nn.Module, Given], Any]:
    def run(model: nn.Module, given: Given) -> Any:
        return given.to(dtype)(copy.deepcopy(model).to(dtype))

    return run


def _autocast(model: nn.Module, given: Given) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return given(model)


def _meta(model: nn.Module, given: Given) -> Any:
    return given.to("meta")(copy.deepcopy(model).to("meta"))


def _under(context: Callable[[], Any]) -> Callable[[nn.Module, Given], Any]:
    def run(model: nn.Module, given: Given) -> Any:
        with context():
            return given(model)

    return run


def _pickled(model: nn.Module, given: Given) -> Any:
    return given(pickle.loads(pickle.dumps(model)))  # noqa: S301


def _saved(model: nn.Module, given: Given) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return given(torch.load(io.BytesIO(file.getvalue()), weights_only=False))


def _state_dict(model: nn.Module, given: Given) -> Any:
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    fresh.load_state_dict(model.state_dict())
    return given(fresh)


def _differentiated(model: nn.Module, given: Given, through: Any = None) -> Any:
    """The output, and the gradients of the inputs and of the parameters, by name."""
    model = copy.deepcopy(model)
    args = tuple(
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in given.args
    )
    out = Given(args, given.kwargs)(model) if through is None else through(model, args, given)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return out.detach(), [getattr(a, "grad", None) for a in args], grads


def _checkpointed(model: nn.Module, args: tuple[Any, ...], given: Given) -> Any:
    return checkpoint(model, *args, use_reentrant=False, **given.kwargs)


def _trained(model: nn.Module, given: Given) -> Any:
    """The gradients in training mode."""
    model = _without_dropout(copy.deepcopy(model)).train()
    return _differentiated(model, given)


def _exported(model: nn.Module, given: Given) -> Any:
    program = torch.export.export(copy.deepcopy(model), given.args, given.kwargs, strict=False)
    return given(program.module())


def _shrunk(model: nn.Module, given: Given) -> Any:
    """The shape of what a smaller one still gives."""
    keywords = {k: v for k, v in given.kwargs.items() if v is not None}
    return given(depcut.shrink(model, 0.2, given.args or keywords)).to("meta")


def _threaded(model: nn.Module, given: Given) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(given(model))
        except Exception as error:  # noqa: BLE001
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


CONTEXTS: dict[str, Callable[[nn.Module, Given], Any]] = {
    "eval": lambda model, given: given(model),
    "train": _train,
    "dropout": _drawn,
    "double": _in_dtype(torch.float64),
    "half": _in_dtype(torch.float16),
    "bfloat16": _in_dtype(torch.bfloat16),
    "autocast": _autocast,
    "meta": _meta,
    "no_grad": _under(torch.no_grad),
    "inference_mode": _under(torch.inference_mode),
    "pickle": _pickled,
    "save": _saved,
    "deepcopy": lambda model, given: given(copy.deepcopy(model)),
    "state_dict": _state_dict,
    "gradients": _differentiated,
    "trained": _trained,
    "checkpoint": lambda model, given: _differentiated(model, given, _checkpointed),
    "export": _exported,
    "shrink": _shrunk,
    "thread": _threaded,
}
LOW = {"half", "bfloat16", "autocast"}


# Outcomes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        kind: "right", "wrong", "refused", "raw"; "skipped" where the dense model refuses the call.
        detail: What differed, or was raised.
    """

    kind: str
    detail: str = ""


def later(pair: Pair, given: str, context: str, seed: int = 1) -> Outcome:
    """What comes of a later call of the slim model.

    Args:
        pair: The dense and the slim model.
        given: Name of the arguments, of `INPUTS`.
        context: Name of the way to call, of `CONTEXTS`.
        seed: Of the values.
    """
    arguments = inputs(pair, given, seed)
    if arguments is None:
        return Outcome("skipped", "no such call")
    run = CONTEXTS[context]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = run(pair.dense, arguments)
        except Exception as error:  # noqa: BLE001  (whatever the dense model refuses is skipped)
            return Outcome("skipped", f"{type(error).__name__}: {error}")
        try:
            actual = run(pair.slim, arguments)
        except DepcutError as error:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        except Exception:  # noqa: BLE001  (an outcome)
            return Outcome("raw", traceback.format_exc())
        try:
            return _compared(pair, context, arguments, expected, actual)
        except AssertionError as error:
            return Outcome("wrong", str(error))


def _compared(pair: Pair, context: str, given: Given, expected: Any, actual: Any) -> Outcome:
    if context == "dropout":
        (expected, after), (actual, now) = expected, actual
        if not torch.equal(after, now):  # other shapes were drawn
            expected, actual = expected.to("meta"), actual.to("meta")
    if isinstance(expected, tuple):
        _compare_gradients(pair, expected, actual)
        expected, actual = expected[0], actual[0]
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    if expected.device.type == "meta":
        return Outcome("right", "shapes")
    if context in LOW:
        exact = _in_dtype(torch.float64)(pair.dense, given)
        own = float((expected - exact).abs().nan_to_num().max()) if exact.numel() else 0.0
        _close(actual, exact, 4 * own + 0.03 * _scale(exact), "output")
    else:
        bound = 1e-9 if context == "double" else 1e-4
        _close(actual, expected, bound * _scale(expected), "output")
    return Outcome("right")


def _scale(tensor: Tensor) -> float:
    if not tensor.numel():
        return 1.0
    return max(1e-3, float(tensor.detach().double().nan_to_num().abs().max()))


def _close(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    off = (actual - expected).abs()
    same = (off <= bound) | (actual.isnan() & expected.isnan()) | (actual == expected)
    assert bool(same.all()), f"{what}: off by {float(off.nan_to_num(9e9).max()):.3g}, {bound:.3g}"


def _compare_gradients(pair: Pair, expected: Any, actual: Any) -> None:
    """Gradients of inputs and of what was kept of each parameter."""
    for i, (mine, theirs) in enumerate(zip(actual[1], expected[1], strict=True)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            _close(mine, theirs, 1e-4 * _scale(theirs), f"gradient of input {i}")
    indices = pair.compaction.plan.tensor_indices()
    largest = max(_scale(g) for g in expected[2].values() if g is not None)
    for name, mine in actual[2].items():
        theirs = expected[2][name]
        if mine is None and theirs is not None and not float(theirs.abs().max()):
            continue
        assert (mine is None) == (theirs is None), f"gradient of {name}: {mine} {theirs}"
        if mine is not None:
            kept = theirs[mesh(theirs, indices[name])]
            assert mine.shape == kept.shape, f"gradient of {name}: {mine.shape}, {kept.shape}"
            _close(mine, kept, 1e-4 * largest, f"gradient of {name}")
