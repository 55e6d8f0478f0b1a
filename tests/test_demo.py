"""The demo, at a size that takes seconds."""

import builtins
import io

import pytest
import torch
from rich.console import Console

from depcut.calibration import self_made
from depcut.cli.demo import run_demo
from depcut.cli.digits import accuracy, load_digits
from depcut.errors import DepcutError

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setattr(self_made, "_EXAMPLES", (16, 32))


def run(folder, seed=0):
    console = Console(file=io.StringIO(), width=100)
    result = run_demo(
        folder, epochs=4, retrain_epochs=2, widths=(16, 32), rounds=6, seed=seed, console=console
    )
    return result, console.file.getvalue()


def test_demo_shrinks_and_prints_dense_beside_slim(tmp_path):
    state = torch.get_rng_state()
    result, text = run(tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), state)
    assert result.dense.accuracy > 0.9
    assert result.slim.accuracy > 0.85
    # What data is for: the weights that read removed units are re-solved, nothing is trained.
    assert result.repaired_accuracy > result.dense.accuracy - 0.05
    assert result.cut_accuracy <= result.made_accuracy
    assert result.made_accuracy > result.dense.accuracy - 0.1
    assert 0.48 < result.slim.macs / result.dense.macs < 0.52
    assert result.slim.params < result.dense.params
    assert result.slim.file.bytes < result.dense.file.bytes
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == ["dense.onnx", "slim.onnx"]
    for label in ("test accuracy", "parameters", "MACs", "file", "latency", "written", "train"):
        assert label in text


@pytest.mark.exhaustive
def test_demo_is_deterministic(tmp_path):
    first, _ = run(tmp_path)
    second, _ = run(tmp_path)
    assert first.dense.accuracy == second.dense.accuracy
    assert first.slim.accuracy == second.slim.accuracy
    assert first.slim.file.max_abs_error == second.slim.file.max_abs_error


def test_split_is_fixed_and_disjoint():
    first, second, other = load_digits(0), load_digits(0), load_digits(1)
    assert torch.equal(first.test_images, second.test_images)
    assert not torch.equal(first.test_labels, other.test_labels)
    assert len(first.test_labels) + len(first.train_labels) == 1797
    assert first.train_images.shape[1:] == (1, 16, 16)
    assert 0 <= first.train_images.min() <= first.train_images.max() <= 1


def test_accuracy_counts_and_restores_the_mode():
    digits = load_digits()

    class Oracle(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            start = self.seen
            self.seen += len(images)
            return torch.nn.functional.one_hot(digits.test_labels[start : self.seen], 10)

    model = Oracle()
    model.seen = 0
    assert accuracy(model, digits) == 1.0
    assert model.training


def test_missing_scikit_learn_names_the_command(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DepcutError, match="pip install scikit-learn"):
        load_digits()


def test_demo_goes_through_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(self_made, "_EXAMPLES", (2, 4))
    console = Console(file=io.StringIO(), width=100)
    result = run_demo(
        tmp_path, epochs=0, retrain_epochs=1, widths=(8, 16), rounds=6, console=console
    )
    text = console.file.getvalue()
    assert all(label in text for label in ("- not retrained", "nor repaired", "slim.onnx"))
    assert result.dense.accuracy < 0.3  # of ten classes
    assert result.slim.params < result.dense.params
    assert {file.name for file in tmp_path.iterdir()} == {"dense.onnx", "slim.onnx"}
