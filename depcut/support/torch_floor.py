"""The oldest torch that depcut runs on, checked before anything else of the package is imported.

An older torch would otherwise fail with an ImportError or AttributeError for a name that it lacks.
"""

from __future__ import annotations

import re

import torch

from depcut.errors import TorchVersionError

# The oldest release on which the tests pass; pyproject.toml and the README say the same. torch 2.11
# and 2.12 capture the final states of an LSTM with a dimension too many: their decomposition
# squeezes dimension 1 in place of 0 (`one_layer_lstm` in torch/_decomp/decompositions.py).
TORCH_FLOOR = (2, 13)


def check_torch(version: str) -> None:
    """Refuse a torch that is too old.

    Args:
        version: What `torch.__version__` says, such as "2.13.0+cpu".

    Raises:
        TorchVersionError: It is older than `TORCH_FLOOR`.
    """
    release = re.match(r"(\d+)\.(\d+)", version)
    floor = ".".join(map(str, TORCH_FLOOR))
    if release is not None and (int(release[1]), int(release[2])) < TORCH_FLOOR:
        raise TorchVersionError(
            f"torch {version} is installed, depcut needs {floor} or newer",
            where="import depcut",
            remedy=f"pip install 'torch>={floor}'",
        )


check_torch(torch.__version__)
