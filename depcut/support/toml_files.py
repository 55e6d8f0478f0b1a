"""TOML files of options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from depcut.errors import InputError
from depcut.support import files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and values of a TOML file; what is no regular file is not opened.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        return tomllib.loads(files.read_text(path))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"no options can be read: {error}",
            where=str(Path(path)),
            remedy='write TOML, such as: score = "obs"',
        ) from error
