"""A calibration of a checkpoint that is killed goes on behind the stretch that was finished last."""

import os
from collections import Counter

import pytest
import torch
from test_checkpoints import contents, write

import depcut
from depcut.calibration import trail as trails
from depcut.errors import InputError
from depcut.streaming.journal import TRAIL
from depcut.support import files

MEMORY = "200kB"  # of which a stretch of obs is a quarter


class Killed(BaseException):
    """In place of a kill: nothing of depcut catches it."""


class Ends:
    """Counts the ends of stretches, and ends the process, as it were, before one of them."""

    def __init__(self, monkeypatch, after=None):
        self.seen, self.after, self.real = [], after, trails._Following._write
        monkeypatch.setattr(trails._Following, "_write", lambda steps: self.write(steps))
        monkeypatch.setattr(trails, "_SHARE", 1.0)

    def write(self, steps):
        if len(self.seen) == self.after:
            raise Killed
        self.real(steps)
        self.seen.append(steps.name)


def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(96, (4, 12), generator=generator) for _ in range(3)]


def shrunk(src, out, monkeypatch, after=None):
    """The ends of stretches that were met, until the kill."""
    with monkeypatch.context() as patch:
        ends = Ends(patch, after)
        given = {"data": data(), "memory": MEMORY, "progress": False}
        if after is None:
            depcut.shrink_checkpoint(src, out, 0.3, **given)
        else:
            with pytest.raises(Killed):
                depcut.shrink_checkpoint(src, out, 0.3, **given)
    return ends.seen


def test_no_finished_stretch_is_walked_again_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    src = write(tmp_path / "dense", layers=1)
    whole = shrunk(src, tmp_path / "whole", monkeypatch)
    count = Counter(whole)
    assert count["sensitivity"] > 4  # forward and back
    assert count["compensate"] > 2
    out, seen = tmp_path / "slim", []
    for after in (2, count["sensitivity"], 1):  # forward, in the compensation, again there
        seen += shrunk(src, out, monkeypatch, after)
        assert not (out / "config.json").exists()
        assert (out / TRAIL / "trail.json").exists()
    seen += shrunk(src, out, monkeypatch)
    assert seen == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*"))


def assert_begins_anew(src, out, whole, monkeypatch):
    assert shrunk(src, out, monkeypatch) == whole
    assert contents(out) == contents(src.parent / "whole")


@pytest.mark.sweep
def test_a_trail_that_is_damaged_is_not_followed(tmp_path, monkeypatch):
    src = write(tmp_path / "dense", layers=1)
    whole = shrunk(src, tmp_path / "whole", monkeypatch)
    for number, damage in enumerate(
        (
            lambda path: max(path.glob("*.bin"), key=os.path.getsize).write_bytes(b""),
            lambda path: (path / "trail.json").write_text("{"),
            lambda path: (path / "trail.json").write_text(
                (path / "trail.json").read_text().replace("sensitivity", "compensate")
            ),
        )
    ):
        out = tmp_path / f"slim-{number}"
        shrunk(src, out, monkeypatch, 3)
        damage(out / TRAIL)
        assert_begins_anew(src, out, whole, monkeypatch)


@pytest.mark.sweep
def test_a_refusal_leaves_nothing_and_a_full_disk_what_there_is(tmp_path, monkeypatch):
    src = write(tmp_path / "dense", layers=1)
    whole = shrunk(src, tmp_path / "whole", monkeypatch)
    out = tmp_path / "slim"
    done = shrunk(src, out, monkeypatch, 3)
    with monkeypatch.context() as patch:
        ends = Ends(patch)

        def full(*_):
            raise OSError(28, os.strerror(28))

        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            depcut.shrink_checkpoint(src, out, 0.3, data=data(), memory=MEMORY, progress=False)
        assert not ends.seen
    assert not list((out / TRAIL).glob(f"{files.DRAFT}*"))
    assert done + shrunk(src, out, monkeypatch) == whole
    broken = [torch.full((4, 12), 95)]
    with monkeypatch.context() as patch:
        patch.setattr(trails.Trail, "following", refused)
        with pytest.raises(InputError, match="NaN"):
            depcut.shrink_checkpoint(src, tmp_path / "none", 0.3, data=broken, progress=False)
    assert not (tmp_path / "none").exists()


def refused(*_):
    raise InputError("activations are NaN")
