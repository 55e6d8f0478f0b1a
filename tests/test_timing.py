"""Timing: turns are taken, intervals cover, noise is called noise, what is absent is an error."""

import contextlib
import itertools
import os
import random
import shutil
import statistics
import sys
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from depcut.deploy.export import export
from depcut.deploy.runtime import open_session
from depcut.errors import ExportError, InputError
from depcut.timing.bench import bench
from depcut.timing.clock import Speedup, Timing, interleave, median_interval
from depcut.timing.footprint import footprint
from depcut.timing.measurements import BenchResult, Measurement, byte_size, rate
from depcut.timing.pinning import pinned
from depcut.timing.runtimes.modules import no_fallback
from depcut.timing.runtimes.sessions import SessionRunner


class Machine:
    """A clock that only calls move on, with caches that another candidate's call empties.

    With a seed, each call takes up to half as long again.
    """

    def __init__(self, seed=None, **seconds):
        self.now, self.last, self.log = 0.0, "", []
        self.drawn = None if seed is None else random.Random(seed)
        self.calls = {name: self.candidate(name, time) for name, time in seconds.items()}

    def candidate(self, name, seconds):
        def call():
            noise = self.drawn.random() / 2 if self.drawn else 0.0
            self.now += seconds * ((2.0 if self.last != name else 1.0) + noise)
            self.last = name
            self.log.append(name)

        return call

    def stopwatch(self, call, count):
        started = self.now
        for _ in range(count):
            call()
        return self.now - started


def test_candidates_take_turns():
    machine = Machine(a=1.0, b=1.0, c=1.0)
    samples = interleave(machine.calls, rounds=4, warmup=2, stopwatch=machine.stopwatch)
    assert "".join(machine.log[-24:]) == "aabbcc" * 4
    assert len(machine.log) == 24 + 3 * 3
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_model_beside_another_is_measured_as_it_runs_alone():
    machine = Machine(small=1e-3, big=0.1)
    samples = interleave(machine.calls, rounds=6, warmup=1, stopwatch=machine.stopwatch)
    assert samples["small"] == pytest.approx([1e-3] * 6)
    assert samples["big"] == pytest.approx([0.1] * 6)


def test_two_of_the_same_on_a_noisy_machine_do_not_differ():
    verdicts = []
    for seed in range(100):
        machine = Machine(seed, first=0.1, second=0.1)
        samples = interleave(machine.calls, rounds=12, warmup=1, stopwatch=machine.stopwatch)
        first, second = (Timing.of(times) for times in samples.values())
        verdicts.append(Speedup.between(first, second).verdict)
    assert verdicts.count("within noise") >= 95


@pytest.mark.parametrize(("seconds", "count"), [(1e-5, 2000), (3e-3, 7), (19e-3, 2), (0.5, 1)])
def test_turns_last_twenty_milliseconds(seconds, count):
    machine = Machine(a=seconds)
    counts = []

    def stopwatch(call, count):
        counts.append(count)
        return machine.stopwatch(call, count)

    interleave(machine.calls, rounds=3, warmup=1, stopwatch=stopwatch)
    uncounted = -(-count // 4)
    assert counts[-6:] == pytest.approx([uncounted, count] * 3, rel=0.01)


def test_fast_calls_are_repeated_within_a_sample():
    count = itertools.count()
    samples = interleave({"a": lambda: next(count)}, rounds=3, warmup=0)
    assert next(count) > 3000
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
    return BenchResult(
        {name: {1: Measurement(1, timing)} for name, timing in timings.items()},
        dict.fromkeys(timings),
        "runtime 1",
        "CPU",
        2,
        "a machine",
        len(timings["dense"].samples),
    )


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


def test_an_unstable_machine_is_called_one():
    steady, wild = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98], [1.0, 1.3, 0.8, 1.1, 0.7, 1.4]
    assert Timing.of(steady).spread == pytest.approx(0.015)
    quiet, loud = result(dense=steady), result(dense=steady, slim=wild)
    assert quiet.warning == ""
    assert "unstable" not in quiet.conditions
    assert "unstable machine: the middle half of the times of slim at batch size 1" in loud.warning
    assert loud.warning in loud.conditions
    assert "unstable machine" in str(loud)


