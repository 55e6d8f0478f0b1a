"""Options: one definition behind flat keywords, the object, files and the command line."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from nets import NETS
from torch import nn

import depcut
from depcut import options as module
from depcut.cli.option_file import named_file, read
from depcut.cli.options import Command, options_of
from depcut.errors import InputError
from depcut.options import Options
from depcut.support.keywords import doc_of
from depcut.training.options import RetrainKeywords, TrainingOptions

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
KEYWORDS = [getattr(module, name) for name in vars(module) if name.endswith("Keywords")]
FUNCTIONS: list[tuple[Any, type]] = [
    (depcut.shrink, Options),
    (depcut.Analysis.plan, Options),
    (depcut.Analysis.calibrate, Options),
    (depcut.Plan.apply, Options),
    (depcut.training.iterate, Options),
    (depcut.training.run_phases, Options),
    (depcut.training.Gradual, Options),
    (depcut.training.retrain, TrainingOptions),
]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize(
    ("kind", "keywords"), [(Options, k) for k in KEYWORDS] + [(TrainingOptions, RetrainKeywords)]
)
def test_keywords_are_fields_of_the_same_type(kind: type, keywords: Any) -> None:
    types = {f.name: f.type for f in fields(kind)}
    assert keywords.__annotations__
    for name, annotation in keywords.__annotations__.items():
        given = getattr(annotation, "__forward_arg__", annotation)
        # What is stored as a tuple may be given as any iterable.
        assert given == str(types[name]).replace("tuple[str, ...]", "Iterable[str]")


def test_every_field_is_a_keyword_somewhere() -> None:
    taken = {name for k in KEYWORDS for name in k.__annotations__}
    assert taken == {f.name for f in fields(Options)}
    assert set(RetrainKeywords.__annotations__) == {f.name for f in fields(TrainingOptions)}


@pytest.mark.parametrize(("function", "kind"), FUNCTIONS)
def test_signatures_and_docstrings_show_the_options(function: Any, kind: type) -> None:
    shown = inspect.signature(function).parameters
    names = [f.name for f in fields(kind) if f.name in shown]
    assert names
    for name in names:
        assert f"{name}: {doc_of(kind, name)[:20]}" in " ".join((function.__doc__ or "").split())
    assert "**given" not in (function.__doc__ or "")


@pytest.mark.parametrize(("function", "kind"), FUNCTIONS)
def test_no_function_spells_more_than_ten_parameters(function: Any, kind: type) -> None:
    plain = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    code = plain.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert len([name for name in own if name != "self"]) <= 10


def test_flat_keywords_and_the_object_say_the_same() -> None:
    model = net()
    flat = depcut.shrink(model, 0.5, X, of="params", align=1, seed=3, score="random")
    chosen = Options(of="params", align=1, seed=3, score="random")
    assert widths(depcut.shrink(model, 0.5, X, options=chosen)) == widths(flat)
    mixed = depcut.shrink(model, 0.5, X, options=Options(of="params", align=8), align=1)
    assert depcut.report(mixed).settings["align"] == 1
    assert depcut.report(mixed).settings["of"] == "params"


def widths(model: nn.Module) -> list[Any]:
    return [tuple(p.flatten().tolist()) for p in model.parameters()]


def test_options_cannot_be_changed() -> None:
    chosen = Options(align=4)
    with pytest.raises(FrozenInstanceError):
        chosen.align = 8  # type: ignore[misc]


def test_a_generator_of_names_is_read_once() -> None:
    model = net()
    slim = depcut.shrink(model, 0.2, X, ignore=(n for n in ["0"]), align=1)
    assert slim[0].out_features == 16  # type: ignore[operator, index]
    assert Options(ignore=(n for n in ["0", "2"])).ignore == ("0", "2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"of": "time"}, "unknown quantity 'time'"),
        ({"of": 3}, "of is 3"),
        ({"latency_ms": -1}, "latency_ms is -1"),
        ({"latency_ms": True}, "latency_ms is True"),
        ({"score": 3}, "score is a int"),
        ({"score": {"kind": "taylor"}}, "score is {'kind'"),
        ({"batches": 0}, "batches is 0"),
        ({"align": 1.5}, "align is 1.5"),
        ({"align": True}, "align is True"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"compensate": "yes"}, "compensate is 'yes'"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": True}, "memory is True"),
        ({"memory": "4 goats"}, "memory is '4 goats'"),
        ({"memory": "0.1B"}, "memory is '0.1B'"),
        ({"depth": None}, "depth is None"),
        ({"progress": "no"}, "progress is 'no'"),
        ({"allocation": "fair"}, "unknown allocation 'fair'"),
        ({"optimizer_state": "drop"}, "optimizer_state is 'drop'"),
        ({"ignore": None}, "ignore is None"),
        ({"ignore": [1]}, r"ignore is \[1\]"),
        ({"ignore": b"head"}, "ignore is b'head'"),
        ({"ratios": [0.5]}, r"ratios is \[0.5\]"),
        ({"ratios": {"0": 1.5}}, "the ratio is 1.5"),
        ({"ratios": {"0": "x"}}, "the ratio is 'x'"),
        ({"ratios": {0: 0.5}}, "ratios is {0: 0.5}"),
    ],
)
def test_values_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Options(**given)
    assert caught.value.remedy
    if set(given) <= set(module.ShrinkKeywords.__annotations__):
        with pytest.raises(InputError, match=words):
            depcut.shrink(net(), 0.5, X, **given)


def test_numpy_integers_are_integers() -> None:
    chosen = Options(align=np.int64(4), seed=np.int32(7))  # type: ignore[arg-type]
    assert (type(chosen.align), type(chosen.seed)) == (int, int)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: depcut.shrink(m, 0.5, X, keep=("0",)), "keep= is called ignore="),
        (lambda m: depcut.shrink(m, 0.5, X, alling=1), "did you mean align="),
        (lambda m: depcut.shrink(m, 0.5, X, resume=True), "shrink takes no option 'resume'"),
        (lambda m: depcut.shrink(m, 0.5, X, options=3), "options is a int, not a depcut.Options"),
        (
            lambda m: depcut.training.Gradual(m, 0.5, X, 0, 4, 2, depth=True),
            "Gradual takes no option 'depth'",
        ),
        (
            lambda m: depcut.training.Gradual(m, 0.5, X, 0, 4, 2, options=Options(depth=True)),
            "Gradual has no use for depth=True",
        ),
        (
            lambda m: depcut.training.iterate(m, 0.5, X, options=Options(ratios={"0": 0.5})),
            "iterate has no use for ratios=",
        ),
        (
            lambda m: depcut.training.retrain(m, [], epochs=1, options=Options()),
            "options is a Options, not a depcut.TrainingOptions",
        ),
    ],
)
def test_options_that_a_function_does_not_take(
    call: Callable[[nn.Module], Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(net())
    assert caught.value.remedy


def test_one_object_serves_planning_and_applying() -> None:
    model, chosen = net(), Options(align=1, compensate=False, batches=2)
    plan = depcut.analyze(model, X).plan(0.5, options=chosen)
    assert plan.apply(model, options=chosen)
    assert plan.options == chosen


def test_a_file_holds_options(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(
        'of = "params"\nignore = ["head*"]\nalign = 4\n'
        'score = {name = "taylor", aggregate = "max"}\n[ratios]\n"0" = 0.25\n'
    )
    assert Options.read(path) == Options(
        of="params",
        ignore=("head*",),
        align=4,
        score=depcut.Score("taylor", aggregate="max"),
        ratios={"0": 0.25},
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("of = ", "no options can be read"),
        ("keep = []", "unknown options: keep"),
        ("align = 0", "align is 0"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "options.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        Options.read(path)
    with pytest.raises(InputError, match="no options can be read"):
        Options.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "chosen",
    [
        Options(),
        Options(of="params", ignore=("a", "b"), ratios={"c": 0.5}, depth=True, latency_ms=None),
        Options(score=depcut.Score("taylor", members="producers")),
    ],
)
def test_a_record_gives_the_options_back(chosen: Options) -> None:
    assert Options.of_record(chosen.record()) == chosen


def test_a_function_is_recorded_by_its_name() -> None:
    def own(coupling: Any, model: nn.Module, seed: int) -> Any:
        raise AssertionError

    assert Options(score=own).record() == {"score": "own"}
    assert Options.of_record({"score": "own", "align": 2}) == Options(align=2)


def parsed(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    command = Command(parser)
    command.pruning()
    path = named_file(arguments)
    values = {} if path is None else read(path)
    return options_of(command.settled(parser.parse_args(arguments), values, path))


def test_the_command_line_takes_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text('of = "params"\nalign = 4\n')
    found = parsed(
        "--options", str(path), "--align", "2", "--ignore", "a*", "--ignore", "b", "--depth",
        "--no-progress", "--compensate", "false", "--ratios", "c=0.5", "--seed", "5",
    )  # fmt: skip
    assert found == Options(
        of="params", align=2, ignore=("a*", "b"), depth=True, progress=False, compensate=False,
        ratios={"c": 0.5}, seed=5,
    )  # fmt: skip
    assert parsed() == Options()


def test_type_hints_can_be_read() -> None:
    plain = [f.__init__ if inspect.isclass(f) else f for f, _ in FUNCTIONS]
    assert all(get_type_hints(function) for function in plain)


def test_a_net_of_the_tests_takes_an_object() -> None:
    tested = NETS["mlp"]
    slim = depcut.shrink(tested.build(), 0.5, tested.inputs(2), options=Options(align=1))
    assert depcut.report(slim).settings["options"] == {"align": 1}
