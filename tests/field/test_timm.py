"""timm's functions work on smaller models of timm; `benchmarks/timm_models.py` shows it of many."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import depcut

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def made(name: str, **options: Any) -> Any:
    timm = zoo.libraries()["timm"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, **options).eval()


@torch.no_grad()
def assert_agrees(slim: Any) -> None:
    """What the attributes say is what the functions return."""
    features = slim.forward_features(X)
    assert slim.num_features in (features.shape[1], features.shape[-1])
    assert slim.head_hidden_size == slim.forward_head(features, pre_logits=True).shape[-1]
    maps = slim.forward_intermediates(X, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in slim.feature_info]
    new = copy.deepcopy(slim)
    new.reset_classifier(10)
    assert new(X).shape == (2, 10)
    new.reset_classifier(0)
    assert new(X).shape == (2, slim.head_hidden_size)


def test_a_small_resnet() -> None:
    dense = made("resnet10t", num_classes=7)
    before = copy.deepcopy(dense.feature_info)
    slim = depcut.shrink(dense, 0.5, X, data=None)
    assert_agrees(slim)
    assert slim.num_features < dense.num_features == 512
    assert dense.feature_info == before
    assert slim.pretrained_cfg == dense.pretrained_cfg
    assert not depcut.report(slim).notes


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenetv3_small_050", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("edgenext_xx_small", {}),
        ("convnext_atto", {"head_hidden_size": 48}),
    ],
)
def test_head(name: str, options: dict[str, Any]) -> None:
    slim = depcut.shrink(made(name, num_classes=7, **options), 0.5, X)
    assert_agrees(slim)


class Net(nn.Module):
    """A user's model on a backbone of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = made("resnet10t", num_classes=0)
        self.last = nn.Linear(self.backbone.num_features, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.backbone(x))


@pytest.mark.sweep
def test_a_backbone_in_another_model() -> None:
    slim = depcut.shrink(Net().eval(), 0.5, X)
    assert slim.last.in_features == slim.backbone.num_features < 512
    with torch.no_grad():
        assert slim.backbone.forward_features(X).shape[1] == slim.backbone.num_features


@pytest.mark.sweep
def test_features_only() -> None:
    dense = made("mobilenetv3_small_050", features_only=True, out_indices=(1, 3))
    slim = depcut.shrink(dense, 0.5, X, data=None)
    with torch.no_grad():
        assert [f.shape[1] for f in slim(X)] == slim.feature_info.channels()
    assert slim.feature_info.channels() == dense.feature_info.channels()
    assert slim.feature_info.info is not dense.feature_info.info


class Rigid(nn.Module):
    """Its reset writes a number that no attribute supplies; by name it is one of timm's."""

    __module__ = "timm.models.rigid"

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(16, num_classes)


def test_a_reset_that_cannot_follow_is_told() -> None:
    slim = depcut.shrink(Rigid().eval(), 0.5, torch.randn(2, 4), data=None)
    assert slim.num_features == 8
    (note,) = depcut.report(slim).notes
    assert "reset_classifier does not work on the model" in note


@pytest.mark.sweep
def test_features_that_no_module_returns() -> None:
    """Twins names `block.0`, a list of modules: its maps are those of forward_intermediates."""
    widths = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
    dense = made("twins_svt_small", **widths)
    slim = depcut.shrink(dense, 0.5, X, align=4)
    told = [entry["num_chs"] for entry in slim.feature_info]
    maps = slim.forward_intermediates(X, intermediates_only=True)
    assert told == [m.shape[1] for m in maps]
    assert told != [entry["num_chs"] for entry in dense.feature_info]
