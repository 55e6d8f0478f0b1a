"""States go through JSON and safetensors and come back as they were; nothing is pickled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from depcut.errors import DepcutError, InputError
from depcut.support import codec

STATES: dict[str, Any] = {
    "nothing": {},
    "plain": {"a": [1, 2.5, "x", None, True], "b": ("tensor:0", (), [])},
    "numbers as keys": {0: {"step": 1}, "0": 2, (1, 2): 3, None: 4},
    "floats": [math.inf, -math.inf, 1e-320, 0.1],
    "words of its own": {"tensor": 1, "dict": [["a", 1]], "list": {"tuple": []}},
}


def same(a: Any, b: Any) -> bool:
    """Equal, of equal types, tensors bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", STATES)
def test_states_come_back(name: str, tmp_path: Path) -> None:
    codec.save(STATES[name], tmp_path)
    assert same(codec.load(tmp_path), STATES[name])


def test_tensors_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {
        "view": base.t(), "shared": base, "again": base, "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2), "half": base.bfloat16(), "flags": base > 3,
        "byte": torch.get_rng_state()[:9],
    }  # fmt: skip
    codec.save(state, tmp_path)
    assert same(codec.load(tmp_path), state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_names_with_slashes_are_kept_apart(tmp_path: Path) -> None:
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, 0: torch.full((1,), 2.0)}
    codec.save(state, tmp_path)
    assert same(codec.load(tmp_path), state)


def test_what_was_encoded_is_a_copy() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    plain, tensors = codec.encoded([parameter])
    parameter.data.fill_(1)
    (back,) = codec.decoded(plain, tensors)
    assert back.tolist() == [0, 0]
    assert not back.requires_grad


@pytest.mark.parametrize("value", [{1}, object(), print, b"bytes", 1j])
def test_what_would_have_to_be_pickled_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a \w+ cannot be written .* nothing is pickled"
    ) as caught:
        codec.save({"optimizer": [{"odd": value}]}, tmp_path)
    assert caught.value.where == "/optimizer/0/odd"
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_read_without_the_tensors(tmp_path: Path) -> None:
    codec.save({"run": {"epochs": 3}, "x": torch.zeros(2)}, tmp_path)
    (tmp_path / "state.safetensors").unlink()
    assert codec.load_entry(tmp_path, "run") == {"epochs": 3}
    for entry in ("x", "absent"):
        with pytest.raises(ValueError, match=r"damaged|no entry"):
            codec.load_entry(tmp_path, entry)


@pytest.mark.parametrize(
    "text", ["", "{", '{"dict": [[1]]}', '{"tensor": "9/x"}', '{"odd": 1}', '{"a": 1, "b": 2}']
)
def test_a_damaged_file_is_named_so(text: str, tmp_path: Path) -> None:
    codec.save([torch.zeros(2)], tmp_path)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        codec.load(tmp_path)


def test_damaged_tensors(tmp_path: Path) -> None:
    codec.save([torch.zeros(2)], tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"."):
        codec.load(tmp_path)
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(OSError, match=r"."):
        codec.load(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DepcutError, match="does not exist"):
        codec.save([torch.zeros(2)], tmp_path / "no")


def test_the_json_is_json(tmp_path: Path) -> None:
    codec.save({1: (2, [3])}, tmp_path)
    assert json.loads((tmp_path / "state.json").read_text()) == {
        "dict": [[1, {"tuple": [2, {"list": [3]}]}]]
    }
