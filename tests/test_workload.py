"""Several kinds of call whose summed time is budgeted: summed, measured, recorded, refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401  (its import writes a device's number into the cache folder)
import pytest
import torch
import zoo
from nets import Head, conv, seeded
from torch import Tensor, nn

import depcut
from depcut.analysis import Analysis
from depcut.cli.main import main
from depcut.deploy.runtime import open_session
from depcut.errors import DepcutError, InputError
from depcut.integrations import DecodingStep, decoding_step
from depcut.latency import model as latency_model
from depcut.latency import workload as benches
from depcut.latency.measure import Beside, called, temporary
from depcut.latency.model import LatencyModel
from depcut.options import Options
from depcut.plan.cost import Cost, count_macs
from depcut.plan.workload import Setting

IMAGE = torch.zeros(1, 3, 8, 8)
BUSY = [
    "ignore:the widths explain the measured times:UserWarning",
    "ignore:the closest of .* candidates takes:UserWarning",
]


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 32), conv(32, 48), Head(48))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def analysis() -> Analysis:
    return depcut.analyze(seeded(Chain, 0), IMAGE)


# Sums of costs -----------------------------------------------------------------------------------


@pytest.fixture(params=["macs", "params", "channels"])
def first(request: pytest.FixtureRequest, analysis: Analysis) -> Cost:
    return analysis.costs[request.param]


@pytest.fixture(params=["macs", "params"])
def second(request: pytest.FixtureRequest, analysis: Analysis) -> Cost:
    return analysis.costs[request.param]


@pytest.mark.parametrize("times", [1.0, 2.5])
def test_a_sum_is_the_sum_whatever_it_is_asked_for(first: Cost, second: Cost, times: float) -> None:
    both = first.plus(second.scaled(times))
    generator = np.random.default_rng(0)
    counts = generator.integers(1, first.dense + 1, (20, len(first.dense)))
    expected = first.many(counts) + times * second.many(counts)
    np.testing.assert_allclose(both.many(counts), expected, rtol=1e-12)
    assert both.total == pytest.approx(first.total + times * second.total)
    for row in counts:
        slope = first.gradient(row) + times * second.gradient(row)
        np.testing.assert_allclose(both.gradient(row), slope, rtol=1e-12)
    group = np.array([0])
    fixed = both.at(group, np.array([3]))
    given = counts.copy()
    given[:, 0] = 3
    np.testing.assert_allclose(fixed.many(counts), both.many(given), rtol=1e-12)
    part = both.within(group)
    moved = counts.copy()
    moved[:, 0] = 1
    change = both.many(counts) - both.many(moved)
    np.testing.assert_allclose(part.many(counts) - part.many(moved), change, rtol=1e-9)


def test_a_sum_with_itself_is_twice_as_much(first: Cost) -> None:
    thrice = first.plus(first).plus(first)
    assert thrice(first.dense) == pytest.approx(3 * first.total)


# A workload on a machine whose seconds are MACs --------------------------------------------------


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(batch size, threads) of each model that is timed; a call takes its MACs over its threads."""
    seen: list[tuple[int, int]] = []

    class Clock:
        dense = None

        def __init__(self, dense: nn.Module, inputs: Any, threads: int, *_: Any, **__: Any) -> None:
            self.model, self.inputs, self.threads = dense, inputs, threads

        def seconds(self, model: nn.Module) -> float:
            module, given = called(model, self.inputs)
            image = given[0] if isinstance(given, tuple) else given
            seen.append((len(image), self.threads))
            return float(count_macs(module, image) * len(image)) / self.threads

        def written(self, slim: nn.Module) -> nn.Module:
            return slim

        def beside(self, slim: nn.Module | None, _: int) -> Beside:
            whole = self.seconds(self.model)
            return Beside(1.0 if slim is None else self.seconds(slim) / whole, whole)

    def modelled(
        analysis: Analysis, *, threads: int, inputs: Any = IMAGE, **_: Any
    ) -> LatencyModel:
        module, given = called(analysis.model, inputs)
        image = given[0] if isinstance(given, tuple) else given
        assert module is analysis.model or isinstance(module, Chain)
        cost = analysis.costs["macs"]
        cost = cost.scaled(len(image) / threads)
        facts: Any = (np.zeros(1), 1.0, 1.0, threads, "none", "none")
        return LatencyModel(analysis.coupling, cost, cost.total, *facts)

    monkeypatch.setattr(benches, "Bench", Clock)
    monkeypatch.setattr(Analysis, "latency", modelled)
    return seen


WORKLOAD: dict[str, Any] = {
    "one": {},
    "eight": {"batch_size": 8, "threads": 2, "times": 3},
    "three": {"inputs": torch.zeros(3, 3, 8, 8)},
}


