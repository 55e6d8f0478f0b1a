"""What is the same for every conversion is done once, and the files are the same."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import onnxscript
import pytest
import torch
from torch import Tensor, nn

import depcut
from depcut.deploy import convert
from depcut.deploy.translations import translating
from depcut.errors import ExportError
from depcut.support import onnx_private


class Net(nn.Module):
    """A convolution, a norm over it, attention and an embedding: of each, several translations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        out: Tensor = self.attention(seen, seen, seen, need_weights=False)[0].mean(1)
        return out.clamp(-1, 1) + out.std(-1, keepdim=True)


def replaced() -> dict[str, Any]:
    return {name: getattr(*place) for name, place in onnx_private.replaced_to_translate().items()}


def written(path: Path, **options: Any) -> bytes:
    torch.manual_seed(0)
    depcut.export(Net().eval(), path, torch.ones(2, 3, 5, 5), **options)
    return path.read_bytes()


@pytest.mark.parametrize("options", [{}, {"opset": 20}], ids=["newest", "older"])
def test_the_file_is_the_one_that_torch_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    twice = [written(tmp_path / "net.onnx", **options) for _ in range(2)]
    monkeypatch.setattr(convert, "translating", contextlib.nullcontext)
    assert twice == [written(tmp_path / "net.onnx", **options)] * 2


def test_work_that_is_the_same_for_every_model_is_done_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written(tmp_path / "first.onnx")
    calls: list[str] = []
    for what, (owner, name) in onnx_private.replaced_to_translate().items():
        plain = getattr(owner, name)

        def counted(*args: Any, _plain: Any = plain, _what: str = what, **kwargs: Any) -> Any:
            calls.append(_what)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    written(tmp_path / "second.onnx")
    assert calls.count("signature") == 0
    assert calls.count("composites") == 1
    del calls[:]
    written(tmp_path / "third.onnx")
    assert calls == ["composites"]


def test_a_translation_that_is_registered_later_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library may bring translations of its own."""
    from onnxscript.function_libs.torch_lib import registration

    owner, name = onnx_private.replaced_to_translate()["translations"]
    with translating():
        before = getattr(owner, name)()
        before.pop()  # a list of one's own
        count = len(getattr(owner, name)())
        assert count == len(before) + 1
    known = registration.default_registry
    monkeypatch.setattr(known, "_registry", dict(known._registry))

    @registration.torch_op("depcut_test::doubled", trace_only=True)
    def doubled(x: Any) -> Any:
        return onnxscript.opset18.Add(x, x)

    with translating():
        names = [meta.qualified_name for meta in getattr(owner, name)()]
    assert len(names) == count + 1
    assert "depcut_test::doubled" in names


def test_other_threads_see_torch_as_it_is() -> None:
    plain, seen = replaced(), list[Any]()

    def look() -> None:
        for what, function in replaced().items():
            seen.append((what, function is plain[what]))
        owner, name = onnx_private.replaced_to_translate()["translations"]
        seen.append(getattr(owner, name)() is not getattr(owner, name)())
        seen.append(getattr(owner, name)()[0] is not getattr(owner, name)()[0])

    with translating():
        owner, name = onnx_private.replaced_to_translate()["translations"]
        here = [getattr(owner, name)()[0] for _ in range(2)]
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert here[0] is here[1]
    assert seen[-2:] == [True, True]
    assert replaced() == plain


def test_torch_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.mT)

    plain = replaced()
    with pytest.raises(ExportError, match="cannot convert"):
        depcut.export(Unknown(), tmp_path / "net.onnx", torch.ones(2, 3, 3))
    assert replaced() == plain


def test_without_those_names_models_are_converted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = written(tmp_path / "net.onnx")
    from torch._export import utils

    with monkeypatch.context() as missing:
        missing.delattr(utils, "_materialize_cpp_cia_ops")
        assert onnx_private.replaced_to_translate() == {}
    monkeypatch.setattr("depcut.deploy.translations.replaced_to_translate", dict)
    assert written(tmp_path / "net.onnx") == expected