def test_throughput_follows_latency():
    found = Measurement(8, Timing.of([0.5] * 6))
    assert found.throughput == 16.0
    assert (rate(1234567), rate(99.44), rate(0.1234)) == ("1,234,567", "99.4", "0.123")
    assert (byte_size(None), byte_size(12_345_678)) == ("not measured", "12.3 MB")


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
        ({"warmup": -1}, "warmup=-1"),
        ({"batch_sizes": ()}, "batch_sizes="),
        ({"batch_sizes": (1, 0)}, "batch_sizes="),
        ({"batch_sizes": (2, 2)}, "batch_sizes="),
        ({"provider": "npu"}, "unknown provider 'npu'"),
        ({"runtime": "torch", "provider": "tensorrt"}, "tensorrt is a provider of onnxruntime"),
        ({"candidates": {"a": net(4).to("meta")}, "runtime": "torch"}, "no way to time a model on"),
        ({"candidates": {"a": "missing.onnx"}}, "no file"),
        ({"candidates": {"a": "some.onnx"}, "runtime": "torch"}, "is a file"),
    ],
)
def test_bad_input(change, says):
    arguments = {"candidates": {"a": net(4)}, "inputs": torch.randn(1, 3, 8, 8), **change}
    with pytest.raises(InputError, match=says) as caught:
        bench(**arguments)
    assert caught.value.remedy


def test_unknown_names_in_a_result():
    found = result(dense=[1.0] * 6)
    with pytest.raises(InputError, match="no candidate 'fast'"):
        found.speedup("dense", "fast")
    with pytest.raises(InputError, match="batch size 8 was not measured"):
        found.at("dense", 8)


def test_broken_file(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not load"):
        bench({"a": file}, torch.randn(1, 3))


@pytest.mark.sweep
def test_every_batch_size_is_measured(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    found = bench({"dense": net(64), "slim": net(8)}, x, batch_sizes=(1, 8), rounds=6)
    assert found.batch_sizes == (1, 8)
    assert found.at("dense", 8).latency.median > found.at("dense", 1).latency.median
    assert found.timings["dense"] == found.at("dense", 1).latency
    one = found.at("slim", 8)
    assert one.throughput == 8 / one.latency.median
    written = export(net(64), tmp_path / "net.onnx", x)
    assert found.file_bytes["dense"] == pytest.approx(written.bytes, rel=0.01)
    text = " ".join(str(found).split())
    assert "examples/s" in text
    assert "peak memory" not in text
    assert found.speedup("dense", "slim", 8).verdict == "faster"


def test_the_batch_size_is_that_of_the_inputs_unless_given():
    found = bench({"a": net(4)}, torch.randn(3, 3, 8, 8), rounds=6)
    assert found.batch_sizes == (3,)


def assert_alike(speedup):
    """Two of the same, measured; one interval in twenty leaves out the 1, but none by far."""
    assert speedup.low < 1.1
    assert speedup.high > 1 / 1.1


def test_external_data_is_part_of_the_file(tmp_path):
    x = torch.randn(1, 3, 12, 12)
    whole = export(net(32), tmp_path / "whole.onnx", x)
    split = tmp_path / "split.onnx"
    onnx.save(onnx.load(whole.path), split, save_as_external_data=True, size_threshold=0)
    found = bench({"whole": whole.path, "split": split}, x, rounds=6)
    assert split.stat().st_size < whole.bytes / 2
    assert found.file_bytes["split"] == pytest.approx(found.file_bytes["whole"], rel=0.1)
    assert_alike(found.speedup("whole", "split"))


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x.reshape(2, 8))


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ("onnxruntime", "takes batch size 2 only, not 4"),
        ("torch", "does not run at batch size 4"),
    ],
)
def test_a_fixed_batch_is_an_error(runtime, says):
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match=says) as caught:
        bench({"a": FixedBatch()}, x, batch_sizes=(2, 4), runtime=runtime, rounds=6)
    assert "candidate 'a'" in caught.value.where
    assert "batch size" in caught.value.remedy


