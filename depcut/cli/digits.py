"""scikit-learn's digits, which the demo trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from depcut.capture.modes import modes
from depcut.errors import DepcutError


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 16, 16] in [0, 1] and labels [n], split for training and test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's 1,797 scans of digits at twice their size, three quarters for training.

    Args:
        seed: Seed of the split.

    Returns:
        The images and labels.

    Raises:
        DepcutError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DepcutError(
            "the demo's digits come with scikit-learn, which is not installed",
            where="depcut demo",
            remedy="pip install scikit-learn",
        ) from error
    data = datasets.load_digits()
    scans = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = functional.interpolate(scans, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits(images[train], labels[train], images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that the model classifies correctly; its training mode stays.

    Args:
        model: The classifier.
        digits: The data.

    Returns:
        A number in [0, 1].
    """
    with modes(model):
        right = sum(
            int((model(images).argmax(1) == labels).sum())
            for images, labels in zip(
                digits.test_images.split(256), digits.test_labels.split(256), strict=True
            )
        )
    return right / len(digits.test_labels)
