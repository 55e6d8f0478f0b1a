"""1,000 wrong calls, plan files and command lines: an error of depcut's own, or a sensible success.

A case is drawn from its number alone. What may succeed is listed in `fuzz_takes`; all else must be
refused, so that no argument is left aside without a word.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import math
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_calls import CALLS, net, plan
from fuzz_models import EXCEPTIONS, INPUTS, MODELS_MODULE, RaisesWhenNarrow, holding
from fuzz_pool import POOL
from fuzz_takes import CALLERS_OWN, QUICK, taken
from selection import swept
from torch import nn

import depcut
from depcut.cli.main import main
from depcut.errors import DepcutError

Case = Callable[[random.Random], str]
TRIALS = 1000


def _refused(error: DepcutError, what: object) -> str:
    """The kind of an error that says what to do."""
    assert error.remedy, what
    return type(error).__name__


def _states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    drawn = torch.get_rng_state().numpy().tobytes(), random.getstate()
    switches = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    return (*drawn, kind, keys.tobytes(), *rest, *switches, list(warnings.filters), Path.cwd())


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Tensors by value, attributes by identity: some of them cannot say what they are."""
    state: dict[str, Any] = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            state[f"{path}.{key}"] = id(value)
        held = (*module._parameters.values(), *module._buffers.values())
        state[f"{path} holds"] = [(id(t), t is not None and t.requires_grad) for t in held]
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state[f"{path} hooks"] = [list(map(id, h.values())) for h in hooks]
    return state


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@contextlib.contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Models, random states, flags and warnings' filters are the same afterwards."""
    before, states = [_state_of(m) for m in models], _states()
    try:
        yield
    finally:
        assert _states() == states, "the state of the process"
        for model, state in zip(models, before, strict=True):
            now = _state_of(model)
            assert now.keys() == state.keys()
            assert [n for n in now if not _same(now[n], state[n])] == []


# Arguments ----------------------------------------------------------------------------------------


def wrong_argument(draw: random.Random, names: list[str] | None = None) -> str:
    """One or two arguments of a public function, drawn from the pool."""
    name = draw.choice(names or list(CALLS))
    call = CALLS[name]
    arguments = call.arguments()
    changed = draw.sample(call.names, min(len(call.names), draw.choice((1, 1, 1, 2))))
    labels = {argument: draw.choice(list(POOL)) for argument in changed}
    arguments |= {argument: POOL[label]() for argument, label in labels.items()}
    models = [m for m in arguments.values() if isinstance(m, nn.Module) and _has_shapes(m)]
    models = models if name != "Gradual" else []  # which masks the model
    what = f"{name}({', '.join(f'{k}={v}' for k, v in labels.items())})"
    try:
        with unchanged(*models):
            result = call.function(**arguments)
    except DepcutError as error:
        outcome = _refused(error, what)
    except Exception as error:
        own = {f"{name}.{argument}" for argument in changed} & CALLERS_OWN
        if not own:
            raise AssertionError(f"{what} raised {type(error).__name__}") from error
        outcome = "the caller's own"
    else:
        left_aside = [f"{a}={v}" for a, v in labels.items() if not taken(name, a, v)]
        assert not left_aside, f"{what} took {left_aside}"
        assert not call.refused, what
        _check_result(result, what)
        outcome = "success"
    return outcome


def _has_shapes(model: nn.Module) -> bool:
    return not any(map(nn.parameter.is_lazy, model.parameters()))


def _check_result(result: Any, what: str) -> None:
    """A model that runs, where the result is one."""
    if isinstance(result, nn.Module) and not isinstance(result, nn.LazyLinear):
        x = torch.zeros(2, next(result.parameters()).shape[1])
        with torch.no_grad():
            assert torch.isfinite(result(x)).all(), what


# Models and inputs --------------------------------------------------------------------------------


