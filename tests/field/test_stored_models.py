"""What `depcut.save` writes, `depcut.load` reads: the same model, or an error by name."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_nets import Heads, drawn, seeded
from stored_nets import Attention, Sized, Stateful, sized
from torch import Tensor, nn

import depcut

pytestmark = pytest.mark.usefixtures("one_thread")

X = drawn(3, 6, 8)


@functools.cache
def _slim(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    return depcut.shrink(seeded(make).eval(), 0.4, x, align=1)


def heads() -> nn.Module:
    """A copy of a patched net, so that no test sees what another one did."""
    return copy.deepcopy(_slim(Heads, X))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model, which tests copy before they change it."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    depcut.save(heads(), folder)
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A stored model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_same_model(loaded: nn.Module, slim: nn.Module, x: Tensor) -> None:
    assert [type(m) for m in loaded.modules()] == [type(m) for m in slim.modules()]
    assert [m.training for m in loaded.modules()] == [m.training for m in slim.modules()]
    assert str(depcut.report(loaded)) == str(depcut.report(slim))
    for held in ("parameters", "buffers"):
        wanted = dict(getattr(slim, f"named_{held}")(remove_duplicate=False))
        got = dict(getattr(loaded, f"named_{held}")(remove_duplicate=False))
        assert list(got) == list(wanted)
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].stride() == tensor.stride()
            assert got[name].requires_grad == tensor.requires_grad
            assert torch.equal(got[name], tensor), name
        same = [[a is b for b in wanted.values()] for a in wanted.values()]
        assert [[a is b for b in got.values()] for a in got.values()] == same
    assert list(loaded.state_dict()) == list(slim.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), slim(x))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a patched class": (Heads, X),
    "arguments that the class needs": (sized, X),
    "state of all kinds": (Stateful, drawn(4, 6)),
    "slim attention": (Attention, drawn(2, 5, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_the_saved_one(name: str, tmp_path: Path) -> None:
    make, x = CASES[name]
    slim = copy.deepcopy(_slim(make, x))
    next(slim.parameters()).requires_grad_(False)
    depcut.save(slim, tmp_path / "model")
    loaded = depcut.load(tmp_path / "model", make)
    assert_same_model(loaded, slim, x)
    depcut.save(loaded, tmp_path / "again")
    first, second = (
        json.loads((tmp_path / n / "model.json").read_text()) for n in ("model", "again")
    )
    assert first == second


def test_it_is_a_model_like_any_other(saved: Path) -> None:
    loaded = depcut.load(saved)
    loaded.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    loaded.eval()
    twin = pickle.loads(pickle.dumps(loaded))  # noqa: S301
    assert torch.equal(twin(X), loaded(X))
    assert torch.equal(loaded.double()(drawn(2, 9, 8).double()), loaded(drawn(2, 9, 8).double()))
    torch.export.export(loaded.float(), (X,))
    smaller = depcut.shrink(loaded.float(), 0.3, X, align=1)
    assert depcut.report(smaller).params[0] == depcut.report(heads()).params[1]


def test_a_model_that_was_made_smaller_twice(tmp_path: Path) -> None:
    twice = depcut.shrink(heads(), 0.3, X, align=1)
    depcut.save(twice, tmp_path / "model")
    assert {"plan.1.json", "plan.2.json"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert_same_model(depcut.load(tmp_path / "model"), twice, X)
    first = depcut.Plan.load(tmp_path / "model" / "plan.1.json").apply(seeded(Heads).eval(), X)
    again = depcut.Plan.load(tmp_path / "model" / "plan.2.json").apply(first, X)
    assert torch.equal(again(X), twice(X))


@pytest.mark.usefixtures("only_generated")
def test_a_generated_module(tmp_path: Path) -> None:
    slim = depcut.shrink(seeded(sized).eval(), 0.4, X, align=1)
    assert depcut.report(slim).generated
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model", sized)
    assert_same_model(loaded, slim, X)
    assert loaded.code == slim.code
    with pytest.raises(depcut.InputError, match="was captured with"):
        loaded(drawn(3, 7, 8))
    assert_same_model(depcut.load(tmp_path / "model", loaded_from := seeded(sized)), slim, X)
    assert type(loaded_from) is Sized


def test_what_compact_returns(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        dense[0].weight[2:5] = 0
    slim = depcut.compact(dense, drawn(4, 6))
    depcut.save(slim, tmp_path / "model")
    with pytest.raises(depcut.PlanError, match="there is no"):
        depcut.load(tmp_path / "model")
    assert_same_model(depcut.load(tmp_path / "model", dense), slim, drawn(4, 6))


def test_other_layouts_and_shared_memory(tmp_path: Path) -> None:
    slim: Any = heads()
    slim.register_buffer("image", drawn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    slim.register_buffer("view", slim.image[:1], persistent=False)
    slim.twin = nn.Parameter(slim.proj.weight.data)
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model")
    assert_same_model(loaded, slim, X)
    assert loaded.twin is not loaded.proj.weight
    assert loaded.twin.data_ptr() == loaded.proj.weight.data_ptr()


def test_nothing_of_the_callers_changes(saved: Path) -> None:
    dense, before = seeded(Heads), torch.get_rng_state()
    values = {n: t.clone() for n, t in dense.state_dict().items()}
    kinds = [type(m) for m in dense.modules()]
    loaded = depcut.load(saved, dense)
    assert torch.equal(before, torch.get_rng_state())
    assert [type(m) for m in dense.modules()] == kinds
    assert all(torch.equal(t, values[n]) for n, t in dense.state_dict().items())
    assert not {t.data_ptr() for t in loaded.parameters()} & {
        t.data_ptr() for t in dense.parameters()
    }


def test_the_weights_are_those_of_the_state(saved: Path) -> None:
    from safetensors.torch import load_file

    slim = heads()
    state = load_file(saved / "weights.safetensors")
    assert list(state) == sorted(slim.state_dict())
    fresh = depcut.Plan.load(saved / "plan.json").apply(seeded(Heads).eval(), X)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), slim(X))


def test_the_card_says_what_it_is(saved: Path) -> None:
    card, report = (saved / "README.md").read_text(), depcut.report(heads())
    module = Heads.__module__
    for text in (
        "# Heads, made smaller", f"`{module}`", f"{report.params[0]:,}", f"{report.params[1]:,}",
        report.digest, "| ratio | 0.4 |", "no data", "depcut.load(folder, Heads)",
    ):  # fmt: skip
        assert text in card
    named = {line.split("`")[1] for line in card.partition("## Files")[2].splitlines()[4:] if line}
    assert named == {p.name for p in saved.iterdir()}


def test_the_card_has_measured_speed(tmp_path: Path) -> None:
    slim = heads()
    measured = depcut.compare(seeded(Heads).eval(), slim, X, runtime="torch", rounds=6)
    depcut.save(slim, tmp_path / "model", comparison=measured)
    card = (tmp_path / "model" / "README.md").read_text()
    assert str(measured.speedup) in card
    assert "eager" in card


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_its_config_cannot_rebuild(tmp_path: Path, zoo_libraries: None) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    slim: Any = depcut.shrink(dense, 0.4, {"input_ids": ids}, align=1, rebuildable=False)
    depcut.save(slim, tmp_path / "model")
    loaded: Any = depcut.load(tmp_path / "model")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, slim(ids).logits)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **options), slim.generate(ids, **options))
    with pytest.raises(depcut.DepcutError, match="could not rebuild"):
        loaded.save_pretrained(tmp_path / "stock")
    assert loaded.config.to_dict() == slim.config.to_dict()
    assert "depcut.load(folder)" in (tmp_path / "model" / "README.md").read_text()


# What is refused ----------------------------------------------------------------------------------


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
    from depcut.storage.folder import _entry

    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    if name != "depcut.json":
        index = json.loads((folder / "depcut.json").read_text())
        index["files"][name] = _entry(folder / name)
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
    depcut.save(copy.deepcopy(_slim(sized, X)), tmp_path / "model")
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
