"""What torch.export leaves out for a capture changes nothing that the capture reads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depcut.capture import process_state
from depcut.capture.capture import capture
from depcut.capture.lean import lean
from depcut.capture.program import Program
from depcut.capture.provenance import call_of, literals_of
from depcut.support.torch_private import FakeTensorMode, proxy_tensor, replaced_to_be_lean


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        x = functional.hardswish(functional.silu(self.second(x)), inplace=True)
        return x.mean((2, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.drop(functional.gelu(self.out(y))).mul_(self.heads**-0.5)
        with torch.no_grad():
            return y + x[:, -1:].clone()


class Squeezed(nn.Module):
    """A batch norm of one pixel, laid out as other shapes are, and of channels that lie apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.layer(x)
        pixel = self.norm(
            x.mean((2, 3), keepdim=True).contiguous(memory_format=torch.channels_last)
        )
        apart = self.other(x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2))
        return (
            pixel.sigmoid().flatten(1),
            functional.silu(apart),
            functional.relu(x.permute(0, 2, 3, 1)),
        )


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.layer(x)[(x > 0).any(1).nonzero().squeeze(1)]
        return chosen.relu().sum(0)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (Conv, (2, 3, 9, 9)),
    "attention": (Attention, (2, 5, 8)),
    "squeezed": (Squeezed, (2, 3, 5, 5)),
    "data-dependent": (DataDependent, (3, 4)),
    "recurrent": (lambda: nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
    "two directions": (
        lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
        (2, 5, 4),
    ),
    "projected": (lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3, batch_first=True), (2, 5, 4)),
    "without gradients": (
        lambda: nn.LSTM(4, 6, batch_first=True).requires_grad_(requires_grad=False),
        (2, 5, 4),
    ),
    "time first": (lambda: nn.LSTM(4, 6, bias=False), (7, 2, 4)),
    "gru": (lambda: nn.GRU(4, 6, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 4)),
    "rnn": (lambda: nn.RNN(4, 6, nonlinearity="relu", batch_first=True), (2, 5, 4)),
    "of half precision": (lambda: nn.GRU(4, 6, batch_first=True).bfloat16(), (2, 5, 4)),
    "torch's own attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), (5, 2, 8)),
}


def described(program: Program) -> list[Any]:
    """All that a capture reads of a graph and of the calls that made it."""

    def value(held: Any) -> Any:
        if isinstance(held, list | tuple):
            return [value(v) for v in held]
        if not isinstance(held, Tensor):
            return str(held)
        return str(held.dtype), str(held.shape), str(held.stride()), held.requires_grad

    def call(node: Any) -> Any:
        number = call_of(node)
        if number is None:
            return None
        made = program.torch_calls[number]
        spans = [(f.code, f.span) for f in made.frames]
        return made.function, made.module, spans, made.numbers, made.positional, made.left

    def origin(expr: Any) -> Any:
        if not isinstance(expr, tuple):
            return expr
        if expr[0] in ("size", "numel"):
            return (expr[0], program.marks[expr[1]].name, *expr[2:])
        return tuple(origin(part) for part in expr)

    nodes = [
        (
            *(node.op, node.name, str(node.target), str(node.args), str(node.kwargs)),
            *(value(node.meta.get("val")), node.meta.get("stack_trace")),
            *(str(node.meta.get("nn_module_stack")), str(node.meta.get("unbacked_bindings"))),
            *(call(node), [(number, origin(expr)) for number, expr in literals_of(node)]),
        )
        for node in program.graph.graph.nodes
    ]
    calls = [(c.module, str(c.leaves), str(c.out_leaves)) for c in program.calls]
    return [*nodes, *calls, sorted(program.lines), program.notes, sorted(program.unused)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_of_a_recurrent_layer_are_not_run(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = []
    plain = FakeTensorMode.dispatch

    def dispatch(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        operators.append(func)
        return plain(mode, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    counts = []
    for length in (3, 60):
        operators.clear()
        capture(kind(4, 6, batch_first=True), torch.rand(2, length, 4))
        counts.append(len(operators))
    assert counts[1] == counts[0]


@pytest.mark.parametrize("name", NETS)
def test_the_graph_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = NETS[name]
    model, x = build().eval(), torch.rand(shape)
    x = x.to(next(model.parameters()).dtype)
    found = described(capture(model, x))
    monkeypatch.setattr(process_state, "lean", contextlib.nullcontext)
    wanted = described(capture(model, x))
    assert len(found) > 5
    assert found == wanted


def test_other_threads_get_all_of_it() -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(proxy_tensor._extract_tensor_metadata(torch.zeros(2)))

    with lean():
        look()
        other = threading.Thread(target=look)
        other.start()
        other.join()
    look()
    assert seen[0] is None
    assert [each.shape for each in seen[1:]] == [torch.Size([2])] * 2


def test_all_is_put_back_after_a_failure() -> None:
    places = replaced_to_be_lean().values()
    before = [getattr(owner, name) for owner, name in places]
    with pytest.raises(ValueError, match="within"), lean():
        raise ValueError("within")
    assert [getattr(owner, name) for owner, name in places] == before
