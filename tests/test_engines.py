"""Engines beside onnxruntime: bench, kernels and models of time in OpenVINO and PyTorch."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import Head, conv, seeded
from torch import Tensor, nn

import depcut
from depcut.allocate.space import space
from depcut.analysis import Analysis
from depcut.cli.options import Command, options_of
from depcut.deploy.convert import draft
from depcut.errors import ExportError, InputError, LatencyError
from depcut.latency.designs import designs
from depcut.latency.measure import measure
from depcut.options import Options
from depcut.timing.backends import RUNTIMES, Setup, channel_block
from depcut.timing.bench import bench
from depcut.timing.comparison import compare
from depcut.timing.module_profile import operators
from depcut.timing.runtimes import openvino as vino
from depcut.timing.runtimes.modules import ModuleRunner
from depcut.timing.runtimes.openvino import VinoRunner, since
from depcut.timing.runtimes.sessions import SessionRunner

IMAGE = torch.zeros(2, 3, 8, 8)


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 32), conv(32, 48), Head(48))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def chain() -> nn.Module:
    return seeded(Chain, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as ONNX, for any batch size."""
    path = tmp_path_factory.mktemp("file") / "net.onnx"
    draft(seeded(Chain, 0), IMAGE, path)
    return path


def vino_runner(candidate: Any, inputs: Any, folder: Path) -> VinoRunner:
    pytest.importorskip("openvino")
    return VinoRunner("a", candidate, Setup(inputs, None, 1, folder))


# OpenVINO ----------------------------------------------------------------------------------------