def wrong_model(draw: random.Random) -> str:
    """A model that raises at new widths, or holds what cannot be copied, or gets wrong inputs."""
    kind = draw.choice(("raises", "holds", "inputs", "data"))
    model: nn.Module = net()
    given: Any = torch.ones(2, 6)
    options: dict[str, Any] = {"align": draw.choice((1, 4))}
    wrong = False
    if kind == "raises":
        model = RaisesWhenNarrow(draw.choice(list(EXCEPTIONS.values()))).eval()
    elif kind == "holds":
        holding(model, draw)
    elif kind == "inputs":
        given, wrong = draw.choice(INPUTS)(), True
    else:
        options["data"], wrong = [given, draw.choice(INPUTS)()], True
    ratio = draw.choice((0.2, 0.4, 0.6))
    try:
        with unchanged(model):
            slim = depcut.shrink(model, ratio, given, **options)
    except DepcutError as error:
        outcome = _refused(error, given)
        blamed = isinstance(error, depcut.VerificationError | depcut.RuleError)
    else:
        assert slim(torch.ones(5, 6)).shape == (5, 4)
        outcome, blamed = "success", False
    assert wrong == (outcome != "success")
    assert not blamed, "the model or a rule is blamed for the inputs"
    return outcome


# Files --------------------------------------------------------------------------------------------

_JSON: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 15, 16, 99, 10**30, 1.5, math.inf, math.nan, "", "load"),
    *("__class__", "first", "\ud800", [], {}, [[1]], [1, 2, 3], [1, 1], [None], {"a": 1}),
    *({"shape": [2, 6], "dtype": "float32"}, {"shape": [10**12], "dtype": "float32"}, [[0], [1]]),
]


def tampered_plan(draw: random.Random) -> str:
    """A plan whose file was changed, loaded and applied."""
    path = Path("plan.json")
    plan().save(path)
    text = path.read_bytes()
    if draw.random() < 0.3:
        path.write_bytes(_damaged(text, draw))
    else:
        data = json.loads(text)
        for _ in range(draw.choice((1, 1, 2))):
            _change(data, draw)
        path.write_text(json.dumps(data), encoding="utf-8")
    model = net()
    try:
        with unchanged(model):
            slim = depcut.Plan.load(path).apply(model)
    except DepcutError as error:
        outcome = _refused(error, path)
    else:
        assert slim(torch.ones(2, 6)).shape == (2, 4)
        outcome = "success"
    return outcome


