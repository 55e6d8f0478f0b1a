"""Where public functions write: odd places, a full disk, damage, two runs at once, all by name."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import sampled
from torch import nn
from torch.nn import functional

import depcut
from depcut.cli.main import main
from depcut.errors import DepcutError, TrainingError
from depcut.support import codec, files
from depcut.training import Snapshots, iterate, retrain

X = torch.randn(3, 6)
DATA = [(X, torch.zeros(3, 4))] * 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def retrained(path: Any, **options: Any) -> Any:
    given = {"epochs": 2, "loss": functional.mse_loss, "lr": 0.1, "progress": False}
    return retrain(net(), DATA, DATA, checkpoint=path, **{**given, **options})


def command(name: str, *options: str) -> Callable[[Any], None]:
    def run(path: Any) -> None:
        given = (name, f"{__name__}:net", "--input-shape", "3,6", *options)
        if main([*given, "--out", os.fsdecode(path)]):
            raise DepcutError("as printed")

    return run


Write = Callable[[Any], Any]
TO_FILES: dict[str, Write] = {
    "plan": lambda path: depcut.analyze(net(), X).plan(0.4).save(path),
    "export": lambda path: depcut.export(net(), path, X),
    "command export": command("export"),
}
TO_FOLDERS: dict[str, Write] = {
    "snapshots": lambda path: Snapshots((0,), path)(net(), 0),
    "retrain": retrained,
    "iterate": lambda path: iterate(net(), 0.4, X, steps=2, checkpoint=path, progress=False),
    "command shrink": command("shrink", "--ratio", "0.4"),
}
WRITERS = {**TO_FILES, **TO_FOLDERS}
QUICK = ("plan", "snapshots")


def assert_refused(write: Write, path: Any) -> None:
    """An error by name, and nothing but what was there."""
    folder = Path(os.fsdecode(path)).parent
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    with pytest.raises(DepcutError):
        write(path)
    assert not list(folder.glob("**/.draft*"))
    assert (sorted(folder.iterdir()) if folder.is_dir() else []) == before


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def file_above(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "below"


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


ODD: dict[str, Callable[[Path], Any]] = {
    "a FIFO": fifo,
    "below a file": file_above,
    "a link to itself": loop,
    "a long name": lambda folder: folder / ("n" * 300),
    "no name": lambda folder: f"{folder}/a\0b",
}
ODD_CASES = {f"{name}, {odd}": (WRITERS[name], ODD[odd]) for name in WRITERS for odd in ODD}


@pytest.mark.parametrize(
    "case", sampled(ODD_CASES, [f"{name}, {odd}" for name in QUICK for odd in ODD])
)
def test_odd_places_are_refused(case: tuple[Write, Any], tmp_path: Path) -> None:
    write, odd = case
    assert_refused(write, odd(tmp_path))


@pytest.mark.parametrize("name", sampled(list(TO_FILES), ["plan"]))
def test_files_in_a_folder_that_is_missing_or_a_folder_are_refused(
    name: str, tmp_path: Path
) -> None:
    assert_refused(TO_FILES[name], tmp_path / "missing" / "file.onnx")
    assert_refused(TO_FILES[name], tmp_path)
    assert_refused(TO_FILES[name], "/dev/full")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file gets longer than so many bytes: the system says so in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", sampled(list(TO_FILES), ["plan"]))
def test_a_full_disk_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.onnx").write_text("old")
    with full_disk(600):
        assert_refused(TO_FILES[name], tmp_path / "file.onnx")
    assert (tmp_path / "file.onnx").read_text() == "old"


@pytest.mark.parametrize("name", sampled(list(TO_FOLDERS), ["snapshots", "retrain"]))
def test_a_full_disk_leaves_no_half_written_step(name: str, tmp_path: Path) -> None:
    with full_disk(600), pytest.raises(DepcutError):
        TO_FOLDERS[name](tmp_path / "run")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" for path in left)


@pytest.mark.parametrize("name", sampled(list(TO_FOLDERS), ["snapshots", "retrain"]))
def test_a_folder_that_is_no_utf8_is_written_to(name: str, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    TO_FOLDERS[name](path)
    assert list(path.iterdir())


def test_a_snapshot_in_such_a_folder_is_read(tmp_path: Path) -> None:
    snapshots = Snapshots((0,), os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    snapshots(net(), 0)
    assert torch.equal(snapshots.restore(net())[0].weight, net()[0].weight)


def test_an_export_to_such_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(depcut.ExportError, match="no valid UTF-8"):
        depcut.export(net(), os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.onnx"), X)


@pytest.mark.parametrize("folder", [3, "a\0b", None.__class__], ids=["3", "zero", "a class"])
def test_what_is_no_path_is_refused(folder: Any) -> None:
    with pytest.raises(TrainingError, match="pass a path"):
        retrained(folder)
    with pytest.raises(depcut.InputError, match="pass a path"):
        Snapshots((0,), folder)
    with pytest.raises(depcut.ExportError, match="pass a path"):
        depcut.export(net(), folder, X)


def test_damaged_best_weights_are_named(tmp_path: Path) -> None:
    retrained(tmp_path)
    (best,) = tmp_path.glob("best-*.safetensors")
    for content in (b"", b"\xff" * 40, best.read_bytes()[:-9]):
        best.write_bytes(content)
        with pytest.raises(TrainingError, match=r"best weights cannot be read(.|\n)*resume=False"):
            retrained(tmp_path)
    best.unlink()
    with pytest.raises(TrainingError, match="best weights cannot be read"):
        retrained(tmp_path)
    assert retrained(tmp_path, resume=False).resumed == 0


DAMAGED = {"empty": "", "other": "{}", "deep": "[" * 100_000, "odd": '{"dict": [[1]]}'}


@pytest.mark.parametrize("content", sampled({**DAMAGED, "bare": '{"dict": []}'}, ["deep", "bare"]))
def test_a_damaged_state_is_named(content: str, tmp_path: Path) -> None:
    retrained(tmp_path)
    (state,) = tmp_path.glob("step-*/state.json")
    state.write_text(content)
    with pytest.raises(TrainingError, match=r"cannot be read(.|\n)*resume=False"):
        retrained(tmp_path)


def test_two_runs_in_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    caught: list[Exception] = []

    def second(*_: Any) -> None:
        try:
            iterate(net(), 0.4, X, steps=1, checkpoint=tmp_path, progress=False)
        except DepcutError as error:
            caught.append(error)

    def meanwhile(_model: nn.Module, _step: int) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    iterate(net(), 0.4, X, steps=1, retrain=meanwhile, checkpoint=tmp_path, progress=False)
    assert ["another run is writing to the folder" in str(error) for error in caught] == [True]
    message = "another run is writing"  # the folder was free again
    with files.claimed(tmp_path, "checkpoint="), pytest.raises(TrainingError, match=message):
        retrained(tmp_path)


def test_a_draft_that_another_process_removed_is_an_error_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = codec.save

    def removed(tree: Any, folder: Path) -> None:
        save(tree, folder)
        files.remove_drafts(folder.parent)

    monkeypatch.setattr(codec, "save", removed)
    with pytest.raises(DepcutError, match="cannot be written"):
        retrained(tmp_path)


def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with files.claimed(tmp_path, "checkpoint="), files.claimed(tmp_path, "checkpoint="):
        retrained(tmp_path)
    assert list(tmp_path.iterdir()) != []
