"""Folders of stored models: what is refused by name, and what is never lost."""

from __future__ import annotations

import copy
import importlib
import json
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_nets import Heads, drawn, seeded
from stored_models import X, assert_same_model, heads, slim_of
from stored_nets import Sized, sized
from torch import nn

import depcut
from depcut.storage.folder import entry

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A stored model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "plan.json", "depcut.json"])
def test_a_missing_file(name: str, own: Path) -> None:
    (own / name).unlink()
    with pytest.raises(depcut.InputError, match=name.replace(".", r"\.")):
        depcut.load(own)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors", "plan.json", "depcut.json"])
def test_a_damaged_file(name: str, own: Path) -> None:
    content = bytearray((own / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own / name).write_bytes(content)
    with pytest.raises(depcut.InputError, match=r"damaged|cannot be read|no stored model"):
        depcut.load(own)


def rewritten(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file, and its hash with it, as somebody could who means harm."""
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    if name != "depcut.json":
        index = json.loads((folder / "depcut.json").read_text())
        index["files"][name] = entry(folder / name)
        (folder / "depcut.json").write_text(json.dumps(index))


def test_another_format(own: Path) -> None:
    rewritten(own, "depcut.json", lambda data: data.update(format=99))
    with pytest.raises(depcut.InputError, match="format 99"):
        depcut.load(own)


CODE = "__import__('os').system('true')"


def _edits(data: Any) -> Any:
    return data["modules"][0]["patches"][0][0]["edits"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: _edits(data)[0].update(new=CODE),
        lambda data: _edits(data)[0].update(kind="keyword", name=f"a={CODE}, b"),
        lambda data: _edits(data)[0].update(kind="import"),
        lambda data: data["modules"].pop(),
        lambda data: data["tensors"][0].update(shape=[5]),
        lambda data: data["tensors"][0].update(key="x"),
        lambda data: data["tensors"][0].update(file="../x.safetensors"),
        lambda data: data["modules"][0]["attributes"].update(p={"what": 1}),
    ],
)
def test_a_tampered_description_is_refused(change: Callable[[Any], Any], own: Path) -> None:
    rewritten(own, "model.json", change)
    with pytest.raises(depcut.InputError, match="damaged"):
        depcut.load(own)


@pytest.mark.sweep
@pytest.mark.usefixtures("only_generated")
@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes[0].update(name=f"x; {CODE}"),
        lambda nodes: nodes[0].update(target=f"x; {CODE}"),
        lambda nodes: nodes[-2].update(target={"function": "builtins:exec"}),
        lambda nodes: nodes[-2].update(kind="call_method", target="backward"),
    ],
)
def test_a_tampered_graph_is_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    slim = depcut.shrink(seeded(sized).eval(), 0.4, X, align=1)
    depcut.save(slim, tmp_path / "model")
    rewritten(
        tmp_path / "model",
        "model.json",
        lambda data: change(data["modules"][0]["generated"]["graph"]),
    )
    with pytest.raises(depcut.InputError, match="damaged"):
        depcut.load(tmp_path / "model", sized)


def test_another_architecture(saved: Path) -> None:
    with pytest.raises(depcut.InputError, match="another architecture"):
        depcut.load(saved, lambda: nn.Linear(2, 2))
    with pytest.raises(depcut.PlanError, match=r"ReLU.*Heads|Heads.*ReLU"):
        depcut.load(saved, nn.ReLU)
    with pytest.raises(depcut.InputError, match=r"cannot be built: .*hidden"):
        depcut.load(saved, Sized)
    with pytest.raises(depcut.InputError, match="net is a str"):
        depcut.load(saved, "Heads")  # type: ignore[arg-type]


def test_a_class_whose_arguments_are_not_known(tmp_path: Path) -> None:
    depcut.save(copy.deepcopy(slim_of(sized, X)), tmp_path / "model")
    with pytest.raises(depcut.InputError, match="hidden"):
        depcut.load(tmp_path / "model")


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.a(x).unflatten(-1, (4, 4)).relu()
        return self.b(h.flatten(2)) * {factor}
"""


def test_source_that_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stored_own.py").write_text(textwrap.dedent(NET.format(factor=2)))
    module = importlib.import_module("stored_own")
    try:
        depcut.save(depcut.shrink(module.Net().eval(), 0.4, X, align=1), tmp_path / "model")
        (tmp_path / "stored_own.py").write_text(textwrap.dedent(NET.format(factor=21)))
        del sys.modules["stored_own"]
        with pytest.raises(depcut.PlanError, match=r"forward is not the function that was patched"):
            depcut.load(tmp_path / "model")
        (tmp_path / "stored_own.py").unlink()
        sys.modules.pop("stored_own", None)
        importlib.invalidate_caches()
        with pytest.raises(depcut.InputError, match="cannot be imported"):
            depcut.load(tmp_path / "model")
    finally:
        sys.modules.pop("stored_own", None)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(depcut.PlanError, match="no plan was applied"):
        depcut.save(Heads(), tmp_path / "model")
    slim: Any = heads()
    slim.sparse = torch.eye(3).to_sparse()
    with pytest.raises(depcut.InputError, match="layout"):
        depcut.save(slim, tmp_path / "model")
    with pytest.raises(depcut.InputError, match="no values"):
        depcut.save(heads().to("meta"), tmp_path / "model")
    with pytest.raises(depcut.InputError, match="standalone"):
        depcut.save(heads(), tmp_path / "model", standalone="pickle")
    assert not (tmp_path / "model").exists()


# Folders ------------------------------------------------------------------------------------------


def test_an_earlier_run_leaves_nothing(tmp_path: Path) -> None:
    slim = heads()
    slim.register_buffer("image", drawn(2), persistent=False)
    depcut.save(slim, tmp_path / "model")
    assert (tmp_path / "model" / "tensors.safetensors").exists()
    (tmp_path / "model").chmod(0o750)
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    depcut.save(heads(), tmp_path / "link")
    assert not (tmp_path / "model" / "tensors.safetensors").exists()
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]
    assert_same_model(depcut.load(tmp_path / "link"), heads(), X)


def test_files_of_the_user_are_not_replaced(own: Path) -> None:
    (own / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in own.iterdir()}
    with pytest.raises(depcut.InputError, match=r"notes\.txt"):
        depcut.save(heads(), own)
    assert {p.name: p.read_bytes() for p in own.iterdir()} == before


def test_a_full_disk_leaves_the_earlier_run(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in own.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(depcut.DepcutError, match="No space left"):
            depcut.save(heads(), own)
    with monkeypatch.context() as patched:
        patched.setattr("depcut.storage.save.model_card", full)
        with pytest.raises(depcut.DepcutError, match="No space left"):
            depcut.save(heads(), own)
    assert {p.name: p.read_bytes() for p in own.iterdir()} == before
    assert [p.name for p in own.parent.iterdir()] == ["model"]
