"""Files appear complete or not at all, keep modes and links, and say why they cannot be written."""

from __future__ import annotations

import ast
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from layers import PACKAGE, nodes

from depcut.errors import DepcutError, ExportError
from depcut.support import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    files.write_json(tmp_path / "new.json", {"a": 1})
    assert json.loads((tmp_path / "new.json").read_text()) == {"a": 1}
    assert mode(tmp_path / "new.json") == 0o666 & ~umask
    assert names(tmp_path) == ["new.json"]


@pytest.mark.parametrize("kept", [0o640, 0o600, 0o444])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, kept: int) -> None:
    target = tmp_path / "old.json"
    target.write_text("old")
    target.chmod(kept)
    files.write_json(target, [2])
    assert target.read_text() == "[2]"
    assert mode(target) == kept


def test_a_draft_of_a_private_file_is_private(tmp_path: Path) -> None:
    target = tmp_path / "private.json"
    target.write_text("old")
    target.chmod(0o600)
    with files.replacing(target) as draft:
        assert mode(draft) == 0o600


def test_a_writer_that_makes_the_draft_anew_changes_no_mode(tmp_path: Path) -> None:
    target = tmp_path / "old"
    target.write_text("old")
    target.chmod(0o640)
    with files.replacing(target) as draft:
        draft.unlink()
        draft.write_text("new")
        draft.chmod(0o777)
    assert (target.read_text(), mode(target)) == ("new", 0o640)


def test_a_new_folder_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    with files.new_folder(tmp_path / "step") as draft:
        (draft / "a").write_text("a")
        assert not (tmp_path / "step").exists()
    assert mode(tmp_path / "step") == 0o777 & ~umask
    assert names(tmp_path) == ["step"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "step"
    target.mkdir()
    (target / "old").write_text("old")
    with files.new_folder(target, flush=True) as draft:
        (draft / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["step"]


@pytest.mark.parametrize("present", [True, False])
def test_a_link_stays_and_its_file_is_written(tmp_path: Path, present: bool) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "plan.json", tmp_path / "link.json"
    if present:
        real.write_text("old")
    link.symlink_to(Path("real") / "plan.json")
    files.write_json(link, [1])
    assert link.is_symlink()
    assert real.read_text() == "[1]"
    assert names(tmp_path) == ["link.json", "real"]
    assert names(tmp_path / "real") == ["plan.json"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DepcutError, match="cannot be written"):
        files.write_json(tmp_path / "a", [])
    assert names(tmp_path) == ["a", "b"]


def special(path: Path, kind: str) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        return Path(os.devnull)
    return path


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_special_files_are_refused(tmp_path: Path, kind: str, linked: bool) -> None:
    path = special(tmp_path / "special", kind)
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = names(tmp_path)
    with pytest.raises(DepcutError, match=f"the plan cannot be written: .* is a {kind}") as caught:
        files.write_json(path, [], "plan")
    assert caught.value.where == str(path)
    assert caught.value.remedy.startswith("pass the name of a file")
    assert names(tmp_path) == before


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no does not exist") as caught:
        files.write_json(tmp_path / "no" / "a.json", [], error=ExportError)
    assert caught.value.where == str(tmp_path / "no" / "a.json")
    assert caught.value.remedy == "create it first"
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DepcutError, match="file does not exist"):
        files.write_json(tmp_path / "file" / "a.json", [])
    with pytest.raises(DepcutError, match="is no folder"), files.new_folder(tmp_path / "file"):
        pass
    with pytest.raises(DepcutError, match="the folder cannot be made") as caught:
        files.make_folder(tmp_path / "file" / "a", "out=")
    assert caught.value.where == "out="


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_folder_that_takes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(refusal, os.strerror(refusal))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        with pytest.raises(DepcutError, match=os.strerror(refusal)) as caught:
            files.write_json(tmp_path / "a.json", [], "plan")
    assert caught.value.where == str(tmp_path / "a.json")
    assert "choose a folder that can be written to" in caught.value.remedy
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["write", "flush", "rename"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    if step == "flush":
        monkeypatch.setattr(os, "fsync", full)
    if step == "rename":
        monkeypatch.setattr(Path, "replace", full)

    def write() -> None:
        with files.replacing(target, "plan", flush=True) as draft:
            draft.write_text("half of")
            if step == "write":
                full()

    with pytest.raises(DepcutError, match=r"the plan cannot be written: .*No space left") as caught:
        write()
    assert caught.value.where == str(target)
    assert "free some space" in caught.value.remedy
    assert names(tmp_path) == ["a.json"]
    assert target.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write() -> None:
        with files.replacing(target) as draft:
            draft.unlink()
            draft.symlink_to("/dev/full")
            draft.write_text("x" * 100_000)

    with pytest.raises(DepcutError, match="No space left"):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize("present", [True, False])
def test_an_interrupt_leaves_what_was_there(tmp_path: Path, present: bool) -> None:
    target = tmp_path / "a"
    if present:
        target.write_text("old")

    def write() -> None:
        with files.replacing(target) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == (["a"] if present else [])
    assert not present or target.read_text() == "old"


@pytest.mark.parametrize(
    ("at", "present"),
    # Without an old folder there is no second renaming to interrupt.
    [("fill", True), ("fill", False), ("first", True), ("first", False), ("second", True)],
)
def test_an_interrupt_leaves_the_folder_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, present: bool
) -> None:
    target = tmp_path / "step"
    if present:
        target.mkdir()
        (target / "old").write_text("old")
    honest, calls = Path.rename, []

    def rename(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) == {"first": 1, "second": 2}[at]:
            raise KeyboardInterrupt
        return honest(self, other)

    if at != "fill":
        monkeypatch.setattr(Path, "rename", rename)

    def write() -> None:
        with files.new_folder(target) as draft:
            (draft / "new").write_text("new")
            if at == "fill":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == (["step"] if present else [])
    assert not present or names(target) == ["old"]


def test_other_errors_of_a_writer_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert names(tmp_path) == []


def test_drafts_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".draft-1").mkdir()
    (tmp_path / ".draft-1" / "a").write_text("")
    (tmp_path / ".draft-2").write_text("")
    (tmp_path / "a").write_text("")
    files.remove_drafts(tmp_path)
    assert names(tmp_path) == ["a"]


