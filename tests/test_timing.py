"""Timing: turns are taken, intervals cover, noise is called noise."""

import itertools
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from depcut.errors import ExportError, InputError
from depcut.export import export
from depcut.timing import clock
from depcut.timing.bench import BenchResult, bench
from depcut.timing.clock import Speedup, Timing, interleave, median_interval


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(clock, "_SAMPLE_SECONDS", 0.0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, rounds=4, warmup=2)
    assert "".join(order[-12:]) == "abc" * 4
    assert len(order) == 12 + 3 * 3
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_fast_calls_are_repeated_within_a_sample():
    count = itertools.count()
    samples = interleave({"a": lambda: next(count)}, rounds=3, warmup=0)
    assert next(count) > 300
    assert all(0 < seconds < 1e-4 for seconds in samples["a"])


@pytest.mark.parametrize(
    ("n", "ranks"),
    # Table A.6 of Gibbons & Chakraborti; ranks of the 95 % interval, counted from 1
    [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (30, (10, 21))],
)
def test_interval_ranks(n, ranks):
    samples = np.random.default_rng(0).permutation(np.arange(1, n + 1)).tolist()
    assert median_interval(samples) == ranks


def test_interval_covers_the_median_of_a_skewed_distribution():
    rng = np.random.default_rng(0)
    true = np.log(2)
    covered = 0
    for _ in range(500):
        low, high = median_interval(rng.exponential(size=25).tolist())
        covered += low <= true <= high
    assert 0.93 <= covered / 500 <= 0.985


def test_timing_of_samples():
    samples = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    timing = Timing.of(samples)
    assert timing.median == statistics.median(samples)
    assert (timing.low, timing.high) == (1.0, 6.0)
    assert timing.samples == tuple(samples)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.5, 1.7, "faster"),
        (0.5, 0.6, "slower"),
        (0.9, 1.5, "within noise"),
        (1.001, 1.3, "within noise"),
        (0.7, 0.999, "within noise"),
    ],
)
def test_verdict_needs_the_whole_interval(low, high, verdict):
    speedup = Speedup((low * high) ** 0.5, low, high)
    assert speedup.verdict == verdict
    assert ("no difference beyond noise" in str(speedup)) == (verdict == "within noise")


def result(**samples):
    timings = {name: Timing.of(times) for name, times in samples.items()}
    return BenchResult(timings, "runtime 1", "CPU", 2, "a machine", len(timings["dense"].samples))


def test_speedup_pairs_the_rounds():
    drift = [1.0, 4.0, 2.0, 8.0, 3.0, 5.0, 7.0, 6.0]  # the machine slows down by factors
    found = result(dense=drift, slim=[t / 2 for t in drift]).speedup("dense", "slim")
    assert (found.ratio, found.low, found.high) == (2.0, 2.0, 2.0)


def test_report_states_conditions_and_refuses_noise():
    noisy = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98]
    text = str(result(dense=noisy, slim=noisy[::-1]))
    for part in ("runtime 1", "2 threads", "a machine", "8 interleaved", "no difference beyond"):
        assert part in " ".join(text.split())
    assert "faster" not in text


def net(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_much_smaller_net_is_faster_in(runtime):
    threads = torch.get_num_threads()
    dense = net(96).train()
    found = bench({"dense": dense, "slim": net(8)}, torch.randn(1, 3, 24, 24), runtime=runtime)
    assert found.speedup("dense", "slim").verdict == "faster"
    assert found.speedup("slim", "dense").verdict == "slower"
    assert runtime in found.runtime
    assert found.threads == 1
    assert torch.get_num_threads() == threads
    assert dense.training


def test_files_and_models_mix(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    file = export(net(8), tmp_path / "net.onnx", x).path
    found = bench({"file": file, "model": net(8)}, x, rounds=6)
    assert list(found.timings) == ["file", "model"]
    assert len(found.timings["file"].samples) == 6


def test_dict_inputs_reach_a_file_by_name(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b

    inputs = {"b": torch.randn(2, 3, 4), "a": torch.randn(2, 5, 3)}
    file = export(Two(), tmp_path / "net.onnx", inputs).path
    assert bench({"file": str(file)}, inputs, rounds=6).rounds == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": {}}, "no candidates"),
        ({"runtime": "tpu"}, "unknown runtime"),
        ({"threads": 0}, "threads=0"),
        ({"rounds": 5}, "rounds=5"),
        ({"candidates": {"a": "missing.onnx"}}, "no file"),
        ({"candidates": {"a": "some.onnx"}, "runtime": "torch"}, "is a file"),
    ],
)
def test_bad_input(change, says):
    arguments = {"candidates": {"a": net(4)}, "inputs": torch.randn(1, 3, 8, 8), **change}
    with pytest.raises(InputError, match=says) as caught:
        bench(**arguments)
    assert caught.value.remedy


def test_unknown_name_in_speedup():
    with pytest.raises(InputError, match="no candidate 'fast'"):
        result(dense=[1.0] * 6).speedup("dense", "fast")


def test_broken_file(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not load"):
        bench({"a": file}, torch.randn(1, 3))