def _change(data: Any, draw: random.Random) -> None:
    """One change somewhere in plain data: another value, one less, or one more."""
    places = list(_places(data))
    holder, key = draw.choice(places)
    what = draw.random()
    if what < 0.2:
        del holder[key]
    elif what < 0.35 and isinstance(holder, dict):
        holder[draw.choice(("code", "first", "", "a" * 100))] = draw.choice(_JSON)
    elif what < 0.45 and isinstance(holder, list):
        holder.insert(0, copy.deepcopy(holder[key]))
    else:
        holder[key] = copy.deepcopy(draw.choice(_JSON))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _damaged(text: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, changed, doubled, or of another format."""
    at = draw.randrange(len(text))
    return draw.choice(
        (
            text[:at],
            text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :],
            text + text,
            text.decode().encode("utf-16"),
            b"[" * draw.choice((100, 100_000)),
            b'{"kept": ' * 2000 + b"1" + b"}" * 2000,
            bytes(draw.randrange(256) for _ in range(50)),
            b"",
        )
    )


def wrong_options_file(draw: random.Random) -> str:
    """A file of options with other values, or other bytes."""
    path = Path("options.toml")
    name = draw.choice(
        ("align", "of", "score", "ratios", "ignore", "seed", "depth", "speed", "a.b")
    )
    value = draw.choice(
        ("4", "-1", '"macs"', "[1]", "{a = 1}", "nan", "1979-05-27", "true", '""', "9" * 5000, "")
    )
    text = f"{name} = {value}\n".encode()
    path.write_bytes(text if draw.random() < 0.8 else _damaged(text, draw))
    try:
        chosen = depcut.Options.read(path)
    except DepcutError as error:
        return _refused(error, path)
    assert isinstance(chosen, depcut.Options)
    return "success"


# Command line -------------------------------------------------------------------------------------

_WORDS = (
    *("-1", "0", "1", "2", "0.5", "1.5", "nan", "inf", "1e400", "9" * 40, "a", "", "None", "é"),
    *("first*=0.5", "a=b", "=", "2,6", "2,7", "99999,99999,99999", "2,6:int64", "2,6:load", "."),
    *("missing", "raw.json", "a_file", "/dev/null", "auto", "true", "macs", "latency", "9,9"),
    *("{}:net", "{}:raises", "{}:ends", "{}:number", "{}:data", "{}:text", "{}:no", "no:net"),
    *("{}", ":", "torch.nn.functional:mse_loss", "{}:endless"),
)
_FLAGS = (
    *("--seed", "--ratio", "--input-shape", "--data", "--loss", "--of", "--score", "--align"),
    *("--ignore", "--ratios", "--options", "--weights", "--batches", "--threads", "--rounds"),
    *("--allocation", "--compensate", "--pin", "--batch-size", "--runtime", "--provider"),
    *("--explain", "--plan", "--slim-weights", "--out", "--no-such", "--latency-ms"),
)
# Complete but for something that is wrong, where what follows would take long.
_STARTS = (
    *(("analyze", "{}:net"), ("shrink", "{}:net", "--out", "out", "--no-progress")),
    *(
        ("shrink", "{}:net", "--ratio", "0.5", "--out", "out"),
        ("compact", "{}:net", "--out", "out"),
    ),
    *(("export", "{}:net"), ("bench", "{}:net", "--rounds", "2"), ("demo", "--ratio", "2")),
    *(("analyze",), ("demo", "--epochs", "-1"), ()),
)


def wrong_command(draw: random.Random) -> str:
    """A command with options that are drawn."""
    words = [*draw.choice(_STARTS)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        words.append(draw.choice(_FLAGS))
        words.append(draw.choice(_WORDS))
    if "--latency-ms" in words:
        words.append("--no-such")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main([word.replace("{}", "fuzz_factories") for word in words])
        except SystemExit as end:
            code = end.code
    assert "Traceback" not in err.getvalue(), words
    if code == 0:
        assert out.getvalue().strip(), words
        return "exit 0"
    assert code == 2, words
    assert err.getvalue().strip(), words
    return "exit 2"


# All ----------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[int, Case]] = {
    "arguments": (45, wrong_argument),
    "models": (10, wrong_model),
    "plan files": (20, tampered_plan),
    "options files": (5, wrong_options_file),
    "commands": (20, wrong_command),
}


@contextlib.contextmanager
def _world(folder: Path) -> Iterator[None]:
    """A folder to work in with modules to import; nothing of the process may differ afterwards."""
    (folder / "fuzz_factories.py").write_text(MODELS_MODULE, encoding="utf-8")
    (folder / "a_file").write_text("", encoding="utf-8")
    (folder / "raw.json").write_text("{}", encoding="utf-8")
    (folder / "options.toml").write_text("align = 4\n", encoding="utf-8")
    plan().save(folder / "written.json")
    if find_spec("accelerate") is not None:
        importlib.import_module("accelerate")  # which adds to the filters of warnings
    here, path = Path.cwd(), [*sys.path]
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        sys.modules.pop("fuzz_factories", None)


def _run(number: int, family: str | None = None, names: list[str] | None = None) -> str:
    """One case by its number; what came of it."""
    draw = random.Random(number)
    weights = [weight for weight, _ in FAMILIES.values()]
    chosen = family or draw.choices(list(FAMILIES), weights)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = wrong_argument(draw, names) if names else FAMILIES[chosen][1](draw)
    return f"{chosen}: {outcome}"


def _tried(
    numbers: range, family: str | None = None, names: list[str] | None = None
) -> tuple[Counter[str], list[str]]:
    """What came of the cases of some numbers, and those that raised what no user should see."""
    counts: Counter[str] = Counter()
    failures = []
    for number in numbers:
        try:
            counts[_run(number, family, names)] += 1
        except Exception as error:  # noqa: BLE001, PERF203  (all of them are to be seen)
            failures.append(f"case {number}: {type(error).__name__}: {error}"[:300])
    return counts, failures


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_calls(family: str, tmp_path: Path) -> None:
    with _world(tmp_path):
        counts, failures = _tried(range(8), family, QUICK if family == "arguments" else None)
    assert not failures, "\n".join(failures)
    assert counts.total() == 8


@pytest.mark.parametrize("start", swept(range(0, TRIALS, 100), 4))
def test_a_thousand_wrong_calls(start: int, tmp_path: Path) -> None:
    with _world(tmp_path):
        counts, failures = _tried(range(start, start + 100))
    print(dict(counts))
    assert not failures, "\n".join(failures)