def test_openvino_computes_what_pytorch_does(chain: nn.Module, file: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    runner = vino_runner(file, x, tmp_path)
    (result,) = runner.call(2)().values()  # type: ignore[attr-defined]
    with torch.no_grad():
        np.testing.assert_allclose(result, chain.eval()(x), rtol=1e-3, atol=1e-5)
    (wider,) = runner.call(5)().values()  # type: ignore[attr-defined]
    assert wider.shape[0] == 5


def test_models_and_files_are_timed_in_openvino(chain: nn.Module, file: Path) -> None:
    pytest.importorskip("openvino")
    found = bench({"model": chain, "file": file}, IMAGE, runtime="openvino", rounds=6)
    assert "openvino" in found.runtime
    assert "float32" in found.runtime
    assert found.provider == "OpenVINO CPU"
    assert found.file_bytes["file"] == pytest.approx(found.file_bytes["model"], rel=0.01)
    assert not chain.training


def test_a_process_that_timed_in_openvino_takes_signals() -> None:
    # Each core of OpenVINO puts back, when it goes, the alternate stack that it found.
    pytest.importorskip("openvino")
    code = """
import faulthandler, gc, signal, subprocess, sys
import torch, depcut
faulthandler.enable()
a, b, x = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4), torch.randn(2, 8)
depcut.bench({"a": a, "b": b}, x, runtime="openvino", rounds=6)
gc.collect()
seen = []
signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))
subprocess.run([sys.executable, "-c", "pass"], check=True)
print(len(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


def test_dense_is_compared_with_slim_in_openvino() -> None:
    pytest.importorskip("openvino")
    dense, slim = nn.Linear(8, 4), nn.Linear(8, 4)
    found = compare(dense, slim, torch.randn(2, 8), runtime="openvino", rounds=6)
    assert found.realised == pytest.approx(found.speedup.ratio if found.speedup else 0)
    assert "openvino" in found.conditions


def test_what_openvino_does_not_run_is_an_error(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 8) * 2

    broken = tmp_path / "net.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not load the file"):
        vino_runner(broken, IMAGE, tmp_path)
    with pytest.raises(InputError, match="no file"):
        vino_runner("missing.onnx", IMAGE, tmp_path)
    runner = vino_runner(Fixed(), torch.randn(2, 8), tmp_path)
    with pytest.raises(InputError, match="takes batch size 2 only, not 4") as caught:
        runner.call(4)
    assert "candidate 'a'" in str(caught.value.where)


def test_sizes_that_do_not_fit_are_an_error(file: Path, tmp_path: Path) -> None:
    runner = vino_runner(file, torch.randn(1, 5, 8, 8), tmp_path)
    with pytest.raises(ExportError, match="OpenVINO stops at batch size 1") as caught:
        runner.call(1)
    assert "onnxruntime" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: bench({"a": m}, IMAGE, runtime="openvino"),
        lambda m: compare(m, m, IMAGE, runtime="openvino"),
        lambda m: depcut.shrink(m, 0.5, IMAGE, of="latency", runtime="openvino", data=None),
    ],
    ids=["bench", "compare", "shrink"],
)
def test_an_engine_that_is_absent(
    chain: nn.Module, monkeypatch: pytest.MonkeyPatch, use: Any
) -> None:
    find = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == "openvino" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(InputError, match="OpenVINO is not installed") as caught:
        use(chain)
    assert "pip install 'depcut[openvino]'" in str(caught.value.remedy)


def test_a_device_that_is_absent(chain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(vino._DEVICES, "cpu", "NPU")
    with pytest.raises(InputError, match="finds no NPU; it has"):
        bench({"a": chain}, IMAGE, runtime="openvino")


def test_a_device_that_is_not_the_one_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    runner = vino_runner(file, IMAGE, tmp_path)
    monkeypatch.setattr(openvino.CompiledModel, "get_property", lambda *_: ["TEMPLATE"])
    with pytest.raises(InputError, match="was to run on CPU and fell back to TEMPLATE"):
        runner.call(2)


# Kernels -----------------------------------------------------------------------------------------


def test_openvino_tells_its_kernels(file: Path, tmp_path: Path) -> None:
    kernels = vino_runner(file, IMAGE, tmp_path).kernels(2)
    convolutions = [k for k in kernels if k.op == "Convolution"]
    assert [k.inputs[:2] for k in convolutions] == [
        ((2, 3, 8, 8), (32, 3, 3, 3)),
        ((2, 32, 8, 8), (48, 32, 3, 3)),
    ]
    assert [k.outputs for k in convolutions] == [((2, 32, 8, 8),), ((2, 48, 8, 8),)]
    assert all(k.seconds >= 0 for k in kernels)
    assert sum(k.seconds for k in convolutions) > 0


def test_the_runs_that_warm_up_are_taken_off_the_means() -> None:
    times = [900.0, 100.0, 3.0, 4.0, 5.0]
    before, after = {"a": sum(times[:2]) / 2}, {"a": sum(times) / 5, "b": 2.0}
    assert since(before, 2, after, 5) == {"a": pytest.approx(4.0), "b": pytest.approx(10 / 3)}


def test_counters_without_a_kernel_are_an_error(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vino, "_means", lambda _: {})
    with pytest.raises(LatencyError, match="name no kernel"):
        vino_runner(file, IMAGE, tmp_path).kernels(2)


def test_pytorch_tells_its_operators(chain: nn.Module) -> None:
    runner = RUNTIMES["torch"].runner("a", chain, Setup(IMAGE, None, 1, Path()))
    kernels = runner.kernels(4)
    convolutions = [k for k in kernels if k.op.startswith("aten.convolution")]
    assert [k.inputs[:2] for k in convolutions] == [
        ((4, 3, 8, 8), (32, 3, 3, 3)),
        ((4, 32, 8, 8), (48, 32, 3, 3)),
    ]
    assert [k.outputs[0] for k in convolutions] == [(4, 32, 8, 8), (4, 48, 8, 8)]
    assert all(k.seconds > 0 for k in kernels)


def test_operators_that_change_from_run_to_run_are_no_measurement() -> None:
    sizes = itertools.count(1)
    with pytest.raises(LatencyError, match="does not run the same operators") as caught:
        operators(lambda: torch.ones(next(sizes)) + 1, "candidate 'a'", seconds=0)
    assert "of='macs'" in str(caught.value)


def test_kernels_on_a_gpu_are_refused(chain: nn.Module, file: Path, tmp_path: Path) -> None:
    module = ModuleRunner("a", chain, IMAGE, compiled=False, provider=None)
    module._device = torch.device("cuda")
    session = SessionRunner("a", file, IMAGE, folder=tmp_path, threads=1, provider="cpu")
    session._provider = "cuda"
    for runner in (module, session):
        with pytest.raises(LatencyError) as caught:
            runner.kernels(2)
        assert "CPU" in str(caught.value.remedy) or "cpu" in str(caught.value.remedy)


# Models of time ----------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.parametrize(
    "runtime",
    [
        "onnxruntime",
        "openvino",
        "torch",
        pytest.param(
            "torch.compile",
            marks=[
                needs_compiler,
                pytest.mark.sweep,  # compiles C++ for a minute where no cache has it
                pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
            ],
        ),
    ],
)
def test_smaller_models_are_measured_in(runtime: str, chain: nn.Module) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    found = depcut.analyze(chain, IMAGE)
    rows = designs(space(found.coupling, 8, set()), 2)
    threads = torch.get_num_threads()
    samples = measure(
        found.coupling, chain, IMAGE, rows, threads=1, progress=False, runtime=runtime
    )
    assert samples.counts.tolist() == rows.tolist()
    assert samples.dense_seconds > 0
    dense, slim = (
        [k.outputs[0][1] for k in s.kernels if "onv" in k.op][:2] for s in samples.samples
    )
    assert (dense, slim) == ([32, 48], rows[1].tolist())
    assert torch.get_num_threads() == threads


def test_the_runtime_asked_for_is_what_measures(
    chain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def modelled(_: Analysis, **given: Any) -> Any:
        seen.append(given["runtime"])
        return SimpleNamespace(engine=given["runtime"])

    def planned(*arguments: Any, **_: Any) -> Any:
        seen.append(arguments[2].calls[0].model.engine)
        return arguments[1].plan(arguments[1].smallest(), {})

    monkeypatch.setattr(Analysis, "latency", modelled)
    monkeypatch.setattr("depcut.analysis.plan_for_latency", planned)
    plan = depcut.analyze(chain, IMAGE).plan(0.5, of="latency", runtime="torch")
    assert seen == ["torch", "torch"]
    assert plan.options.runtime == "torch"


@pytest.mark.parametrize("given", [{"of": "latency"}, {"of": "macs"}])
def test_an_unknown_runtime_is_refused(chain: nn.Module, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="unknown runtime 'tpu'") as caught:
        depcut.analyze(chain, IMAGE).plan(0.5, runtime="tpu", **given)
    assert '"openvino"' in str(caught.value.remedy)
    with pytest.raises(InputError, match="runtime is 3"):
        Options(runtime=3)  # type: ignore[arg-type]


# Alignment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [8, 16])
def test_the_alignment_is_that_of_the_runtime(
    chain: nn.Module, monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    monkeypatch.setattr(RUNTIMES["torch"], "alignment", alignment)
    found = depcut.analyze(chain, IMAGE)
    plan = found.plan(0.5, align="auto", runtime="torch")
    assert {len(kept) % alignment for kept in plan.kept.values()} == {0}
    assert plan.kept.keys() == found.plan(0.5, align=alignment).kept.keys()
    for name, kept in found.plan(0.5, align=alignment).kept.items():
        np.testing.assert_array_equal(plan.kept[name], kept)


@pytest.mark.parametrize(
    ("capability", "block"), [("AVX2", 8), ("AVX512", 16), ("AVX512_BF16", 16), ("DEFAULT", 8)]
)
def test_channels_are_blocked_by_the_vectors_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, capability: str, block: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert channel_block() == block


@pytest.mark.parametrize("align", ["wide", "", "8"])
def test_an_alignment_is_a_number_or_auto(align: str) -> None:
    with pytest.raises(InputError, match="align is") as caught:
        Options(align=align)
    assert '"auto"' in str(caught.value.remedy)


def on_the_command_line(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    command = Command(parser)
    command.pruning()
    command.runtime(several_batches=False)
    return options_of(command.settled(parser.parse_args(arguments), {}, None))


def test_the_command_line_takes_a_runtime_and_its_alignment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = on_the_command_line("--align", "auto", "--runtime", "openvino", "--threads", "2")
    assert found == Options(align="auto", runtime="openvino", threads=2)
    assert on_the_command_line("--align", "16").align == 16
    with pytest.raises(SystemExit):
        on_the_command_line("--align", "wide")
    assert "'wide' is neither auto nor an integer" in capsys.readouterr().err