def test_a_workplace_goes_and_what_was_moved_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "net.onnx").symlink_to(tmp_path / "real" / "net.onnx")
    with files.workplace(tmp_path / "net.onnx") as (target, folder):
        assert folder.parent == tmp_path / "real"
        (folder / "net.onnx").write_text("graph")
        files.move(folder / "net.onnx", target)
    assert names(tmp_path) == ["net.onnx", "real"]
    assert names(tmp_path / "real") == ["net.onnx"]
    with (
        pytest.raises(ExportError, match=r"file cannot be written: .*No space"),
        files.workplace(tmp_path / "net.onnx", error=ExportError),
    ):
        full()
    assert names(tmp_path / "real") == ["net.onnx"]


# Calls that write, rename or make drafts, and the modules that may: everything else goes through
# `support.files` and `support.weights`.
WRITERS = {
    "calibration/store.py",  # a temporary folder, gone with the walk
    "calibration/trail.py",  # beside the shards, flushed and renamed; gone at the end
    "support/files.py",
    "support/mapped.py",  # temporary files that are mapped, and gone with what maps them
    "support/weights.py",
    "timing/footprint.py",  # tells the kernel to reset a peak
}
CALLS = {
    "NamedTemporaryFile", "mkstemp", "rename", "save_file", "save_model", "write_bytes",
    "write_text",
}  # fmt: skip


def test_one_module_writes() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Call):
                owner, _, name = ast.unparse(node.func).rpartition(".")
                if owner == "files":
                    continue
                to_write = name in ("open", "fdopen") and any(
                    isinstance(a, ast.Constant) and str(a.value)[:1] in ("w", "a", "x")
                    for a in node.args
                )
                # str.replace takes two arguments, Path.replace one
                moves = name == "replace" and len(node.args) == 1 and not node.keywords
                if name in CALLS or to_write or moves:
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found == WRITERS
