"""A patched module is the user's class: whatever the dense one takes, it takes, with equal results.

The dense counterpart has zeros in place of the units that went, so that equality is exact.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import patch_nets
import pytest
import torch
from patch_nets import Heads, Images, Regions, Straight, assert_same, drawn, pair, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import depcut

pytestmark = pytest.mark.usefixtures("one_thread")

X = drawn(3, 6, 8)
IMAGES = drawn(2, 3, 8, 8)
ROWS = drawn(5, 8)


@functools.cache
def _pair(kind: Callable[..., nn.Module], x: Tensor) -> tuple[nn.Module, nn.Module]:
    return pair(seeded(kind), x)


def both(kind: Callable[..., nn.Module], x: Tensor) -> tuple[Any, Any]:
    """Copies, so that no test sees what another one did."""
    slim, dense = _pair(kind, x)
    return copy.deepcopy(slim), copy.deepcopy(dense)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def padding(batch: int, length: int) -> Tensor:
    return torch.arange(length)[None] >= length - torch.arange(batch)[:, None] % 3


LATER: dict[str, Callable[[], tuple[Any, ...]]] = {
    "as in the example": lambda: (X,),
    "bool mask": lambda: (X, drawn(3, 1, 6, 6) > -1),
    "float mask": lambda: (X, drawn(6, 6)),
    "causal mask": lambda: (X, causal(6)),
    "padding": lambda: (X, None, padding(3, 6)),
    "mask and padding": lambda: (X, causal(6), padding(3, 6)),
    "causal by flag": lambda: (X, None, None, True),
    "another length": lambda: (drawn(3, 11, 8),),
    "another length with a mask": lambda: (drawn(3, 4, 8), drawn(4, 4)),
    "a length of one": lambda: (drawn(3, 1, 8),),
    "a length equal to a width": lambda: (drawn(3, 16, 8),),
    "another batch": lambda: (drawn(7, 6, 8),),
    "a batch of one": lambda: (drawn(1, 6, 8),),
    "no batch": lambda: (drawn(6, 8),),
    "no batch, another length": lambda: (drawn(9, 8), causal(9)),
    "nothing in the batch": lambda: (drawn(0, 6, 8),),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
def test_later_call(later: Callable[[], tuple[Any, ...]]) -> None:
    assert_same(*both(Heads, X), *later())


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (5, 5), (16, 3)])
def test_another_image_size(size: tuple[int, int]) -> None:
    assert_same(*both(Images, IMAGES), drawn(2, 3, *size))


def assert_same_draws(slim: nn.Module, dense: nn.Module, x: Tensor) -> None:
    torch.manual_seed(3)
    got = slim(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, dense(x), rtol=1e-5, atol=1e-5)


def test_dropout_that_the_example_had_off() -> None:
    slim, dense = both(functools.partial(Heads, 0.5), X)
    assert_same(slim, dense, X)
    slim.train(), dense.train()
    assert not torch.allclose(slim(X), slim(X))
    assert_same_draws(slim, dense, X)


def test_dropout_set_to_zero_afterwards() -> None:
    slim, dense = both(functools.partial(Heads, 0.5), X)
    slim.train(), dense.train()
    slim.p = dense.p = 0
    assert torch.equal(slim(X), slim(X))
    assert_same(slim, dense, X)


def test_dropout_set_afterwards() -> None:
    slim, dense = both(Heads, X)
    slim.train(), dense.train()
    slim.p = dense.p = 0.3
    assert_same_draws(slim, dense, X)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor | None, bool]:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad, all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [Heads, Regions, Straight])
def test_gradients(kind: type[nn.Module]) -> None:
    x = X if kind is Heads else ROWS
    (got, some), (wanted, every) = (gradients(m, x) for m in both(kind, x))
    assert some
    assert every
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_region_without_gradients_and_one_in_low_precision() -> None:
    slim, dense = both(Regions, ROWS)
    assert_same(slim, dense, drawn(9, 8))
    assert not torch.equal(slim(ROWS), slim.double()(ROWS.double()))


@pytest.mark.parametrize("where", ["no_grad", "autocast"])
def test_an_exception_inside_a_region_leaves_no_state(where: str) -> None:
    slim, dense = both(Regions, ROWS)
    with pytest.raises(ValueError, match=where):
        slim(ROWS, fail=where)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert_same(slim, dense, ROWS)


PRECISIONS = {"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("kind", [Heads, Images, Straight])
def test_another_precision(kind: type[nn.Module], dtype: torch.dtype) -> None:
    x = {Heads: X, Images: IMAGES}.get(kind, ROWS)
    slim, dense = (model.to(dtype) for model in both(kind, x))
    tolerance = {torch.float64: 1e-6, torch.float16: 5e-3}.get(dtype, 4e-2)
    assert_same(slim, dense, x.to(dtype), tolerance=tolerance)


def test_another_device() -> None:
    slim, dense = (model.to("meta") for model in both(Heads, X))
    made = slim(X.to("meta"), None, None, True)
    assert made.device.type == "meta"
    assert made.shape == dense(X.to("meta")).shape


def test_deepcopy_copy_and_pickle() -> None:
    slim, dense = both(Heads, X)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(slim, protocol))  # noqa: S301
        assert type(loaded) is type(slim)
        assert_same(loaded, dense, X, causal(6))
    for made in (copy.deepcopy(slim), copy.copy(slim)):
        assert type(made) is type(slim)
        assert_same(made, dense, drawn(2, 9, 8))


def test_torch_save() -> None:
    slim, dense = both(Heads, X)
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), dense, X, causal(6))


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_pickle_in_another_process(way: str, tmp_path: Path) -> None:
    slim, dense = both(Heads, X)
    path, result = tmp_path / "slim", tmp_path / "out"
    if way == "pickle":
        path.write_bytes(pickle.dumps(slim))
    else:
        torch.save(slim, path)
    read = {
        "pickle": "pickle.loads(open(sys.argv[1], 'rb').read())",
        "torch": "torch.load(sys.argv[1], weights_only=False)",
    }
    code = (
        f"import sys, pickle, torch; slim = {read[way]}; "
        "x = torch.linspace(-1, 1, 3 * 9 * 8).view(3, 9, 8); "
        "torch.save(slim(x, None, None, True).detach(), sys.argv[2])"
    )
    paths = [str(Path(patch_nets.__file__).parent), str(Path(depcut.__file__).parent.parent)]
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(result)],
        check=True,
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    x = torch.linspace(-1, 1, 3 * 9 * 8).view(3, 9, 8)
    assert_same(lambda *_: torch.load(result), dense, x, None, None, True)


def test_state_dict_into_a_fresh_instance() -> None:
    slim, dense = both(Heads, X)
    assert list(slim.state_dict()) == list(dense.state_dict())
    fresh = copy.deepcopy(slim)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(slim.state_dict())
    assert_same(fresh, dense, X, causal(6))
    made = type(slim)(0.0)  # the class is made as the dense one is
    assert [p.shape for p in made.parameters()] == [p.shape for p in dense.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    slim, dense = both(Heads, X)

    def run(model: nn.Module) -> tuple[Tensor | None, bool]:
        return gradients(_Checkpointed(model, reentrant), X)

    (got, some), (wanted, every) = run(slim), run(dense)
    assert some
    assert every
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Heads, Images])
def test_compile_as_one_graph(kind: type[nn.Module]) -> None:
    x = X if kind is Heads else IMAGES
    slim, dense = both(kind, x)
    torch._dynamo.reset()
    assert_same(torch.compile(slim, backend="eager", fullgraph=True), dense, x)
    other = drawn(2, 9, 8) if kind is Heads else drawn(2, 3, 9, 10)
    assert_same(torch.compile(slim, backend="eager", fullgraph=True), dense, other)
    torch._dynamo.reset()