def test_the_sum_of_all_calls_comes_to_the_budget(
    analysis: Analysis, clockwork: list[tuple[int, int]]
) -> None:
    plan = analysis.plan(0.5, of="latency", align=1, workload=WORKLOAD, progress=False)
    facts = plan.settings["latency"]
    assert facts["measured_ms"] == pytest.approx(0.5 * facts["dense_ms"], rel=0.015)
    assert set(clockwork) == {(1, 1), (8, 2), (3, 1)}
    parts = facts["workload"]
    assert list(parts) == ["one", "eight", "three"]
    macs = analysis.macs
    assert parts["one"]["dense_ms"] == pytest.approx(1e3 * macs)
    assert parts["eight"]["dense_ms"] == pytest.approx(1e3 * macs * 8 / 2)
    assert facts["dense_ms"] == pytest.approx(1e3 * macs * (1 + 3 * 4 + 3))
    summed = sum(part["times"] * part["measured_ms"] for part in parts.values())
    assert facts["measured_ms"] == pytest.approx(summed)
    assert facts["predicted_ms"] == pytest.approx(facts["measured_ms"], rel=1e-6)
    json.dumps(dict(plan.settings))


def test_milliseconds_are_of_the_sum(analysis: Analysis, clockwork: list[tuple[int, int]]) -> None:
    wanted = 1e3 * 0.6 * analysis.macs * 9
    two = {"one": {}, "eight": {"batch_size": 8}}
    slim = depcut.shrink(
        analysis.model, inputs=IMAGE, latency_ms=wanted, align=1, workload=two, progress=False
    )
    facts = depcut.report(slim).settings["latency"]
    assert facts["measured_ms"] == pytest.approx(wanted, rel=0.015)
    assert clockwork


def test_one_call_is_no_workload(analysis: Analysis, clockwork: list[tuple[int, int]]) -> None:
    plan = analysis.plan(0.5, of="latency", align=1, progress=False)
    assert "workload" not in plan.settings["latency"]
    assert set(clockwork) == {(1, 1)}


def test_the_dense_model_and_draws_are_left_alone(
    analysis: Analysis, clockwork: list[tuple[int, int]]
) -> None:
    model = analysis.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def noisy(module: nn.Module) -> Tensor:
        image = torch.randn(4, 3, 8, 8)
        module.train()(image)  # statistics of what is called may move, not the model's
        return image

    analysis.plan(0.5, of="latency", workload={"noisy": {"inputs": noisy}}, progress=False)
    assert (4, 1) in clockwork
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "workload is 3"),
        ({}, r"workload is \{\}"),
        ({1: {}}, "workload is {1: {}}"),
        ({"": {}}, "workload is {'': {}}"),
        ({"a": 3}, r"it is 3\n  where: workload\['a'\]"),
        (
            {"a": {"batch": 2}},
            r"unknown: batch\n.*\n  to do: pass a dict with some of inputs, module",
        ),
        ({"a": {"batch_size": 0}}, r"workload\['a'\]: batch_size is 0"),
        ({"a": {"threads": 1.5}}, r"workload\['a'\]: threads is 1.5"),
        ({"a": {"times": 0}}, r"workload\['a'\]: times is 0"),
        ({"a": {"module": 3, "inputs": IMAGE}}, r"module is 3\n  where: workload\['a'\]"),
        ({"a": {"module": nn.Identity()}}, "a module of its own, but no inputs"),
    ],
)
def test_what_is_no_workload_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Options(of="latency", workload=given)


def test_a_workload_needs_a_budget_of_time(analysis: Analysis) -> None:
    with pytest.raises(InputError, match="a workload, and a budget of macs") as caught:
        analysis.plan(0.5, workload={"one": {}})
    assert 'of="latency"' in str(caught.value.remedy)
    assert Options(latency_ms=3, workload={"one": {}}).workload == {"one": Setting()}


def failing(_: nn.Module) -> Any:
    raise ValueError("no such cache")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"inputs": failing}, r"what makes its module and inputs fails: .*no such cache"),
        ({"inputs": IMAGE, "module": lambda _: 3}, "its module is a int"),
        ({"inputs": torch.zeros(1, 5, 8, 8)}, r"workload\['bad'\]: .*5 channels"),
        ({"inputs": (IMAGE, IMAGE)}, r"workload\['bad'\]: the inputs do not fit forward"),
    ],
)
def test_a_setting_that_cannot_be_called_is_named_before_any_is_measured(
    analysis: Analysis, setting: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Analysis, "latency", None)
    with pytest.raises(DepcutError, match=says) as caught:
        analysis.plan(0.5, of="latency", workload={"one": {}, "bad": setting}, progress=False)
    assert "workload['bad']" in str(caught.value)


# Options -----------------------------------------------------------------------------------------


def test_records_leave_out_what_is_no_json() -> None:
    whole = Options(of="latency", workload={"one": {"batch_size": 2}, "two": {"times": 3}})
    assert whole.record()["workload"] == {"one": {"batch_size": 2}, "two": {"times": 3.0}}
    assert Options.of_record(json.loads(json.dumps(whole.record()))) == whole
    own = Options(of="latency", workload={"one": {"inputs": IMAGE, "module": failing}})
    assert own.record()["workload"] == {"one": {"inputs": "Tensor", "module": "failing"}}
    assert Options.of_record(own.record()) == Options(of="latency")


