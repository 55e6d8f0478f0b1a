"""Classes and functions by name: "module:qualname"."""

from __future__ import annotations

import importlib
from typing import Any

from depcut.errors import InputError
from depcut.support.failures import first_line, reraise_fatal

_SCRIPTS = ("__main__", "__mp_main__")


def name_of(value: Any) -> str:
    """The name of a class or function; of another object, that of its class.

    Args:
        value: Anything.
    """
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"


def is_same(one: str, other: str) -> bool:
    """Whether two names may be of the same thing: a script is a module when it is imported.

    Args:
        one: As `name_of` gives it.
        other: Alike.
    """
    if one == other:
        return True
    (module, _, name), (other_module, _, other_name) = one.partition(":"), other.partition(":")
    return name == other_name and (module in _SCRIPTS or other_module in _SCRIPTS)


def is_importable(name: str) -> bool:
    """Whether another process can import what has that name.

    Args:
        name: As `name_of` gives it.
    """
    module, _, path = name.partition(":")
    return module not in _SCRIPTS and "<" not in path


def imported(name: str, where: str) -> Any:
    """What has a name.

    Args:
        name: As `name_of` gives it.
        where: Where the name stands, for messages.

    Raises:
        InputError: It cannot be imported.
    """
    module, _, path = name.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for step in path.split("."):
            value = getattr(value, step)
    except Exception as error:
        reraise_fatal(error)
        raise InputError(
            f"{module}.{path} cannot be imported: {first_line(error)}",
            where=where,
            remedy="install what it is part of, or pass the class: depcut.load(folder, Net)",
        ) from error
    return value
