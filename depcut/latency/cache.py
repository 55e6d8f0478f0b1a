"""Measurements kept on disk: one file per model, machine, runtime and number of threads."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depcut.errors import DepcutError
from depcut.latency.samples import Samples
from depcut.support import files

_FORMAT = 1


def file_of(key: Mapping[str, Any]) -> Path:
    """Where the measurements under these conditions are kept.

    Args:
        key: Everything that they depend on, as plain data.
    """
    from platformdirs import user_cache_path

    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return user_cache_path("depcut") / "latency" / f"{digest}.json"


def load(key: Mapping[str, Any]) -> Samples | None:
    """Read the measurements made under these conditions.

    A file that is damaged, or that holds something else, is named in a warning and not used.

    Args:
        key: Everything that they depend on, as plain data.

    Returns:
        The measurements; None where there is no usable file.
    """
    path = file_of(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn_of(path, str(error))
        return None
    try:
        data = json.loads(text)
        content = data["content"]
        if data["key"] != json.loads(json.dumps(key)) or data["digest"] != _digest(content):
            raise ValueError("its content is not what was written")
        return Samples.of_json(content)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        _warn_of(path, f"{type(error).__name__}: {error}")
        return None


def store(key: Mapping[str, Any], samples: Samples) -> None:
    """Keep measurements; where no file can be written they are only used once.

    Args:
        key: Everything that they depend on, as plain data.
        samples: The measurements.
    """
    path, content = file_of(key), samples.as_json()
    content = json.loads(json.dumps(content))
    data = {"key": dict(key), "digest": _digest(content), "content": content}
    try:
        files.make_folder(path.parent, "latency measurements")
        files.write_json(path, data)
    except DepcutError as error:
        warnings.warn(f"latency measurements are not kept: {error}", stacklevel=2)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _warn_of(path: Path, why: str) -> None:
    warnings.warn(f"measuring again: {path} cannot be used ({why})", stacklevel=4)