def test_wrong_sizes_for_a_file_are_an_error(tmp_path):
    file = export(net(4), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)).path
    with pytest.raises(ExportError, match="onnxruntime stops at batch size 1"):
        bench({"a": file}, torch.randn(1, 5, 8, 8), rounds=6)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


class Table(nn.Module):
    """Much weight and little work: 40 MB that one row is read from."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Embedding(rows, 100)

    def forward(self, ids):
        return self.rows(ids)


@needs_proc
def test_peak_memory_is_that_of_the_candidate_alone():
    ballast = np.ones(30_000_000)  # 240 MB here are not in the measurement
    candidates = {"large": Table(100_000), "small": Table(100)}
    found = bench(candidates, torch.tensor([[1], [2]]), memory=True, rounds=6)
    large, small = (found.at(name).peak_memory for name in candidates)
    assert 38e6 < large - small < 130e6
    assert 0 < small < ballast.nbytes / 4
    assert "peak memory" in str(found)
    assert "no way to measure" not in found.conditions


@needs_proc
def test_the_footprint_of_a_file_grows_with_its_weights(tmp_path):
    ids, found = torch.tensor([[1], [2]]), []
    for rows in (100, 100_000):
        export(Table(rows), tmp_path / f"{rows}.onnx", ids)
        np.savez(tmp_path / f"{rows}.npz", ids=ids.numpy())
        found.append(footprint(f"{tmp_path}/{rows}.onnx", f"{tmp_path}/{rows}.npz", 1))
    assert 38e6 < found[1] - found[0] < 130e6


def test_memory_that_cannot_be_told_is_not_measured():
    found = bench({"a": net(4)}, torch.randn(1, 3, 8, 8), runtime="torch", memory=True, rounds=6)
    assert found.at("a").peak_memory is None
    assert "not measured" in str(found)
    assert "no way to measure peak memory here" in found.conditions


@needs_proc
def test_a_failing_memory_process_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("raise MemoryError('no room')")
    monkeypatch.setattr("depcut.timing.memory._SCRIPT", script)
    with pytest.raises(ExportError, match="ended with code 1: MemoryError: no room"):
        bench({"a": net(4)}, torch.randn(1, 3, 8, 8), memory=True, rounds=6)


needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system cannot pin"
)


@needs_affinity
@pytest.mark.parametrize("pin", [True, "last"])
def test_pinning_lasts_as_long_as_the_measurement(pin):
    before = os.sched_getaffinity(0)
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(os.sched_getaffinity(0))
            return x

    pin = (max(before),) if pin == "last" else pin
    found = bench({"a": Watched()}, torch.ones(1, 1), runtime="torch", rounds=6, pin=pin)
    assert found.cpus == (max(before),)
    assert set(map(frozenset, seen)) == {frozenset(found.cpus)}
    assert f"1 thread on CPU {found.cpus[0]}," in found.conditions
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_pinning_holds_for_all_threads_and_ends_after_an_error():
    before = os.sched_getaffinity(0)
    ids, done = [], threading.Event()

    def wait():
        ids.append(threading.get_native_id())
        done.wait()

    def places():
        return [os.sched_getaffinity(number) for number in ids]

    workers = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    workers[0].start()
    try:
        with contextlib.suppress(KeyError), pinned(True, 1) as cpus:
            workers[1].start()
            while len(ids) < 2:
                pass
            assert places() == [set(cpus)] * 2
            raise KeyError
        assert len(ids) == 2
        assert places() == [before] * 2
    finally:
        done.set()


@needs_affinity
@pytest.mark.parametrize(
    ("pin", "threads", "says"),
    [
        ((100_000,), 1, "may not run on CPU 100000"),
        ((), 1, "1 threads on 0 CPUs"),
        (True, 100_000, "would wait for each other"),
        (3, 1, "pin=3 is one number"),
    ],
)
def test_pinning_refuses(pin, threads, says):
    with pytest.raises(InputError, match=says) as caught, pinned(pin, threads):
        pass
    assert caught.value.remedy


def test_a_system_without_pinning(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(InputError, match="this system cannot pin"):
        bench({"a": net(4)}, torch.randn(1, 3, 8, 8), pin=True)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_absent_provider_is_an_error(provider, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="it has CPUExecutionProvider") as caught:
        bench({"a": net(4)}, torch.randn(1, 3, 8, 8), provider=provider)
    assert provider in caught.value.where
    assert "onnxruntime-gpu" in caught.value.remedy


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="here it would start"
)
def test_a_provider_that_does_not_start_is_an_error(monkeypatch):
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    with pytest.raises(InputError, match="fell back to CPUExecutionProvider"):
        bench({"a": net(4)}, torch.randn(1, 3, 8, 8), provider="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_pytorch_without_a_gpu_is_an_error():
    with pytest.raises(InputError, match="finds no CUDA device"):
        bench({"a": net(4)}, torch.randn(1, 3, 8, 8), runtime="torch", provider="cuda")


def test_outputs_that_stay_on_the_device_are_the_same(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    file = export(net(4), tmp_path / "net.onnx", x).path
    runner = SessionRunner("a", file, x, folder=tmp_path, threads=1, provider="cpu")
    feeds = runner._feeds(2)
    bound = []

    class Session:
        def __init__(self):
            self.real = open_session(file)
            self.get_outputs, self.io_binding = self.real.get_outputs, self.real.io_binding

        def run_with_iobinding(self, binding):
            self.real.run_with_iobinding(binding)
            bound.append(binding.copy_outputs_to_cpu()[0])

    expected = runner._session.run(None, feeds)[0]
    runner._session = Session()
    runner._on_device(feeds, "cpu")()
    np.testing.assert_array_equal(bound[0], expected)


def test_nothing_falls_back_to_eager_silently():
    settings = torch._dynamo.config
    with no_fallback():
        assert settings.fail_on_recompile_limit_hit
        assert settings.recompile_limit > 100
        assert not settings.suppress_errors
    assert not settings.fail_on_recompile_limit_hit


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.sweep  # compiles C++ for a minute where no cache has it
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_models_run():
    dense = net(32).train()
    x = torch.randn(1, 3, 12, 12)
    found = bench({"dense": dense}, x, runtime="torch.compile", batch_sizes=(1, 2), rounds=6)
    assert "compiled for each batch size" in found.runtime
    assert found.batch_sizes == (1, 2)
    assert dense.training


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_model_that_does_not_compile_is_an_error():
    from torch._inductor import config

    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": ("/no/compiler",), "fx_graph_cache": False}),
        pytest.raises(InputError, match=r"torch.compile fails: .*C\+\+ compiler") as caught,
    ):
        bench({"a": net(13)}, torch.randn(1, 3, 9, 9), runtime="torch.compile", rounds=6)
    assert "C++ compiler" in caught.value.remedy


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("runtime", ["torch", "torch.compile"])
def test_pytorch_on_cuda(runtime):
    candidates = {"dense": net(256).cuda(), "slim": net(8).cuda()}
    x = torch.randn(8, 3, 64, 64)
    found = bench(candidates, x, runtime=runtime, provider="cuda", memory=True, rounds=6)
    assert found.speedup("dense", "slim").verdict == "faster"
    assert "cuda:0" in found.provider
    assert found.at("dense").peak_memory > 256 * 256 * 9 * 4
    assert found.at("dense").peak_memory > found.at("slim").peak_memory


@needs_gpu
def test_candidates_on_two_devices_are_an_error():
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match="on different devices: a on cpu, b on cuda:0"):
        bench({"a": net(4), "b": net(4).cuda()}, x, runtime="torch")


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu"
)
def test_onnxruntime_on_cuda():
    x = torch.randn(8, 3, 64, 64)
    found = bench({"dense": net(256), "slim": net(8)}, x, provider="cuda", rounds=6)
    assert found.speedup("dense", "slim").verdict == "faster"
    assert found.provider.startswith("CUDAExecutionProvider")


def test_two_sessions_of_one_file_do_not_differ(tmp_path):
    x = torch.randn(1, 3, 24, 24)
    file = export(net(32), tmp_path / "net.onnx", x).path
    assert_alike(bench({"first": file, "second": file}, x).speedup("first", "second"))
