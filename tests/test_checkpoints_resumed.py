"""A calibration that is killed goes on behind the stretch of the walk that it finished last."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_checkpoints import contents, write
from torch import nn

import depcut
from depcut.calibration import trail as trails
from depcut.calibration.data import calibrate
from depcut.errors import InputError
from depcut.streaming.journal import TRAIL


class Killed(BaseException):
    """In place of a kill: nothing of depcut catches it."""


class Ends:
    """Counts the ends of stretches, and ends the process, as it were, before one of them."""

    def __init__(self, monkeypatch, after=None):
        self.seen, self.after, real = [], after, trails._Following._write

        def write(steps):
            if len(self.seen) == self.after:
                raise Killed
            real(steps)
            self.seen.append(steps.name)

        monkeypatch.setattr(trails._Following, "_write", write)
        monkeypatch.setattr(trails, "_SHARE", 1.0)


class Net(nn.Module):
    """A stream that all blocks read, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)
        )
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def scored(analysis, model, folder, monkeypatch, after=None):
    """What obs keeps on data that leave a trail, and the ends of stretches."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 6, generator=generator) for _ in range(3)]
    program = analysis.program
    bound = calibrate(program, model, data, memory=20_000, progress=False)
    with monkeypatch.context() as patch:
        ends = Ends(patch, after)
        left = replace(bound, trail=trails.Trail(folder))
        try:
            kept = analysis.plan(0.5, score="obs", data=left).kept
        except Killed:
            kept = None
    return kept, ends.seen


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
    return model, depcut.analyze(model, torch.randn(8, 6))


def assert_same(kept, expected):
    assert kept.keys() == expected.keys()
    assert all(np.array_equal(kept[name], expected[name]) for name in kept)


def test_scores_on_data_go_on_behind_the_last_stretch(net, tmp_path, monkeypatch):
    model, analysis = net
    expected, whole = scored(analysis, model, tmp_path, monkeypatch)
    assert len(whole) > 8
    trails.Trail(tmp_path).clear()
    assert not list(tmp_path.iterdir())
    seen = []
    for after in (2, 3, 2):  # forward, then back
        kept, ends = scored(analysis, model, tmp_path, monkeypatch, after)
        assert kept is None
        seen += ends
    kept, ends = scored(analysis, model, tmp_path, monkeypatch)
    assert seen + ends == whole
    assert_same(kept, expected)


DAMAGES = {
    "file": lambda path: max(path.glob("*.bin"), key=os.path.getsize).write_bytes(b""),
    "missing": lambda path: next(path.glob("*.bin")).unlink(),
    "manifest": lambda path: (path / "trail.json").write_text("{"),
    "other": lambda path: (path / "trail.json").write_text(
        (path / "trail.json").read_text().replace('"size"', '"tuple"').replace("64", "32")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_trail_that_is_damaged_is_not_followed(net, tmp_path, monkeypatch, damage):
    model, analysis = net
    expected, whole = scored(analysis, model, tmp_path, monkeypatch)
    trails.Trail(tmp_path).clear()
    scored(analysis, model, tmp_path, monkeypatch, 6)
    DAMAGES[damage](tmp_path)
    kept, ends = scored(analysis, model, tmp_path, monkeypatch)
    assert ends == whole
    assert_same(kept, expected)


def test_a_full_disk_is_named_and_what_there_is_stays(net, tmp_path, monkeypatch):
    model, analysis = net
    expected, whole = scored(analysis, model, tmp_path, monkeypatch)
    trails.Trail(tmp_path).clear()
    _, done = scored(analysis, model, tmp_path, monkeypatch, 4)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            scored(analysis, model, tmp_path, monkeypatch)
    kept, ends = scored(analysis, model, tmp_path, monkeypatch)
    assert done + ends == whole
    assert_same(kept, expected)


def shrunk(src, out, monkeypatch, after=None):
    """The ends of stretches that were met, until the kill."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(96, (4, 12), generator=generator) for _ in range(3)]
    with monkeypatch.context() as patch:
        ends = Ends(patch, after)
        try:
            depcut.shrink_checkpoint(src, out, 0.3, data=data, memory="200kB", progress=False)
        except Killed:
            assert (out / TRAIL / "trail.json").exists()
    return ends.seen


@pytest.mark.sweep
def test_a_checkpoint_that_is_killed_in_its_calibration_ends_with_the_same_bytes(
    tmp_path, monkeypatch
):
    src = write(tmp_path / "dense", layers=1)
    whole = shrunk(src, tmp_path / "whole", monkeypatch)
    count = Counter(whole)
    assert count["sensitivity"] > 4  # forward and back
    assert count["compensate"] > 2
    out = tmp_path / "slim"
    seen = shrunk(src, out, monkeypatch, count["sensitivity"] + 1)
    assert not (out / "config.json").exists()
    assert seen + shrunk(src, out, monkeypatch) == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*"))