def built() -> nn.Module:
    return seeded(Chain, 0)


def test_a_file_holds_a_workload(
    tmp_path: Path, clockwork: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.toml"
    path.write_text('of = "latency"\nalign = 1\n[workload.one]\n[workload.four]\nbatch_size = 4\n')
    command = ["shrink", "test_workload:built", "--options", str(path)]
    command += [
        "--input-shape",
        "1,3,8,8",
        "--ratio",
        "0.5",
        "--data",
        "none",
        "--no-progress",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 0
    assert {(1, 1), (4, 1)} <= set(clockwork)
    printed = capsys.readouterr().out
    assert "\none: " in printed
    assert "\nfour: " in printed


# Decoders ----------------------------------------------------------------------------------------


def llama(size: int) -> nn.Module:
    zoo.libraries()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def decoder() -> nn.Module:
    return llama(32)


PROMPT = torch.arange(10).reshape(1, 10) % 32


@torch.no_grad()
def test_a_step_is_the_model_on_one_more_token(decoder: nn.Module) -> None:
    step = DecodingStep(decoder, PROMPT)
    given = step.example()
    logits, *cache = step(*given)
    longer = torch.cat([PROMPT, given[0]], dim=1)
    torch.testing.assert_close(logits, decoder(input_ids=longer).logits[:, -1:])
    assert [tuple(t.shape) for t in cache] == [(1, 2, 11, 8)] * 4
    again, *_ = step(*given)
    assert torch.equal(logits, again), "a call leaves no trace"
    further = torch.tensor([[3]])
    second, *_ = step(further, *cache)
    longer = torch.cat([longer, further], dim=1)
    torch.testing.assert_close(second, decoder(input_ids=longer).logits[:, -1:])


def test_a_smaller_decoder_is_served_step_by_step(decoder: nn.Module, tmp_path: Path) -> None:
    slim = depcut.shrink(decoder, 0.5, {"input_ids": PROMPT}, data=None, align=1, rebuildable=False)
    step = DecodingStep(slim, PROMPT)
    given = step.example()
    report = depcut.export(step, tmp_path / "step.onnx", given)
    session = open_session(report.path)
    feeds = {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), given, strict=True)}
    with torch.no_grad():
        expected = step(*given)
    found = [torch.from_numpy(array) for array in session.run(None, feeds)]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-4)


def test_what_keeps_no_cache_is_no_decoder() -> None:
    with pytest.raises(InputError, match="the model does not run with a cache: "):
        DecodingStep(Chain(), PROMPT)


@pytest.mark.filterwarnings(*BUSY)
def test_real_calls_are_modelled_and_timed_one_after_the_other(analysis: Analysis) -> None:
    two = {"one": {}, "four": {"batch_size": 4, "threads": 2, "times": 3}}
    options = Options(of="latency", workload=two, runtime="torch", progress=False)
    threads = torch.get_num_threads()
    calls = benches.workload(
        options, analysis.model, IMAGE, lambda **k: analysis.latency(samples=6, **k)
    )
    assert [call.model.threads for call in calls.calls] == [1, 2]
    one, four = (call.model for call in calls.calls)
    assert calls.dense_seconds == pytest.approx(one.dense_seconds + 3 * four.dense_seconds)
    slim = analysis.plan(0.5).apply(analysis.model)
    with temporary() as folder:
        found = benches.Benches(analysis.model, calls, folder).beside(slim, 3)
    assert found.ratio > 0
    assert [call.name for call, _ in found.parts] == ["one", "four"]
    assert torch.get_num_threads() == threads


@pytest.mark.exhaustive
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.filterwarnings(*BUSY)
def test_prompts_and_steps_are_timed_together(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    measure = latency_model.measure

    def counted(*arguments: Any, **given: Any) -> Any:
        next(calls)
        return measure(*arguments, **given)

    monkeypatch.setattr(latency_model, "measure", counted)
    latency = Analysis.latency
    monkeypatch.setattr(Analysis, "latency", lambda self, **k: latency(self, samples=6, **k))
    threads = torch.get_num_threads()
    work = {"prompt": {"threads": 2}, "step": decoding_step(PROMPT, times=16)}
    found = depcut.analyze(llama(256), {"input_ids": PROMPT})
    given: dict[str, Any] = {"of": "latency", "workload": work, "runtime": runtime}
    plan = found.plan(0.1, **given, progress=False)
    assert list(plan.settings["latency"]["workload"]) == ["prompt", "step"]
    assert next(calls) == 2
    found.plan(0.1, **given, progress=False)
    assert next(calls) == 3, "what was measured is kept"
    assert torch.get_num_threads() == threads
