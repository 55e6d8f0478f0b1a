"""torch's own encoders, decoders and transformers around a narrowed `nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_pairs import (
    HEADS,
    SIZE,
    WIDTH,
    assert_alike,
    causal,
    drawn,
    expanded,
    inputs,
    narrowed,
    pair,
)
from torch import Tensor, nn

import depcut
from depcut.errors import InputError
from depcut.rewrite.generated import GeneratedModule

# Nested tensors and torch's encoder ---------------------------------------------------------------


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
def test_nested_tensors() -> None:
    both = pair("self")
    lengths = (5, 2, 7)
    parts = [drawn(n, len(both.widths[0])) for n in lengths]
    full = [torch.zeros(n, WIDTH) for n in lengths]
    for whole, part in zip(full, parts, strict=True):
        whole[:, both.widths[0]] = part
    with torch.no_grad():
        for weights in (False, True):
            x, y = torch.nested.nested_tensor(parts), torch.nested.nested_tensor(full)
            made = both.slim(x, x, x, need_weights=weights, average_attn_weights=False)
            expected = both.dense(y, y, y, need_weights=weights, average_attn_weights=False)
            padded = expected[0].to_padded_tensor(0.0), expected[1]
            assert_alike(
                both, (made[0].to_padded_tensor(0.0), made[1]), padded, weights, average=False
            )
    with pytest.raises(InputError, match="nested tensor"):
        both.slim(x, x, x, attn_mask=causal(7, 7))


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 20, dropout=0.1, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        return self.encoder(x, **keywords)


@functools.cache
def encoders(norm_first: bool) -> tuple[nn.Module, nn.Module]:
    """Slim and dense encoder, the stream between the layers whole, since norms reduce it."""
    torch.manual_seed(0)
    net = Encoder(norm_first).eval()
    rng = np.random.default_rng(4)
    slim, indices = narrowed(net, drawn(2, 7, WIDTH), {HEADS: 3, SIZE: 4, 20: 13}, rng)
    assert depcut.report(slim).generated == {}
    return slim, expanded(net, slim, indices, "")


@NESTED
@pytest.mark.parametrize("norm_first", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_encoder_layers_take_no_inference_path_that_is_wrong_for_them(norm_first: bool) -> None:
    slim, dense = encoders(norm_first)
    x = drawn(3, 7, WIDTH)
    ignored = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    for keywords in (
        {}, {"mask": causal(7, 7)}, {"src_key_padding_mask": ignored},
        {"mask": causal(7, 7), "src_key_padding_mask": ignored},
        {"mask": causal(7, 7), "is_causal": True},
    ):  # fmt: skip
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                made, full = slim(x, **keywords), dense(x, **keywords)
            torch.testing.assert_close(made, full, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        one = slim(x[0], mask=causal(7, 7))
    torch.testing.assert_close(one, slim(x, mask=causal(7, 7))[0], rtol=1e-4, atol=1e-5)


@NESTED
@pytest.mark.parametrize("narrow", [{HEADS: 3, SIZE: 4}, {20: 11}])
def test_an_encoder_captured_with_padding_is_not_generated(narrow: dict[int, int]) -> None:
    """On its inference path, torch's encoder returns zeros at the padded positions."""
    torch.manual_seed(0)
    net, x = Encoder(norm_first=False).eval(), drawn(2, 7, WIDTH)
    args = {"x": x, "src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4]])}
    slim, indices = narrowed(net, args, narrow)
    assert depcut.report(slim).generated == {}
    dense = expanded(net, slim, indices, "")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made, full = slim(**args), dense(**args)
        torch.testing.assert_close(made, full, rtol=1e-4, atol=1e-5)
        assert bool(made[1, 4:].any()) == grad


class Padded(nn.Module):
    """An encoder between linear layers, so that its width is free, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, WIDTH), Encoder(False), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x), src_key_padding_mask=ignored))


def padded() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Padded().eval(), (drawn(2, 7, 5), torch.arange(7) >= torch.tensor([[7], [4]]))


@NESTED
def test_an_odd_number_of_heads_takes_the_nested_tensors_of_the_encoder() -> None:
    """It fits the stock class, which refuses nested tensors where its heads are odd."""
    net, args = padded()
    slim, _ = narrowed(net, args, {HEADS: 3, WIDTH: 18})
    assert slim.inner.encoder.layers[0].self_attn.num_heads == 3
    expected = slim(*args)
    with torch.no_grad():
        made = slim(*args)
    torch.testing.assert_close(made[~args[1]], expected[~args[1]])


@NESTED
@pytest.mark.sweep
def test_repair_of_an_encoder_with_padding() -> None:
    net, args = padded()
    slim = depcut.shrink(net, 0.4, args, data=[args, args], of="channels", align=1)
    assert depcut.report(slim).compensation is not None
    assert depcut.report(slim).generated == {}


@NESTED
@pytest.mark.sweep
def test_an_encoder_with_padding_is_exported(tmp_path: Path) -> None:
    """The stock class is not: its mask has one row, which onnxruntime refuses."""
    net, args = padded()
    slim, _ = narrowed(net, args, {HEADS: 3, SIZE: 4})
    report = depcut.export(slim, tmp_path / "slim.onnx", args)
    assert report.max_rel_error < 1e-4


def test_a_dropped_in_encoder_trains_without_dropout_as_it_evaluates() -> None:
    slim = copy.deepcopy(encoders(False)[0])
    x = drawn(3, 7, WIDTH)
    expected = slim(x)
    slim.train()
    assert not torch.allclose(slim(x), expected)
    for module in slim.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(slim(x), expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_a_whole_transformer_is_not_generated(norm_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.Transformer(WIDTH, HEADS, 1, 1, 20, batch_first=True, norm_first=norm_first).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.net, self.head = nn.Linear(5, WIDTH), net, nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.net(self.stem(x), self.stem(y)))

    slim = depcut.shrink(Model().eval(), 0.5, inputs(), of="channels", align=1)
    assert depcut.report(slim).generated == {}
    assert slim.net.d_model == slim.stem.out_features < WIDTH
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    x, y = (slim.stem(t) for t in inputs())
    assert slim.net(x, y, tgt_mask=mask, tgt_is_causal=True).shape == y.shape


def built(kind: str, width: int, norm_first: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    options: Any = {"batch_first": True, "norm_first": norm_first}
    x, y = drawn(2, 7, 10), drawn(2, 5, 10)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(width, 8, 2 * width, **options)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        return nn.Sequential(nn.Linear(10, width), encoder, nn.Linear(width, 3)), (x,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(10, width), nn.Linear(width, 3)
            if kind == "decoder":
                layer = nn.TransformerDecoderLayer(width, 8, 2 * width, **options)
                self.inner: nn.Module = nn.TransformerDecoder(layer, 2)
            else:
                self.inner = nn.Transformer(width, 8, 1, 1, 2 * width, **options)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.inner(self.stem(x), self.stem(y)))

    return Model(), (x, y)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_nothing_is_generated_for_transformers(kind: str, norm_first: bool, width: int) -> None:
    net, args = built(kind, width, norm_first)
    analysis = depcut.analyze(net.eval(), args)
    for of in ("macs", "params", "channels"):
        for ratio in (0.3, 0.5, 0.7):
            slim = analysis.plan(ratio, of=of).apply(net)
            assert not any(isinstance(m, GeneratedModule) for m in slim.modules())


@pytest.mark.sweep
def test_nothing_is_generated_for_the_vision_transformer(zoo_libraries: None) -> None:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.vit_b_16(weights=None).eval()
    analysis = depcut.analyze(net, torch.randn(1, 3, 224, 224))
    for ratio, of in ((0.3, "macs"), (0.5, "channels"), (0.7, "params")):
        slim = analysis.plan(ratio, of=of).apply(net)
        assert depcut.report(slim).generated == {}
