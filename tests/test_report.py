"""compare: counts are exact, shared tensors count once, nothing is timed unless asked."""

import sys

import pytest
import torch
from torch import nn

from depcut.errors import InputError
from depcut.support.quantities import quantity
from depcut.timing.comparison import compare


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(10, width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))

    def forward(self, ids):
        return self.head(self.table(ids) * self.scale.float())


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_counts():
    found = compare(Tied(16), Tied(4), IDS, runtime=None)
    assert (found.dense.params, found.slim.params) == (160, 40)
    assert (found.dense.bytes, found.slim.bytes) == (160 * 4 + 16 * 8, 40 * 4 + 4 * 8)
    assert found.params_kept == 0.25
    assert found.macs_kept == 0.25
    assert found.slim.macs == found.dense.macs // 4 > 0
    assert found.speedup is None
    assert found.realised is None
    assert found.dense.latency is None
    assert found.dense.throughput is None
    assert found.dense.file_bytes is None


def test_report_shows_both_and_what_is_left():
    text = str(compare(Tied(16), Tied(4), IDS, runtime=None))
    assert "160" in text
    assert "25.0%" in text
    assert "latency" not in text


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_latency_is_measured_when_asked(runtime):
    model = Tied(16)
    found = compare(model, Tied(4), IDS, runtime=runtime, rounds=6)
    assert found.dense.latency.median > 0
    assert found.realised == pytest.approx(found.speedup.ratio * 0.25)
    assert runtime in found.conditions
    assert found.dense.throughput == 2 / found.dense.latency.median
    assert (found.dense.file_bytes is None) == (runtime == "torch")
    assert "latency, batch 2" in str(found)
    assert model.training


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_batch_size_and_memory_are_measured_when_asked():
    found = compare(Tied(64), Tied(4), IDS, batch_size=16, memory=True, rounds=6, warmup=1)
    assert found.batch_size == 16
    assert found.slim.throughput == 16 / found.slim.latency.median
    assert found.slim.file_bytes < found.dense.file_bytes
    assert found.slim.peak_memory > 0
    for part in ("latency, batch 16", "examples/s", "file", "peak memory"):
        assert part in str(found)


def test_an_absent_provider_is_an_error():
    with pytest.raises(InputError, match="unknown provider 'npu'"):
        compare(Tied(16), Tied(4), IDS, provider="npu")


def test_a_model_beside_itself_has_no_speedup():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    found = compare(model, model, torch.randn(4, 64), runtime="torch")
    assert found.macs_kept == 1.0
    # One interval in twenty leaves out the 1, but none by far.
    assert found.speedup.low < 1.1
    assert found.speedup.high > 1 / 1.1


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (25_557_032, "25.6 M"), (4.09e9, "4.09 G"),
     (123e12, "123 T")],
)  # fmt: skip
def test_quantity(number, text):
    assert quantity(number) == text
