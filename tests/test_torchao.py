"""torchao on smaller models, and what it has quantized given to depcut."""

import copy
import warnings

import pytest
import torch
from torch import nn

import depcut
from depcut.errors import CaptureError

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A stream, attention whose sizes are attributes, and a product behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = 4
        self.into = nn.Linear(24, 64)
        self.norm = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 3 * 64)
        self.out = nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.into(x)[:, None]
        parts = self.qkv(self.norm(x)).view(len(x), 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))[:, 0]


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.fixture(scope="module")
def slim():
    return depcut.shrink(Block().eval(), 0.5, X, data=None, align=1).eval()


def quantized(torchao, model, config):
    """A copy that torchao has quantized."""
    made = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(made, getattr(torchao, config)())
    return made


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_a_smaller_model_is_quantized_like_any_other(torchao, slim, config):
    made = quantized(torchao, slim, config)
    kinds = [type(m.weight.data).__module__ for m in made.modules() if isinstance(m, nn.Linear)]
    assert len(kinds) == 4
    assert all(kind.startswith("torchao") for kind in kinds)
    assert made.out.weight.shape == slim.out.weight.shape != Block().out.weight.shape
    with torch.no_grad():
        wanted, found = slim(X), made(X)
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
@pytest.mark.parametrize("call", [depcut.analyze, lambda m, x: depcut.shrink(m, 0.5, x)])
def test_what_it_has_quantized_is_refused(torchao, slim, config, call):
    made = quantized(torchao, slim, config)
    with pytest.raises(CaptureError, match="holds a quantized tensor: weight is a") as caught:
        call(made, X)
    assert caught.value.where == "layer 'into'"
    assert "shrink the model in floating point first" in caught.value.remedy
